"""Images for training and evaluation, from a TFDS data set in ArrayRecord form.

Shapes: b, the rows of a global batch that this process reads; S, the side of a crop in pixels.
`ibq_jax.data.batches` describes how the order and the crops follow from the seed and the step.
"""

import functools
import os
import resource
from collections.abc import Generator
from typing import Any, TypedDict, Unpack

import numpy as np
import tensorflow_datasets as tfds

from ibq_jax.base.errors import UsageError, one_line
from ibq_jax.data.batches import (
    NO_LABEL,
    ArrayDict,
    OnePassOptions,
    ShuffledOptions,
    Source,
    one_pass_batches,
    shuffled_batches,
)
from ibq_jax.data.preprocess import (
    Resize,
    UnreadableImage,
    centre_crop,
    decode_image,
    random_crop,
    resize_shorter_side,
)
from ibq_jax.data.store import find_dataset, open_builder

OTHER_FILES = 256  # open files that a process needs besides a data set's shards


class Record(TypedDict):
    """One stored example, still encoded."""

    image: bytes
    label: int  # NO_LABEL in a data set without classes
    index: int  # its index in the split


class ImageSource(Source):
    """A split of a data set; `source[i]` is a Record."""

    def __init__(self, name: str, data_dir: str | os.PathLike, split: str, builder: tfds.core.DatasetBuilder):
        self.name, self.data_dir, self.split = name, data_dir, split
        as_data_source: Any = builder.as_data_source  # a decorator of TFDS hides its arguments from the type checker
        self._records = as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
        features: Any = builder.info.features
        has_classes = "label" in features and isinstance(features["label"], tfds.features.ClassLabel)
        self.class_names = tuple(features["label"].names) if has_classes else ()

    def __getitem__(self, index: int) -> Record:
        try:
            record = self._records[index]
            label = int(record["label"]) if self.class_names else NO_LABEL
        except Exception as error:  # ArrayRecord, protobuf and TFDS raise errors of their own kinds
            reason = one_line(error)
            raise UsageError(f"{self}, record {index} is damaged ({reason}): prepare it with --overwrite") from error
        return Record(image=record["image"], label=label, index=index)

    def __str__(self) -> str:
        return f"data set {self.name} in {os.path.abspath(self.data_dir)}, split {self.split!r}"

    def __reduce__(self):
        return open_split, (self.name, self.data_dir, self.split)


