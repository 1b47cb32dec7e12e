"""ImageNet 2012 from its two standard tars, as TFDS lays it out.

TFDS's own builder needs TensorFlow to look for the tars, so the tars are read here; name, version, splits, features and
the order of the classes are TFDS's, and a copy that TFDS made in ArrayRecord form is read by the same code.
"""

import functools
import os
import re
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from ibq_jax.base.errors import UsageError
from ibq_jax.data.sources import Collection, Example, read_bounded

TRAIN_TAR = "ILSVRC2012_img_train.tar"
VALIDATION_TAR = "ILSVRC2012_img_val.tar"
EXPECTED_IMAGES = {"train": 1_281_167, "validation": 50_000}
_TFDS_FILES = "datasets/imagenet2012"


def imagenet2012(tars: str | os.PathLike) -> Collection:
    """ImageNet's training and validation images, read in place from the two tars in the folder `tars`.

    Labels 0..999 number the synsets (n01440764 first). Images keep their bytes, the few CMYK and PNG ones included.

    Raises:
        UsageError: a tar is missing; while reading, one that is broken or holds something else.
    """
    folder = Path(tars)
    missing = [name for name in (TRAIN_TAR, VALIDATION_TAR) if not (folder / name).is_file()]
    if missing:
        raise UsageError(
            f"{folder} lacks {' and '.join(missing)}: download them from https://image-net.org/download-images "
            "(it asks for an account) and put them there, packed as they are"
        )
    synsets = tfds.core.tfds_path(f"{_TFDS_FILES}/labels.txt").read_text().split()
    validation = tfds.core.tfds_path(f"{_TFDS_FILES}/validation_labels.txt").read_text().split()
    label_of = {synset: label for label, synset in enumerate(synsets)}

    def examples() -> Iterator[Example]:
        yield from _whole(folder / TRAIN_TAR, _training_examples, label_of)
        yield from _whole(folder / VALIDATION_TAR, _validation_examples, [label_of[synset] for synset in validation])

    return Collection(
        name="imagenet2012",
        version="5.1.0",
        description="ILSVRC 2012: photographs of 1,000 kinds of things (image-net.org).",
        examples=examples,
        class_names=tuple(synsets),
        total=sum(EXPECTED_IMAGES.values()),
        homepage="https://image-net.org/",
        citation="Russakovsky et al., ImageNet Large Scale Visual Recognition Challenge, IJCV 2015",
        license="https://image-net.org/download (non-commercial research and education)",
    )


def _whole(path: Path, read: Callable[[tarfile.TarFile, Any], Iterator[Example]], labels: Any) -> Iterator[Example]:
    try:
        with tarfile.open(path, "r:") as tar:
            yield from read(tar, labels)
    except tarfile.TarError as error:
        raise UsageError(f"{path} is broken ({error}): download it again") from error


def _training_examples(tar: tarfile.TarFile, label_of: dict[str, int]) -> Iterator[Example]:
    """The training tar holds one tar a synset, e.g. n01440764.tar."""
    for member in filter(tarfile.TarInfo.isfile, tar):
        synset = member.name.removesuffix(".tar")
        if synset not in label_of:
            raise UsageError(f"{tar.name} holds {member.name!r}, which is no ILSVRC 2012 synset")
        with tarfile.open(fileobj=tar.extractfile(member), mode="r:") as images:
            for image in filter(tarfile.TarInfo.isfile, images):
                yield _example("train", images, image, label_of[synset])


def _validation_examples(tar: tarfile.TarFile, labels: list[int]) -> Iterator[Example]:
    for image in filter(tarfile.TarInfo.isfile, tar):
        number = re.search(r"ILSVRC2012_val_(\d{8})\.JPEG$", image.name)
        if not number or not 1 <= int(number[1]) <= len(labels):
            raise UsageError(f"{tar.name} holds {image.name!r}, which is no ILSVRC 2012 validation image")
        yield _example("validation", tar, image, labels[int(number[1]) - 1])


def _example(split: str, tar: tarfile.TarFile, image: tarfile.TarInfo, label: int) -> Example:
    encoded = read_bounded(tar.extractfile(image))
    return Example(split, image.name.rpartition("/")[2], functools.partial(bytes, encoded), label)
