"""How fast images of mixed sizes are prepared and tokenized, with how many programs, and that kills change nothing.

    python tests/benchmarks/mixed_sizes.py [--images=10000]

The images are windows of scikit-image's photographs, of 120 x 120 to 400 x 500 pixels, as JPEG files of quality 95 with
captions in tar shards, read from the system's cache. "A core" counts this process's CPU time. The tokenizer has random
weights, 32 channels, 16 x 16 pixels a code and an area of 96 x 96 to 160 x 160 pixels, so that the host has most of the
work. The command is run whole, then killed twice and continued, and both caches are compared. If megatron-core is
installed, its reader reads the export.
"""

import argparse
import importlib.util
import io
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import skimage
from PIL import Image

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from support.image_files import write_tar  # noqa: E402
from support.small_runs import save_run  # noqa: E402

from ibq_jax.data.mixed_cache import MixedCache  # noqa: E402
from ibq_jax.data.raw_images import find_images  # noqa: E402
from ibq_jax.data.shapes import choose_shapes  # noqa: E402
from ibq_jax.data.sized_images import AreaBounds, load_ahead  # noqa: E402

PHOTOGRAPHS = ("astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg", "motorcycle_left.png")
SHARDS, PASSES, MAX_SHAPES = 8, 3, 24
NETWORK = (
    "model.channels=32",
    "model.channel_multipliers=(1,1,1,1,1)",
    "model.num_res_blocks=1",
    "model.resolution=256",
)
SIZES = ("data.image_size=256", "data.resize=256", "data.batch_size=8", "evaluate.batch_size=8", "codebook.size=1024")
MEGATRON = """
import sys
from megatron.core.datasets.indexed_dataset import IndexedDataset
sets = [IndexedDataset(prefix) for prefix in sys.argv[1:]]
print(sum(map(len, sets)), sum(len(data[i]) for data in sets for i in range(len(data))))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=10_000)
    images = parser.parse_args().images
    with tempfile.TemporaryDirectory() as folder:
        where = write_windows(Path(folder, "in"), images)
        measure_host(where, images)
        measure_command(Path(folder), where, images)


def write_windows(folder: Path, images: int) -> str:
    folder.mkdir()
    rng = np.random.default_rng(0)
    photographs = [np.asarray(Image.open(Path(skimage.__file__).parent / "data" / name)) for name in PHOTOGRAPHS]
    for shard in range(SHARDS):
        members = []
        for number in range(shard, images, SHARDS):
            photograph = photographs[number % len(photographs)]
            height, width = int(rng.integers(120, 400)), int(rng.integers(120, min(500, photograph.shape[1])))
            height = min(height, photograph.shape[0])
            top, left = (
                int(rng.integers(0, size - side + 1))
                for size, side in zip(photograph.shape, (height, width), strict=False)
            )
            file = io.BytesIO()
            Image.fromarray(photograph[top : top + height, left : left + width]).save(file, "JPEG", quality=95)
            members += [(f"{number:06}.jpg", file.getvalue()), (f"{number:06}.txt", f"window {number}".encode())]
        write_tar(folder / f"{shard}.tar", members)
    return str(folder / "*.tar")


def measure_host(where: str, images: int) -> None:
    for low, high in ((96**2, 160**2), (256**2, 512**2)):
        bounds, found, best = AreaBounds(16, low, high), find_images(where), {}
        for _ in range(PASSES):
            start, sizes = time.process_time(), None
            for number in range(len(found.parts)):
                _, counts = bounds.count_shapes(found, number)
                sizes = counts if sizes is None else sizes + counts
            best["survey"] = min(best.get("survey", 1e9), time.process_time() - start)
        start = time.process_time()
        shapes = choose_shapes(sizes, MAX_SHAPES)
        choice = time.process_time() - start
        with ThreadPoolExecutor(1) as pool:
            start, kept, total = time.process_time(), 0, 0
            for part in found.parts[:2]:
                for image in load_ahead(part.images_with_texts(), bounds, shapes, pool, 1, print):
                    kept, total = kept + (image.shape == image.own), total + 1
            loading = time.process_time() - start
        print(
            f"areas of {low:,} to {high:,} pixels: {len(sizes)} sizes, {len(shapes)} shapes chosen in {choice:.1f} s; "
            f"a core surveys {images / best['survey']:,.0f} images/s and reads, decodes and resizes "
            f"{total / loading:,.0f} images/s; {kept / total:.0%} keep their own size"
        )


def measure_command(folder: Path, where: str, images: int) -> None:
    run = save_run(folder / "run", folder, *NETWORK, *SIZES)
    command = [sys.executable, "-m", "ibq_jax", "tokenize", f"--run={run}", f"--images={where}", "--batch-tokens=2048"]
    command += ["--min-pixels=9216", "--max-pixels=25600"]
    start = time.monotonic()
    subprocess.run([*command, f"--out={folder / 'whole'}"], cwd=ROOT, check=True)
    print(f"first run, which compiles: {time.monotonic() - start:.0f} s")
    start, killed = time.monotonic(), folder / "killed"
    for parts in (2, 5):
        process = subprocess.Popen([*command, f"--out={killed}"], cwd=ROOT, stdout=subprocess.DEVNULL)
        while len(list(killed.glob("images/*.array_record"))) < parts and process.poll() is None:
            time.sleep(0.05)
        process.kill()
        process.wait()
        print(f"killed with {len(list(killed.glob('images/*.array_record')))} of {SHARDS} parts whole")
    subprocess.run([*command, f"--out={killed}"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    print(f"three starts and two kills: {time.monotonic() - start:.0f} s, programs from the compilation cache")
    cache, other = MixedCache(folder / "whole"), MixedCache(killed)
    files = [{p.relative_to(c.path): p.read_bytes() for p in c.path.rglob("*") if p.is_file()} for c in (cache, other)]
    counts = cache.manifest["counts"]
    print(f"equal to the byte: {files[0] == files[1]}; {counts}, {len(cache.manifest['shapes'])} shapes")
    start = time.monotonic()
    export = [sys.executable, "-m", "ibq_jax", "export", "--format=megatron", "--layout=emu35", f"--codes={killed}"]
    subprocess.run([*export, f"--out={folder / 'megatron'}"], cwd=ROOT, check=True)
    print(f"export: {time.monotonic() - start:.0f} s")
    if importlib.util.find_spec("megatron"):
        prefixes = [str(path.with_suffix("")) for path in sorted((folder / "megatron").glob("*.idx"))]
        subprocess.run([sys.executable, "-W", "ignore", "-c", MEGATRON, *prefixes], check=True)
        shapes = [image.codes.shape for image in cache]
        expected = sum(h * (w + 1) - 1 + len(f"{h}*{w}") + 5 for h, w in shapes)
        print(f"expected of Megatron's reader: {len(shapes)} {expected}")


if __name__ == "__main__":
    main()