def _allow_open_files(shards: int, what: str) -> None:
    """Increases the limit on open files, by default 1,024, because ArrayRecord keeps every shard open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or shards + OTHER_FILES <= soft:
        return
    if hard != resource.RLIM_INFINITY and shards + OTHER_FILES > hard:
        raise UsageError(f"{what} has {shards} shards, and no process may open over {hard} files: raise ulimit -Hn")
    wanted = 2 * shards + OTHER_FILES  # for a second split too
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))


def open_split(name: str, data_dir: str | os.PathLike, split: str) -> ImageSource:
    """Opens a split of a data set, such as "train", or a TFDS slice, such as "train[:90%]".

    Raises:
        UsageError: the data set is not in `data_dir`, is damaged, is not in ArrayRecord form, or has no such split or
            no images in it.
    """
    path = find_dataset(name, data_dir)
    if path is None:
        sources = {
            "openmoji": "openmoji",
            "photos32": "photos --size=32",
            "photos64": "photos --size=64",
            "imagenet2012": "imagenet --tars=DIR",
        }
        source = sources.get(name, f"folder --in=DIR --name={name}")
        raise UsageError(
            f"no data set {name!r} in {os.path.abspath(data_dir)}: "
            f"make it with python -m ibq_jax prepare {source} --data-dir={data_dir}"
        )
    builder = open_builder(path)
    info: Any = builder.info
    if "image" not in info.features:
        raise UsageError(f"data set {path} has no images; it has {', '.join(info.features)}")
    if split.partition("[")[0] not in info.splits:
        raise UsageError(f"data set {path} has no split {split!r}; it has {', '.join(info.splits)}")
    try:
        images = info.splits[split].num_examples
    except ValueError as error:  # raised by TFDS for a malformed slice
        raise UsageError(f"data set {path} has no split {split!r}: {str(error).splitlines()[-1]}") from error
    if not images:
        raise UsageError(f"data set {path} has no images in split {split!r}")
    try:
        _allow_open_files(len(info.splits[split].file_instructions), f"data set {path}, split {split!r}")
        return ImageSource(name, data_dir, split, builder)
    except UsageError:
        raise
    except NotImplementedError as error:
        raise UsageError(f"data set {path} is in {info.file_format.value} form, not array_record") from error
    except (KeyError, OSError, RuntimeError, TypeError, ValueError) as error:  # if metadata do not fit the files
        raise UsageError(f"data set {path} is damaged ({one_line(error)}): prepare it with --overwrite") from error


def training_batches(
    source: ImageSource, *, image_size: int, resize: int, **options: Unpack[ShuffledOptions]
) -> Generator[ArrayDict]:
    """Returns endless batches of random crops, reshuffled every epoch.

    Args:
        source: the images.
        image_size: S, pixels of the crop's side.
        resize: pixels of the shorter side before cropping (antialiased).
        **options: as in `shuffled_batches`.

    Returns:
        an iterator over {"image": uint8 [b, S, S, 3], "label": int32 [b], "index": int64 [b], the record's index in
        the split}. Its close() ends the readers.

    Raises:
        UsageError: the sizes do not fit each other; while iterating, a record cannot be decoded.
    """
    check_sizes(image_size, resize)
    crop = functools.partial(_training_example, image_size=image_size, resize=resize, origin=str(source))
    return shuffled_batches(source, crop, **options)


def _training_example(record: Record, rng: np.random.Generator, *, image_size: int, resize: int, origin: str) -> dict:
    image = resize_shorter_side(decode_record(record, origin), resize)
    return _example(random_crop(image, image_size, rng), record)


def _example(image: np.ndarray, record: Record) -> dict:
    return {"image": image, "label": np.int32(record["label"]), "index": np.int64(record["index"])}


def evaluation_batches(
    source: ImageSource, *, image_size: int, resize: int, method: Resize = "bilinear", **options: Unpack[OnePassOptions]
) -> Generator[ArrayDict]:
    """Returns one pass over the images' centre crops, in order.

    Args:
        source: the images.
        image_size: S, pixels of the crop's side.
        resize: pixels of the shorter side before cropping.
        method: of resizing, see `resize_shorter_side`.
        **options: as in `one_pass_batches`.

    Returns:
        an iterator over the arrays of `training_batches` and "mask": bool [b]. The last batch is filled up with black
        images, label and index -1, mask False.

    Raises:
        UsageError: as `training_batches`.
    """
    check_sizes(image_size, resize)

    def crop(record: Record) -> dict:
        image = resize_shorter_side(decode_record(record, str(source)), resize, method)
        return _example(centre_crop(image, image_size), record)

    black = np.zeros((image_size, image_size, 3), np.uint8)
    padding = _example(black, Record(image=b"", label=NO_LABEL, index=-1))
    return one_pass_batches(source, crop, padding, **options)


def decode_record(record: Record, origin: str) -> np.ndarray:
    """Decodes a record's image -> uint8 [H, W, 3].

    Raises UsageError if that fails; the message names the record and the split that it is from, `origin`.
    """
    try:
        return decode_image(record["image"])
    except UnreadableImage as error:
        raise UsageError(f"{origin}, record {record['index']} is no image ({error}): prepare it again") from error


def check_sizes(image_size: int, resize: int) -> None:
    """Checks that a crop of `image_size` fits into an image whose shorter side is `resize`. Raises UsageError."""
    if image_size <= 0:
        raise UsageError(f"image_size={image_size}: it must be positive")
    if resize < image_size:
        raise UsageError(f"resize={resize} is smaller than image_size={image_size}: a crop would not fit")
