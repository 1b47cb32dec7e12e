"""Small image files and archives for the data room's tests."""

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from ibq_jax.data.imagenet import TRAIN_TAR, VALIDATION_TAR


def encode(image: Image.Image, form: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def noise(seed: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def noise_file(seed: int, height: int = 16, width: int = 20, form: str = "PNG") -> bytes:
    return encode(Image.fromarray(noise(seed, height, width)), form)


def write_tar(path: Path, members: Iterable[tuple[str, bytes]], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def fake_imagenet(folder: Path) -> Path:
    """The two standard tars with four training images of two synsets and three validation images."""
    jpeg = noise_file(0, form="JPEG")
    synsets = []
    for synset in ("n01443537", "n01440764"):
        inner = write_tar(folder / f"{synset}.tar", [(f"{synset}_{i}.JPEG", jpeg) for i in range(2)])
        synsets.append((inner.name, inner.read_bytes()))
    write_tar(folder / TRAIN_TAR, synsets)
    write_tar(folder / VALIDATION_TAR, [(f"ILSVRC2012_val_{number:08}.JPEG", jpeg) for number in (3, 1, 50_000)])
    return folder
