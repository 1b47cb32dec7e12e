"""Tar shards in the webdataset layout: neighbouring members that share a key, their name up to its first dot.

Members are read in place. Nothing is unpacked, so a member's name never becomes a path.
"""

import contextlib
import functools
import glob
import itertools
import json
import os
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from ibq_jax.base.errors import UsageError
from ibq_jax.data.preprocess import UnreadableImage
from ibq_jax.data.sources import (
    IMAGE_SUFFIXES,
    MAX_ENCODED_BYTES,
    Collection,
    Example,
    is_held_out,
    printable,
    read_bounded,
)

LABEL_SUFFIXES = frozenset({"cls", "json"})
MAX_LABEL_BYTES = 2**20
MAX_CLASSES = 2**20
BROKEN_TAR = (tarfile.TarError, OSError, EOFError, zlib.error)

Label = int | str | None  # as written in a shard


def tar_shards(pattern: str, name: str, validation: float = 0.05) -> Collection:
    """The images of every shard that matches `pattern`, e.g. "shards/*.tar", in the order of the shards' names.

    A sample is an image (.jpg .jpeg .png .webp .bmp) and, for its class, a .cls (a number or a name) or a .json with
    "label" or "cls"; other members are passed over. Numbers stay as they are, names are numbered in their order: a
    first pass over the shards collects them, a second reads the images. The fraction `validation` is held out, by the
    hashes of shard and key. A shard that breaks off counts as one unreadable image; what precedes the break is kept.

    Raises:
        UsageError: no shard, no images in them, or samples with a number, with a name or with no label side by side.
    """
    shards = [Path(path) for path in sorted(glob.glob(os.path.expanduser(pattern), recursive=True))]
    if not shards:
        raise UsageError(f"no file matches {pattern}")
    total, seen = _survey(shards)
    if not total:
        raise UsageError(f"the {len(shards)} shards of {pattern} hold no images")
    class_names = _class_names(seen)
    label_of: dict[Label, int | None] = {class_name: label for label, class_name in enumerate(class_names)}
    label_of |= {label: label for label in seen if not isinstance(label, str)}

    def examples() -> Iterator[Example]:
        for shard in shards:
            yield from _examples(shard, label_of, validation)

    return Collection(
        name=name,
        description=f"The images of {len(shards)} tar shards.",
        examples=examples,
        class_names=tuple(printable(class_name) for class_name in class_names),
        total=total,
    )


def _survey(shards: list[Path]) -> tuple[int, dict[Label, str]]:
    """The number of images, and every label that occurs with the first sample that has it."""
    total, seen = 0, {}
    for shard in tqdm(shards, desc="reading labels", unit=" shards", dynamic_ncols=True):
        with contextlib.suppress(*BROKEN_TAR):  # the second pass reports it
            for key, sample in _samples(shard, LABEL_SUFFIXES):
                if _image_suffix(sample):
                    total += 1
                    seen.setdefault(_label(sample), f"{shard.name}:{key}")
    return total, seen


def _class_names(seen: dict[Label, str]) -> tuple[str, ...]:
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
    except BROKEN_TAR as error:
        yield Example("train", shard.name, functools.partial(_break_off, str(error)))


def _break_off(reason: str) -> bytes:
    raise UnreadableImage(f"the shard breaks off: {reason}")


def _samples(shard: Path, wanted: frozenset[str]) -> Iterator[tuple[str, dict[str, bytes]]]:
    """(key, suffix -> contents) of each sample; contents of a suffix that is not wanted are empty."""
    with tarfile.open(shard) as tar:
        named = ((*_key_and_suffix(member.name), member) for member in tar if member.isfile())
        for key, members in itertools.groupby(named, key=lambda entry: entry[0]):
            sample = {}
            for _, suffix, member in members:
                limit = MAX_LABEL_BYTES if suffix in LABEL_SUFFIXES else MAX_ENCODED_BYTES
                sample[suffix] = read_bounded(tar.extractfile(member), limit) if suffix in wanted else b""
            yield key, sample


def _key_and_suffix(member: str) -> tuple[str, str]:
    folder, slash, file = member.rpartition("/")
    stem, _, suffix = file.partition(".")
    return folder + slash + stem, suffix.lower()


def _image_suffix(sample: dict[str, bytes]) -> str | None:
    return next((suffix for suffix in sample if suffix in IMAGE_SUFFIXES), None)


def _label(sample: dict[str, bytes]) -> Label:
    if "cls" in sample:
        text = sample["cls"].decode("utf-8", "replace").strip()
        return int(text) if text.isdecimal() else text
    try:
        described = json.loads(sample.get("json", b"null"))
    except (ValueError, RecursionError):
        return None
    label = described.get("label", described.get("cls")) if isinstance(described, dict) else None
    return label if type(label) in (int, str) else None
