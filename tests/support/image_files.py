"""Small image files, archives and data sets of noise."""

import io
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from ibq_jax.data import store
from ibq_jax.data.imagenet import TRAIN_TAR, VALIDATION_TAR
from ibq_jax.data.sources import Example, ImageCollection

COUNT = 23  # images of `noise_collection`


def encode(image: Image.Image, form: str = "PNG", **options) -> bytes:
    """Returns an image's file."""
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def noise(seed: int, height: int, width: int) -> np.ndarray:
    """Returns random pixels, uint8 [height, width, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def noise_file(seed: int, height: int = 16, width: int = 20, form: str = "PNG") -> bytes:
    """Returns the file of an image of noise."""
    return encode(Image.fromarray(noise(seed, height, width)), form)


def noise_png(index: int) -> bytes:
    """Returns image `index` of `noise_collection`, of 14 to 16 x 20 pixels."""
    return noise_file(index, 14 + index % 3)


def noise_collection(
    name: str, count: int = COUNT, classes: int = 5, read: Callable[[int], bytes] = noise_png
) -> ImageCollection:
    """Returns `count` training images in `classes` classes, in turn; 0 classes means no labels."""

    def examples():
        for i in range(count):
            yield Example("train", f"{i}.png", lambda i=i: read(i), i % classes if classes else None)

    return ImageCollection(name, "noise", examples, class_names=tuple("abcde"[:classes]))


def write_noise(name: str, data_dir: Path, **options) -> Path:
    """Writes the data set `noise_collection` and returns its folder."""
    return store.write_dataset(noise_collection(name, **options), data_dir, {}).path


def write_tar(path: Path, members: Iterable[tuple[str, bytes]], mode: str = "w") -> Path:
    """Writes a tar of (name, content) members and returns its path."""
    with tarfile.open(path, mode) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def fake_imagenet(folder: Path) -> Path:
    """Writes ImageNet's two tars with four training images of two synsets and three validation images."""
    jpeg = noise_file(0, form="JPEG")
    synsets = []
    for synset in ("n01443537", "n01440764"):
        inner = write_tar(folder / f"{synset}.tar", [(f"{synset}_{i}.JPEG", jpeg) for i in range(2)])
        synsets.append((inner.name, inner.read_bytes()))
    write_tar(folder / TRAIN_TAR, synsets)
    write_tar(folder / VALIDATION_TAR, [(f"ILSVRC2012_val_{number:08}.JPEG", jpeg) for number in (3, 1, 50_000)])
    return folder
