"""Writes a token cache (`ibq_jax.data.token_cache`): by several processes, killed at any moment, never half a file.

Settings are the manifest without its counts: {"version", "tokenizer", "data": {..., "splits": {split: {"source",
"images", "views", "crops", "shards"}}}, "preprocessing", "precision", "codes": K, "grid": [h, w], "dtype"}.
"""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from ibq_jax.base.config import flatten
from ibq_jax.base.errors import UsageError
from ibq_jax.base.files import PARTIAL, atomic_file
from ibq_jax.data.token_cache import (
    MANIFEST,
    SETTINGS,
    check_manifest,
    damaged,
    open_records,
    read_fields,
    read_manifest,
    record_type,
    shard_paths,
)

IMAGES_PER_SHARD = 4096
FEWEST_SHARDS = 8  # so that a few processes share a small split
# A resume may find these changed: the fingerprint tells whether it is the same tokenizer.
FREE_FIELDS = ("tokenizer.path", "tokenizer.config.")


@dataclass(frozen=True)
class Shard:
    """One file of records: those of the split's `images`, which follow from the split's size and the shard's number."""

    path: Path
    split: str
    number: int
    images: range

    @property
    def is_whole(self) -> bool:
        return self.path.exists()


def shard_count(images: int) -> int:
    """Of a split with so many images."""
    return max(-(-images // IMAGES_PER_SHARD), min(images, FEWEST_SHARDS))


def list_shards(folder: Path, settings: Mapping) -> list[Shard]:
    """All shards of the cache, written or not."""
    shards = []
    for split, fields in settings["data"]["splits"].items():
        images, paths = fields["images"], shard_paths(folder, split, settings)
        starts = [images * number // len(paths) for number in range(len(paths) + 1)]
        for number, path in enumerate(paths):
            shards.append(Shard(path, split, number, range(starts[number], starts[number + 1])))
    return shards


@contextlib.contextmanager
def locked_cache(folder: Path, settings: Mapping, overwrite: bool) -> Iterator[None]:
    """Makes `folder` a cache of these settings, empty or with what is whole of it, for as long as the block runs.

    Several processes may be inside at once, but none while another overwrites.

    Raises:
        UsageError: `folder` is something else, or a cache of other settings (naming what differs) and `overwrite` is
            off, or it is on and another process is inside.
    """
    _check_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    try:
        if overwrite:
            _lock_alone(lock, folder)
            _clear(folder)
        fcntl.flock(lock, fcntl.LOCK_SH)
        _write_or_check_settings(folder, settings)
        yield
    finally:
        os.close(lock)


def _check_folder(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file: the token cache needs a folder")
    names = sorted(path.name for path in folder.iterdir() if path.suffix != PARTIAL) if folder.exists() else []
    if names and MANIFEST not in names and SETTINGS not in names:
        raise UsageError(f"{folder} is no token cache, it holds {names[0]}: name a new folder")


def _lock_alone(lock: int, folder: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UsageError(f"{folder} is being written by another process: wait, or name another folder") from error


def _clear(folder: Path) -> None:
    """The manifest goes first and the settings last, so that a kill in between leaves an unfinished cache."""
    (folder / MANIFEST).unlink(missing_ok=True)
    for pattern in ("*/*-of-*.array_record*", "*_histogram.npy*", f"*{PARTIAL}", SETTINGS):
        for path in folder.glob(pattern):
            path.unlink()


def _write_or_check_settings(folder: Path, settings: Mapping) -> None:
    if not (folder / MANIFEST).exists():
        with atomic_file(folder / SETTINGS, wait=True) as partial:
            if partial is not None:
                _write_json(partial, settings)
    fields = read_fields(folder / (MANIFEST if (folder / MANIFEST).exists() else SETTINGS))
    compared = {name: value for name, value in flatten(settings).items() if not name.startswith(FREE_FIELDS)}
    try:
        check_manifest(fields, compared, folder, "this command")
    except UsageError as error:
        raise UsageError(f"{error} (--overwrite replaces it)") from None


def write_records(path: Path, records: np.ndarray) -> None:
    """Writes records of `codes.record_type` so that each can be read alone."""
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record.tobytes())
    writer.close()


def finish(folder: Path, settings: Mapping) -> dict | None:
    """Counts the codes, writes the manifest and returns it; None while a shard is missing, which another process makes.

    Raises UsageError when what it counts is damaged.
    """
    shards = list_shards(folder, settings)
    if not all(shard.is_whole for shard in shards):
        return None
    with atomic_file(folder / MANIFEST, wait=True) as partial:
        if partial is not None:
            counts = {
                split: _count(folder, split, settings, [shard for shard in shards if shard.split == split])
                for split in settings["data"]["splits"]
            }
            _write_json(partial, {**settings, "splits": counts})
    for leftover in folder.glob(f"*/*{PARTIAL}"):  # of a process that looked for work while this one finished
        leftover.unlink(missing_ok=True)
    return read_manifest(folder)


def _count(folder: Path, split: str, settings: Mapping, shards: list[Shard]) -> dict:
    """What the manifest says of one split; writes its histogram."""
    encoded, kind = open_records(folder, split, settings), record_type(split, settings)
    histogram = np.zeros(settings["codes"], np.int64)
    labels = np.zeros(len(settings["data"]["class_names"]), np.int64)
    for shard in shards:
        try:
            records = np.frombuffer(b"".join(encoded.__getitems__(shard.images)), kind)
        except (RuntimeError, ValueError) as error:  # ArrayRecord's, and NumPy's of records of another length
            raise damaged(shard.path, error) from error
        if not np.array_equal(records["index"], shard.images) or records["codes"].max() >= len(histogram):
            raise damaged(shard.path, "other images or codes than it should hold")
        histogram += np.bincount(records["codes"].reshape(-1), minlength=len(histogram))
        if len(labels):
            labels += np.bincount(records["label"], minlength=len(labels))
    name = f"{split}_histogram.npy"
    with atomic_file(folder / name) as partial:
        if partial is not None:
            with partial.open("wb") as file:
                np.save(file, histogram)
    share = histogram[histogram > 0] / histogram.sum()
    entropy = float(-np.sum(share * np.log(share)))
    return {
        "images": len(encoded),
        "codes": int(histogram.sum()),
        "labels": labels.tolist(),
        "histogram": name,
        "used": len(share),
        "perplexity": float(np.exp(entropy)),
        "entropy": entropy,  # nats
    }


def _write_json(path: Path, fields: Mapping) -> None:
    path.write_text(json.dumps(fields, indent=2) + "\n")
