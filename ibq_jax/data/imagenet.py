"""ImageNet 2012 from its two standard tars, in the layout of TFDS.

TFDS's own builder needs TensorFlow to find the tars, so they are read here. Name, version, splits, features and the
order of the classes are those of TFDS, and a copy that TFDS made in ArrayRecord form is read by the same code.
"""

import functools
import itertools
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import tensorflow_datasets as tfds

from ibq_jax.base.errors import UsageError
from ibq_jax.data.sources import MAX_ENCODED_BYTES, Example, ImageCollection
from ibq_jax.data.tar_reader import BrokenTar, Member, members, open_stream

TRAIN_TAR = "ILSVRC2012_img_train.tar"
VALIDATION_TAR = "ILSVRC2012_img_val.tar"
EXPECTED_IMAGES = {"train": 1_281_167, "validation": 50_000}
_TFDS_FILES = "datasets/imagenet2012"
SYNSETS_PER_PART, IMAGES_PER_PART = 8, 10_000  # about 10,000 images each


class _Part(NamedTuple):
    split: str
    tar: Path
    first: int  # index of its first member in the tar
    stop: int | None  # index after its last member; None: the end of the tar


def imagenet2012(tars: str | os.PathLike) -> ImageCollection:
    """Returns ImageNet's training and validation images, read in place from the two tars in the folder `tars`.

    Labels 0..999 number the synsets (n01440764 first). Images keep their bytes, including the few CMYK and PNG ones.

    Raises:
        UsageError: a tar is missing; while reading, a tar is broken or holds something else.
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

    read_part = functools.partial(_examples, label_of=label_of, validation=[label_of[synset] for synset in validation])
    train = _parts("train", folder / TRAIN_TAR, len(synsets), SYNSETS_PER_PART)
    held_out = _parts("validation", folder / VALIDATION_TAR, len(validation), IMAGES_PER_PART)

    def examples() -> Iterator[Example]:
        for part in (train[0], held_out[0]):
            yield from read_part(part._replace(stop=None))

    return ImageCollection(
        name="imagenet2012",
        version="5.1.0",
        description="ILSVRC 2012: photographs of 1,000 kinds of objects (image-net.org).",
        examples=examples,
        class_names=tuple(synsets),
        total=sum(EXPECTED_IMAGES.values()),
        homepage="https://image-net.org/",
        citation="Russakovsky et al., ImageNet Large Scale Visual Recognition Challenge, IJCV 2015",
        license="https://image-net.org/download (non-commercial research and education)",
        parts=(*train, *held_out),
        read_part=read_part,
    )


def _parts(split: str, tar: Path, count: int, size: int) -> list[_Part]:
    parts = [_Part(split, tar, first, first + size) for first in range(0, count, size)]
    return [*parts[:-1], parts[-1]._replace(stop=None)]


def _examples(part: _Part, label_of: dict[str, int], validation: list[int]) -> Iterator[Example]:
    try:
        with open_stream(part.tar) as stream:
            found = itertools.islice(members(stream), part.first, part.stop)  # earlier members are skipped unread
            if part.split == "train":
                yield from _training_examples(found, part.tar, label_of)
            else:
                yield from _validation_examples(found, part.tar, validation)
    except BrokenTar as error:
        raise UsageError(f"{part.tar} is broken ({error}): download it again") from error


def _training_examples(found: Iterator[Member], path: Path, label_of: dict[str, int]) -> Iterator[Example]:
    """Yields the images of the training tar, which holds one tar per synset, such as n01440764.tar."""
    for member in found:
        synset = member.name.removesuffix(".tar")
        if synset not in label_of:
            raise UsageError(f"{path} holds {member.name!r}, which is not an ILSVRC 2012 synset")
        for image in members(member):
            yield _example("train", image, label_of[synset])


def _validation_examples(found: Iterator[Member], path: Path, labels: list[int]) -> Iterator[Example]:
    for image in found:
        number = re.search(r"ILSVRC2012_val_(\d{8})\.JPEG$", image.name)
        if not number or not 1 <= int(number[1]) <= len(labels):
            raise UsageError(f"{path} holds {image.name!r}, which is not an ILSVRC 2012 validation image")
        yield _example("validation", image, labels[int(number[1]) - 1])


def _example(split: str, image: Member, label: int) -> Example:
    encoded = image.read(MAX_ENCODED_BYTES + 1)  # the extra byte marks an oversized image
    return Example(split, image.name.rpartition("/")[2], functools.partial(bytes, encoded), label)
