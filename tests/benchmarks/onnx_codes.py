"""Compares the codes and images of ONNX graphs of Emu3.5's tokenizer, in onnxruntime, with those in JAX, in float32.

    python tests/benchmarks/onnx_codes.py [--images=200] [--decoded=50] [--sizes=64x64,48x80]

The tokenizer has the sizes of `emu35_131072` (455 M parameters) and made-up weights. The images are windows of
scikit-image's photographs, of the given heights and widths in turn; the codes of the first ones are decoded too. Each
size compiles two programs. Graphs are those of `convert --graphs=onnx`. Every code that differs is printed.
"""

import argparse
import json
import sys
import tempfile
from itertools import islice
from pathlib import Path

import numpy as np
import onnxruntime
import skimage
import torch
from PIL import Image
from tqdm import tqdm

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from support import released  # noqa: E402

from ibq_jax import Tokenizer  # noqa: E402
from ibq_jax.__main__ import main as command  # noqa: E402
from ibq_jax.interop import torch_model  # noqa: E402
from ibq_jax.pretrained.tensor_files import write_tensors  # noqa: E402

PHOTOGRAPHS = ("astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg", "motorcycle_left.png", "retina.jpg")
NAME = "Emu3.5-VisionTokenizer"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--decoded", type=int, default=50)
    parser.add_argument("--sizes", default="64x64,48x80")
    flags = parser.parse_args()
    sizes = [tuple(map(int, size.split("x"))) for size in flags.sizes.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        source = write_made_up(Path(folder, "model"))
        assert command(["convert", f"--in={source}", f"--out={folder}/graphs", "--graphs=onnx"]) == 0
        tokenizer = Tokenizer.load(source)
        encode, decode = (session(Path(folder, "graphs", f"{name}.onnx")) for name in ("encode", "decode"))
        compare(tokenizer, encode, decode, list(islice(windows(sizes), flags.images)), flags.decoded)


def write_made_up(folder: Path) -> Path:
    """Writes a folder as Emu3.5's is published, with weights drawn by seeds from their names."""
    published = json.loads((released.GOLDEN / "published_tokenizers.json").read_text())["others"][NAME]["config"]
    with torch.device("meta"):
        tensors = torch_model.Tokenizer.of(published).state_dict()
    folder.mkdir()
    write_tensors(folder / "model.safetensors", released.stand_ins_like(tensors), {"format": "pt"})
    (folder / "config.yaml").write_text(json.dumps(published))  # JSON is YAML
    return folder


def session(path: Path):
    """Returns a graph of one input and one output as a function of arrays."""
    graph = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    name = graph.get_inputs()[0].name
    return lambda values: graph.run(None, {name: values})[0]


def windows(sizes: list[tuple[int, int]]):
    """Yields windows of the photographs, uint8 [1, H, W, 3], without end."""
    rng, number = np.random.default_rng(0), 0
    folder = Path(skimage.__file__).parent / "data"
    photographs = [np.asarray(Image.open(folder / name).convert("RGB")) for name in PHOTOGRAPHS]
    while True:
        photograph, (height, width) = photographs[number % len(photographs)], sizes[number % len(sizes)]
        top = int(rng.integers(0, photograph.shape[0] - height + 1))
        left = int(rng.integers(0, photograph.shape[1] - width + 1))
        yield photograph[None, top : top + height, left : left + width]
        number += 1


def compare(tokenizer: Tokenizer, encode, decode, images: list[np.ndarray], decoded: int) -> None:
    total, differing, largest, seen = 0, 0, 0.0, set()
    for number, image in enumerate(tqdm(images, "comparing", unit=" images")):
        floats = image.astype(np.float32) / 127.5 - 1
        codes = np.asarray(tokenizer.encode(image))
        others = encode(np.ascontiguousarray(floats.transpose(0, 3, 1, 2)))
        for place in np.argwhere(others != codes):
            print(
                f"image {number}, position {place.tolist()}: {codes[tuple(place)]} here, {others[tuple(place)]} there"
            )
        total, differing, seen = total + codes.size, differing + int((others != codes).sum()), seen | set(codes.flat)
        if number >= decoded:
            continue
        pixels = decode(codes.astype(np.int64)).transpose(0, 2, 3, 1)
        largest = max(largest, float(np.abs(np.asarray(tokenizer.decode(codes)) - pixels).max()))
    print(f"{len(images)} images, {total:,} codes, {len(seen):,} different ones: {differing} differ in onnxruntime")
    print(f"decoded values of {min(decoded, len(images))} images, in [-1, 1], differ by at most {largest:.1e}")


if __name__ == "__main__":
    main()
