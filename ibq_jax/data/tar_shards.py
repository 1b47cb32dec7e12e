"""Tar shards in the webdataset layout: neighbouring members that share a key are what webdataset calls a sample.

Here a sample is an image with its label. The key is the member's name up to its first dot. Members are read in place;
nothing is unpacked, so a member's name never becomes a path.
"""

import contextlib
import functools
import glob
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ibq_jax.base.errors import UsageError
from ibq_jax.base.json_files import parse_json
from ibq_jax.data.preprocess import UnreadableImage
from ibq_jax.data.sources import (
    IMAGE_SUFFIXES,
    MAX_ENCODED_BYTES,
    Example,
    ImageCollection,
    ParallelMap,
    class_names_to_store,
    is_held_out,
    printable,
)
from ibq_jax.data.tar_reader import BrokenTar, members, open_stream

LABEL_SUFFIXES = frozenset({"cls", "json"})
MAX_LABEL_BYTES = 2**20
MAX_CLASSES = 2**20
MAX_LABEL_CHARACTERS = 256

Label = int | str | None  # as written in a shard


def tar_shards(pattern: str, name: str, validation: float = 0.05, parallel_map: ParallelMap = map) -> ImageCollection:
    """Returns the images of every shard that matches `pattern`, in the order of the shards' names.

    A sample is an image (.jpg .jpeg .png .webp .bmp) and, for its class, a .cls (a number or a name) or a .json with
    "label" or "cls"; other members are skipped. Labels that are numbers are used as they are; names are numbered in
    sorted order. A first pass over the shards collects the labels, a second reads the images. A truncated shard counts
    as one unreadable image; the samples before the break are kept.

    Args:
        pattern: glob pattern of the shards' paths, such as "shards/*.tar".
        name: the collection's name.
        validation: the fraction to hold out, chosen by the hashes of shard and key.
        parallel_map: runs the first pass. Each shard is a part of the collection.

    Raises:
        UsageError: there are no shards or no images; samples with numbers, with names and without labels are mixed; or
            a label cannot be a class.
    """
    shards = [Path(path) for path in sorted(glob.glob(os.path.expanduser(pattern), recursive=True))]
    if not shards:
        raise UsageError(f"no file matches {pattern}")
    total, seen = _survey(shards, parallel_map)
    if not total:
        raise UsageError(f"the {len(shards)} shards of {pattern} hold no images")
    class_names = _class_names(seen)
    label_of: dict[Label, int | None] = {class_name: label for label, class_name in enumerate(class_names)}
    label_of |= {label: label for label in seen if not isinstance(label, str)}
    read_part = functools.partial(_examples, label_of=label_of, validation=validation)

    return ImageCollection(
        name=name,
        description=f"The images of {len(shards)} tar shards.",
        examples=lambda: itertools.chain.from_iterable(map(read_part, shards)),
        class_names=class_names_to_store(class_names, pattern),
        total=total,
        parts=tuple(shards),
        read_part=read_part,
    )


def _survey(shards: list[Path], parallel_map: ParallelMap) -> tuple[int, dict[Label, str]]:
    """Returns the number of images, and every label with the first sample that has it."""
    total, seen = 0, {}
    found = parallel_map(_labels, shards)
    for images, labels in tqdm(found, "reading labels", len(shards), unit=" shards", dynamic_ncols=True):
        total += images
        for label, where in labels:
            _note(seen, label, where)
    return total, seen


def _labels(shard: Path) -> tuple[int, list[tuple[Label, str]]]:
    """Returns the number of images in a shard, and every label with the first sample that has it."""
    images, seen = 0, {}
    with contextlib.suppress(BrokenTar):  # the second pass reports it
        for key, sample in _samples(shard, LABEL_SUFFIXES):
            if _image_suffix(sample):
                images += 1
                where = f"{shard.name}:{key}"
                _note(seen, _checked(_label(sample), where), where)
    return images, list(seen.items())


def _note(seen: dict[Label, str], label: Label, where: str) -> None:
    seen.setdefault(label, where)
    if len(seen) > MAX_CLASSES:
        raise UsageError(f"there are over {MAX_CLASSES} labels, the last at {printable(where)}")


def _checked(label: Label, where: str) -> Label:
    if len(str(label)) > MAX_LABEL_CHARACTERS:
        raise UsageError(
            f"label {str(label)[:20]!r}... at {printable(where)} has {len(str(label))} characters; the limit is "
            f"{MAX_LABEL_CHARACTERS}"
        )
    return label


def _class_names(seen: dict[Any, str]) -> tuple[str, ...]:
    kinds = {type(label): label for label in seen}
    if len(kinds) > 1:
        found = " and ".join(f"{label!r} at {printable(seen[label])}" for label in kinds.values())
        raise UsageError(f"labels have to be all numbers, all names or all absent (None), but there is {found}")
    if None in seen:
        return ()
    if str in kinds:
        return tuple(sorted(seen))
    outside = [label for label in seen if not 0 <= label < MAX_CLASSES]
    if outside:
        raise UsageError(f"label {outside[0]} at {printable(seen[outside[0]])} is not in 0..{MAX_CLASSES - 1}")
    return tuple(str(label) for label in range(max(seen) + 1))


def _examples(shard: Path, label_of: dict[Label, int | None], validation: float) -> Iterator[Example]:
    try:
        for key, sample in _samples(shard, LABEL_SUFFIXES | IMAGE_SUFFIXES):
            if suffix := _image_suffix(sample):
                name = f"{shard.name}:{key}.{suffix}"
                split = "validation" if is_held_out(name, validation) else "train"
                yield Example(split, name, functools.partial(bytes, sample[suffix]), label_of[_label(sample)])
    except BrokenTar as error:
        yield Example("train", shard.name, functools.partial(_break_off, str(error)))


def _break_off(reason: str) -> bytes:
    raise UnreadableImage(f"the rest of the shard is unreadable: {reason}")


def _samples(shard: Path, wanted: frozenset[str]) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yields (key, {suffix: content}) of each sample; the content of an unwanted image is empty.

    As in `sources.read_bounded`, an extra byte marks an oversized member.
    """
    with open_stream(shard) as stream:
        named = ((*key_and_suffix(member.name), member) for member in members(stream))
        for key, parts in itertools.groupby(named, key=lambda entry: entry[0]):
            sample = {}
            for _, suffix, member in parts:
                limit = MAX_LABEL_BYTES if suffix in LABEL_SUFFIXES else MAX_ENCODED_BYTES
                if suffix in LABEL_SUFFIXES | IMAGE_SUFFIXES:
                    sample[suffix] = member.read(limit + 1) if suffix in wanted else b""
            yield key, sample


def key_and_suffix(member: str) -> tuple[str, str]:
    """Returns the part of a name up to the first dot behind its folders, and the rest in lower case."""
    folder, slash, file = member.rpartition("/")
    stem, _, suffix = file.partition(".")
    return folder + slash + stem, suffix.lower()


def _image_suffix(sample: dict[str, bytes]) -> str | None:
    return next((suffix for suffix in sample if suffix in IMAGE_SUFFIXES), None)


def _label(sample: dict[str, bytes]) -> Label:
    if "cls" in sample:
        text = sample["cls"].decode("utf-8", "replace").strip()
        return int(text) if text.isdecimal() and len(text) <= MAX_LABEL_CHARACTERS else text
    try:
        described = parse_json(sample.get("json", b"null"))
    except ValueError:
        return None
    label = described.get("label", described.get("cls")) if isinstance(described, dict) else None
    return label if type(label) in (int, str) else None
