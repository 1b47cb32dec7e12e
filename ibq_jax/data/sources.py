"""Collections of images that data sets are built from: encoded images with names, splits and optional classes.

Each kind of source has a module that returns an `ImageCollection`; `store.write_dataset` makes a TFDS data set of it.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ibq_jax.base.errors import UsageError, printable

IMAGE_SUFFIXES = frozenset({"jpg", "jpeg", "png", "webp", "bmp"})
MAX_ENCODED_BYTES = 2**28  # larger than any photograph; a hostile file can have any size

# Applies a function that returns JSON values to files, in order: `map`, or a map that runs on many machines.
ParallelMap = Callable[[Callable[[Path], Any], Sequence[Path]], Iterable[Any]]


@dataclass(frozen=True)
class Example:
    """One image to store. `read` returns its encoded bytes, or raises OSError or UnreadableImage."""

    split: str
    name: str  # identifies the image in messages
    read: Callable[[], bytes]
    label: int | None = None  # position in the collection's class_names; NO_LABEL: of none of them; None: no classes


@dataclass(frozen=True)
class ImageCollection:
    """A data set that can be built: its description and a stream of its examples.

    Workers can share the stream by its `parts`: `read_part` of each part in turn yields all examples.
    """

    name: str
    description: str
    examples: Callable[[], Iterable[Example]]
    class_names: tuple[str, ...] = ()  # empty: the images have no classes
    total: int | None = None  # number of examples, if known beforehand
    version: str = "1.0.0"
    homepage: str = ""
    citation: str = ""
    license: str = ""
    parts: tuple[Any, ...] = ()  # small, picklable, identified by their repr; files are Paths
    read_part: Callable[[Any], Iterable[Example]] = iter  # picklable


def read_bounded(file: BinaryIO, limit: int = MAX_ENCODED_BYTES) -> bytes:
    """Reads the rest of `file`, at most `limit` + 1 bytes; the extra byte marks an oversized file."""
    return file.read(limit + 1)


def class_names_to_store(names: Iterable[str], where: object) -> tuple[str, ...]:
    """Returns class names as a data set stores them, with control characters escaped.

    Raises UsageError for names that could not be told apart in the data set's file of one trimmed name per line.
    """
    shown = tuple(printable(name) for name in names)
    for before, name in zip((None, *sorted(shown)), sorted(shown), strict=False):
        if name == before or name != name.strip() or not name:
            reason = "occurs twice once control characters are escaped" if name == before else "is empty or padded"
            raise UsageError(f"{where}: the class name {name!r} {reason}; rename it")
    return shown


def name_hash(name: str) -> int:
    """Returns 64 bits that depend on an image's name alone."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()[:8], "big")


def is_held_out(name: str, fraction: float) -> bool:
    """Returns whether an image is held out for validation, by its name alone; for streams too long to list."""
    return name_hash(name) < fraction * 2**64


def held_out(names_by_class: Mapping[int | None, Iterable[str]], fraction: float) -> frozenset[str]:
    """Returns the names of the images held out for validation: in every class, the `fraction` with the lowest hashes.

    The choice depends on the names alone. At least one image of a class of two or more is held out, and never all.
    """
    chosen: set[str] = set()
    for names in names_by_class.values():
        ranked = sorted(names, key=name_hash)
        if fraction > 0 and len(ranked) > 1:
            chosen.update(ranked[: min(max(1, round(fraction * len(ranked))), len(ranked) - 1)])
    return frozenset(chosen)
