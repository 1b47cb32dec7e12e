"""Writes a token cache (`ibq_jax.data.token_cache`) shard by shard.

Several processes may share the job, and a kill loses at most the shards that were being written.

Settings are the manifest without its counts and checks: {"version", "tokenizer", "data": {..., "splits": {split:
{"source", "images", "views", "crops", "shards"}}}, "preprocessing", "precision", "machine": {"platform",
"device_kind"}, "codebook_size": K, "grid": [h, w], "dtype"}.

All codes of a cache are of one precision and one platform. Kinds of devices (say, A100 and H100) may share a cache:
at the same precision they differ only by the order of float32 sums, which decides nothing but near ties, and as CPUs
are all of the kind "cpu", the name would not tell them apart either. A manifest names the device of the process that
completed the cache.
"""

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from ibq_jax.base.config import flatten
from ibq_jax.base.errors import UsageError
from ibq_jax.base.files import PARTIAL, atomic_file
from ibq_jax.base.histogram import entropy, perplexity
from ibq_jax.base.parts import SETTINGS, claim_folder, join_parts, remove_partials, write_json
from ibq_jax.data.batches import NO_LABEL
from ibq_jax.data.token_cache import (
    MANIFEST,
    MANIFEST_V1,
    SHEET,
    check_manifest,
    damaged,
    find_manifest,
    open_records,
    read_fields,
    read_manifest,
    record_type,
    shard_paths,
)

IMAGES_PER_SHARD = 4096
MIN_SHARDS = 8  # so that a few processes can share a small split
# These may differ when a job continues: the fingerprint decides whether it is the same tokenizer.
FREE_FIELDS = ("tokenizer.path", "tokenizer.config.", "machine.device_kind", "images.source")

# (folder, settings) of a cache whose shards are whole -> further fields of its manifest
Check = Callable[[Path, Mapping], Mapping]


@dataclass(frozen=True)
class Shard:
    """A file with the records of a range of the split's images, which follows from its size and the shard's number."""

    path: Path
    split: str
    number: int
    images: range

    @property
    def is_whole(self) -> bool:
        return self.path.exists()


