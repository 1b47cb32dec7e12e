"""What a data set is built from: a stream of encoded images with names, splits and, perhaps, classes.

Every kind of source is a module that returns an `ImageCollection`; `store.write_dataset` makes a TFDS data set of any.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ibq_jax.base.errors import UsageError, printable

IMAGE_SUFFIXES = frozenset({"jpg", "jpeg", "png", "webp", "bmp"})
MAX_ENCODED_BYTES = 2**28  # no photograph's file is larger, and a hostile one can be any size

# Maps a function that gives JSON values over files, in order: `map`, or something that runs it on many machines.
ParallelMap = Callable[[Callable[[Path], Any], Sequence[Path]], Iterable[Any]]


@dataclass(frozen=True)
class Example:
    """One image to store. `read` returns its encoded bytes, or raises OSError or UnreadableImage."""

    split: str
    name: str  # tells a person which image it is
    read: Callable[[], bytes]
    label: int | None = None  # position in the collection's class_names


@dataclass(frozen=True)
class ImageCollection:
    """A data set that can be built: who it is, and a stream of its examples.

    The stream also comes in `parts`, for workers that share it: `read_part` of one after another gives all of it.
    """

    name: str
    description: str
    examples: Callable[[], Iterable[Example]]
    class_names: tuple[str, ...] = ()  # empty: the images have no classes
    total: int | None = None  # examples in the stream, where known beforehand
    version: str = "1.0.0"
    homepage: str = ""
    citation: str = ""
    license: str = ""
    parts: tuple[Any, ...] = ()  # small, picklable, and known by their repr; Paths where they are files
    read_part: Callable[[Any], Iterable[Example]] = iter  # picklable


def read_bounded(file: BinaryIO, limit: int = MAX_ENCODED_BYTES) -> bytes:
    """The rest of `file`, but no more than `limit` bytes and one, by which an oversized one is known."""
    return file.read(limit + 1)


def class_names_to_store(names: Iterable[str], where: object) -> tuple[str, ...]:
    """`names` as `printable` shows them. Raises UsageError for those that a data set's file of names, a name a line
    without blanks around it, cannot tell apart."""
    shown = tuple(printable(name) for name in names)
    for before, name in zip((None, *sorted(shown)), sorted(shown), strict=False):
        if name == before or name != name.strip() or not name:
            what = "is another's, once control characters are escaped" if name == before else "is empty or padded"
            raise UsageError(f"{where}: the class name {name!r} {what}; rename it")
    return shown


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
