"""What a data set is built from: a stream of encoded images with names, splits and, perhaps, classes.

Each kind of source is a module that returns a `Collection`; `store.write_dataset` makes a TFDS data set of any.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import BinaryIO

IMAGE_SUFFIXES = frozenset({"jpg", "jpeg", "png", "webp", "bmp"})
MAX_ENCODED_BYTES = 2**28  # no photograph's file is larger, and a hostile one can be any size


@dataclass(frozen=True)
class Example:
    """One image to store. `read` returns its encoded bytes, or raises OSError or UnreadableImage."""

    split: str
    name: str  # tells a person which image it is
    read: Callable[[], bytes]
    label: int | None = None  # position in the collection's class_names


@dataclass(frozen=True)
class Collection:
    """A data set that can be built: who it is, and a stream of its examples."""

    name: str
    description: str
    examples: Callable[[], Iterable[Example]]
    class_names: tuple[str, ...] = ()  # empty: the images have no classes
    total: int | None = None  # examples in the stream, where known beforehand
    version: str = "1.0.0"
    homepage: str = ""
    citation: str = ""
    license: str = ""


def read_bounded(file: BinaryIO, limit: int = MAX_ENCODED_BYTES) -> bytes:
    """The rest of `file`, but no more than `limit` bytes and one, by which an oversized one is known."""
    return file.read(limit + 1)


def printable(name: str) -> str:
    """`name` with control characters and undecodable bytes escaped, fit for a terminal and for UTF-8."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in name)


def _name_hash(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()[:8], "big")


def is_held_out(name: str, fraction: float) -> bool:
    """Whether an image belongs to validation, by its name alone: for streams too long to list."""
    return _name_hash(name) < fraction * 2**64


def held_out(names_by_class: Mapping[int | None, Iterable[str]], fraction: float) -> frozenset[str]:
    """The names that make up validation: of every class the `fraction` whose hashes are lowest.

    The choice depends on nothing but the names. A class of two or more images gives at least one and never all.
    """
    chosen: set[str] = set()
    for names in names_by_class.values():
        ranked = sorted(names, key=_name_hash)
        if fraction > 0 and len(ranked) > 1:
            chosen.update(ranked[: min(max(1, round(fraction * len(ranked))), len(ranked) - 1)])
    return frozenset(chosen)