def shard_count(images: int) -> int:
    """Returns the number of shards of a split with `images` images."""
    return max(-(-images // IMAGES_PER_SHARD), min(images, MIN_SHARDS))


def list_shards(folder: Path, settings: Mapping) -> list[Shard]:
    """Returns all shards of the cache, including those not written yet."""
    shards = []
    for split, fields in settings["data"]["splits"].items():
        images, paths = fields["images"], shard_paths(folder, split, settings)
        bounds = [images * number // len(paths) for number in range(len(paths) + 1)]
        for number, path in enumerate(paths):
            shards.append(Shard(path, split, number, range(bounds[number], bounds[number + 1])))
    return shards


@contextlib.contextmanager
def locked_cache(folder: Path, settings: Mapping, overwrite: bool) -> Iterator[None]:
    """Makes `folder` a token cache of these settings for the block to write into; whole shards in it are kept.

    Several processes may be inside such a block at once, but none while another overwrites.

    Raises:
        UsageError: `folder` is something else; it is a cache of other settings and `overwrite` is off (the message
            names what differs), or an unfinished one of another platform; or `overwrite` is on and another process is
            inside.
    """
    _check_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    try:
        if overwrite:
            _lock_alone(lock, folder)
            _clear(folder)
        fcntl.flock(lock, fcntl.LOCK_SH)
        _claim(folder, settings)
        yield
    finally:
        os.close(lock)


def _check_folder(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file: the token cache needs a folder")
    names = sorted(path.name for path in folder.iterdir() if path.suffix != PARTIAL) if folder.exists() else []
    if names and not {MANIFEST, MANIFEST_V1, SETTINGS} & set(names):
        raise UsageError(f"{folder} is not a token cache, it holds {names[0]}: name a new folder")


def _lock_alone(lock: int, folder: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UsageError(f"{folder} is being written by another process: wait, or name another folder") from error


def _clear(folder: Path) -> None:
    """Removes the manifest first and the settings last, so that a kill in between leaves an unfinished cache."""
    made = ("*/*-of-*.array_record*", "*/*-of-*.json*", "*histogram.npy*", "shapes.json*", SHEET, f"*{PARTIAL}")
    for pattern in (MANIFEST, MANIFEST_V1, *made, SETTINGS):
        for path in folder.glob(pattern):
            path.unlink()


def _claim(folder: Path, settings: Mapping) -> None:
    """Writes the settings unless the cache has some, then checks that they agree. Raises UsageError if not."""
    manifest = find_manifest(folder)
    fields = read_fields(manifest or claim_folder(folder, settings), mixed=True)
    if manifest is None and "machine" not in fields:
        raise UsageError(
            f"token cache {folder} was begun by an earlier version, which did not note the machine; its codes may be "
            "of another precision: --overwrite begins it again"
        )
    free = FREE_FIELDS if manifest is None else (*FREE_FIELDS, "machine.")  # nothing is added to a complete cache
    compared = {name: value for name, value in flatten(settings).items() if not name.startswith(free)}
    try:
        check_manifest(fields, compared, folder, "this command")
    except UsageError as error:
        raise UsageError(f"{error} (--overwrite replaces it)") from None


def write_records(path: Path, records: np.ndarray) -> None:
    """Writes records of type `record_type` so that each can be read on its own."""
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record.tobytes())
    writer.close()


def finish(folder: Path, settings: Mapping, check: Check | None = None) -> dict | None:
    """Counts the codes, checks them and writes the manifest, once all shards are whole.

    Args:
        folder: the cache's folder.
        settings: its settings.
        check: adds to the manifest what it finds out about the codes; repeated if the process is killed meanwhile.

    Returns:
        the manifest; None while a shard is missing, which another process writes.

    Raises:
        UsageError: a shard is damaged.
    """
    shards = list_shards(folder, settings)

    def write_manifest(partial: Path) -> None:
        counts = {
            split: _count(folder, split, settings, [shard for shard in shards if shard.split == split])
            for split in settings["data"]["splits"]
        }
        write_json(partial, {**settings, "splits": counts, **(check(folder, settings) if check else {})})

    if not join_parts([shard.path for shard in shards], find_manifest(folder) or folder / MANIFEST, write_manifest):
        return None
    remove_partials(folder, "*/*")  # left by a process that looked for work while this one finished
    return read_manifest(folder)


def _count(folder: Path, split: str, settings: Mapping, shards: list[Shard]) -> dict:
    """Returns the manifest's counts of one split; writes its histogram."""
    encoded, dtype = open_records(folder, split, settings), record_type(split, settings)
    histogram = np.zeros(settings["codebook_size"], np.int64)
    labels = np.zeros(len(settings["data"]["class_names"]), np.int64)
    for shard in shards:
        try:
            records = np.frombuffer(b"".join(encoded.__getitems__(shard.images)), dtype)
        except (RuntimeError, ValueError) as error:  # from ArrayRecord, and from NumPy for records of another length
            raise damaged(shard.path, error) from error
        if not np.array_equal(records["index"], shard.images) or records["codes"].max() >= len(histogram):
            raise damaged(shard.path, "other images or codes than it should hold")
        histogram += np.bincount(records["codes"].reshape(-1), minlength=len(histogram))
        if len(labels):
            labels += np.bincount(records["label"][records["label"] != NO_LABEL], minlength=len(labels))
    name = f"{split}_histogram.npy"
    with atomic_file(folder / name) as partial:
        if partial is not None:
            with partial.open("wb") as file:
                np.save(file, histogram)
    return {
        "images": len(encoded),
        "num_tokens": int(histogram.sum()),
        "labels": labels.tolist(),
        "histogram": name,
        "used": int(np.count_nonzero(histogram)),
        "perplexity": float(perplexity(histogram)),
        "entropy": float(entropy(histogram)),  # nats
    }
