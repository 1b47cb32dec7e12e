"""How many images a second a core prepares, and how many bytes an image takes: what docs/scale.md reckons with.

    python tests/benchmarks/prepare.py               # in .venv-beam it measures --beam too
    python tests/benchmarks/prepare.py --encoder     # operations that encoding an image takes; compiles, runs nothing

The images are windows of scikit-image's photographs, as JPEG files in tar shards: of 256 pixels, as sets for
pretraining are stored, and of 375 x 500, with as many bytes as ImageNet's. Files come from the system's cache, so that
disks and networks are not in it. "A core" counts the process's CPU time, whatever else the machine does; "N cores" goes
by the clock. Every figure is the best of three passes.
"""

import argparse
import contextlib
import functools
import importlib.util
import io
import os
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import skimage
from PIL import Image

from ibq_jax.base.config import load_config
from ibq_jax.base.sharding import make_mesh
from ibq_jax.data.beam_dataset import _ShardWriter, write_dataset_with_beam
from ibq_jax.data.beam_map import find_beam
from ibq_jax.data.preprocess import decode_image, resize_shorter_side, views
from ibq_jax.data.sources import ImageCollection
from ibq_jax.data.store import load, write_dataset
from ibq_jax.data.tar_shards import _labels, tar_shards
from ibq_jax.tokenizer.step import TokenizerTrainer

PHOTOGRAPHS = ("astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg", "motorcycle_left.png")
SIZES = {"256 x 256": (256, 256, 95), "375 x 500": (375, 500, 98)}  # height, width, JPEG quality
SHARDS, PASSES = 8, 3
CONFIG = Path(__file__).parents[2] / "configs" / "tokenizer.py"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=1600)
    parser.add_argument("--encoder", action="store_true")
    arguments = parser.parse_args()
    if arguments.encoder:
        count_encoder()
        return
    for name, size in SIZES.items():
        with tempfile.TemporaryDirectory() as folder:
            total = write_shards(Path(folder, "in"), arguments.images, *size)
            print(f"{name} pixels, {total / arguments.images:,.0f} bytes an image:")
            measure(Path(folder), arguments.images)


def write_shards(folder: Path, images: int, height: int, width: int, quality: int) -> int:
    """Returns the bytes of all images."""
    data = Path(skimage.__file__).parent / "data"
    photographs = [Image.open(data / name).convert("RGB") for name in PHOTOGRAPHS]
    rng, total = np.random.default_rng(0), 0
    folder.mkdir()
    for shard in range(SHARDS):
        with tarfile.open(folder / f"{shard:03}.tar", "w") as tar:
            for number in range(shard, images, SHARDS):
                content = window(photographs[number % len(photographs)], height, width, quality, rng)
                total += len(content)
                for suffix, member in (("jpg", content), ("cls", b"%d" % (number % 100))):
                    info = tarfile.TarInfo(f"{number:08}.{suffix}")
                    info.size = len(member)
                    tar.addfile(info, io.BytesIO(member))
    return total


def window(photograph: Image.Image, height: int, width: int, quality: int, rng: np.random.Generator) -> bytes:
    """A part of the photograph, scaled to the size, as a JPEG file."""
    largest = min(photograph.width / width, photograph.height / height)
    scale = rng.uniform(0.6, 1) * largest
    left = rng.uniform(0, photograph.width - scale * width)
    top = rng.uniform(0, photograph.height - scale * height)
    box = (left, top, left + scale * width, top + scale * height)
    file = io.BytesIO()
    photograph.resize((width, height), Image.Resampling.BICUBIC, box).save(file, "JPEG", quality=quality)
    return file.getvalue()


def measure(folder: Path, images: int) -> None:
    pattern, cores = str(folder / "in" / "*.tar"), f"{os.cpu_count()} cores"
    with contextlib.redirect_stderr(io.StringIO()):
        collection = tar_shards(pattern, "timed", 0.05)
    encoded = [example.read() for example in collection.examples()]

    def say(what: str, work: Callable[[], object], clock: Callable[[], float] = time.process_time) -> None:
        print(f"  {what}: {images / best(work, clock):,.0f} images/s", flush=True)

    say("a core, first pass (labels)", lambda: [_labels(part) for part in collection.parts])
    say("a core, reading the tars", lambda: [example.read() for example in collection.examples()])
    say("a core, reading and decoding", lambda: [load(example) for example in collection.examples()])
    say("a core, the whole second pass", lambda: second_pass(collection, folder))
    say("a core, decoded and resized to 256, one crop", lambda: crops(encoded, 256, ("centre",)))
    say("a core, decoded and resized to 282, ten crops", lambda: crops(encoded, 282, ("ten_crop",)))
    say(f"{cores}, prepare", lambda: prepare(pattern, folder), time.perf_counter)
    shards = (folder / "data" / "timed" / "1.0.0").glob("*.array_record-*")
    print(f"  stored: {sum(path.stat().st_size for path in shards) / images:,.0f} bytes an image")
    if importlib.util.find_spec("apache_beam"):
        runner = find_beam("DirectRunner")
        whole = best(lambda: with_beam(pattern, folder, runner), time.perf_counter)
        part = best(lambda: with_beam(str(folder / "in" / "00[01].tar"), folder, runner), time.perf_counter)
        rate = images * (1 - 2 / SHARDS) / (whole - part)
        print(f"  {cores}, prepare --beam: {rate:,.0f} images/s after a start of {whole - images / rate:.1f} s")


def second_pass(collection: ImageCollection, folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder) as out:
        writer = _ShardWriter(collection, Path(out))
        for number, part in enumerate(collection.parts):
            writer((number, part))


def crops(encoded: list[bytes], resize: int, names: tuple[str, ...]) -> None:
    for content in encoded:
        views(resize_shorter_side(decode_image(content), resize), names, 256)


def prepare(pattern: str, folder: Path) -> None:
    write_dataset(tar_shards(pattern, "timed", 0.05), folder / "data", {}, overwrite=True)


def with_beam(pattern: str, folder: Path, runner) -> None:
    collect = functools.partial(tar_shards, pattern, "timed", 0.05)
    write_dataset_with_beam(collect, "timed", folder / "beam", {}, runner, overwrite=True)


def best(work: Callable[[], object], clock: Callable[[], float]) -> float:
    """Seconds of the quickest pass."""
    times = []
    with contextlib.redirect_stderr(io.StringIO()):  # progress bars
        for _ in range(PASSES):
            start = clock()
            work()
            times.append(clock() - start)
    return min(times)


def count_encoder() -> None:
    for preset in ("imagenet256_16384", "imagenet256_262144"):
        config = load_config(f"{CONFIG}:{preset}", ["--config.mesh.codebook=1"])
        trainer = TokenizerTrainer(config, make_mesh({"data": 1}, jax.devices()[:1]), steps_per_epoch=1)
        params = jax.eval_shape(trainer.create_state, 0).params
        image = jax.ShapeDtypeStruct((1, 256, 256, 3), np.float32)
        latent = jax.jit(
            lambda params, image, model=trainer.model: model.apply({"params": params}, image, method="latent")
        )
        encoder = latent.lower(params, image).cost_analysis()["flops"]
        tokens = np.prod(jax.eval_shape(latent, params, image).shape[:-1])
        search = 2 * tokens * config.codebook.size * config.codebook.dim  # in a loop, which XLA would count once
        print(f"{preset}: encoder {encoder / 1e9:,.0f} GFLOP an image, search of the codes {search / 1e9:,.1f} GFLOP")


if __name__ == "__main__":
    main()
