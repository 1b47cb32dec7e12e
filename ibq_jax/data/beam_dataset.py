"""Writes a TFDS data set in ArrayRecord form on the workers of an Apache Beam runner.

Every split holds the same records in the same order as `store.write_dataset` writes, so every training batch is the
same bit for bit. Only the number of records per file differs: a work item (one tar shard, or several in a row) writes
one file per split, which may be empty.

TFDS 4.9.10 has two Beam writers (`tensorflow_datasets.core.writer`). `BeamWriter` needs no TensorFlow for ArrayRecord
files, but sends every image through the runner's shuffle, holds a shard's images in memory, orders them by hash, and
starts over after a kill; `NoShuffleBeamWriter` cannot write ArrayRecord files. So the workers write with
`tfds.core.SequentialWriter`, as `store` does, and TFDS's metadata are assembled at the end.

DATA_DIR/NAME/beam.incomplete/labels/    results of the first pass over tar shards (`beam_map`)
DATA_DIR/NAME/beam.incomplete/shards/    results of the second pass
DATA_DIR/NAME/beam.incomplete/data/      becomes DATA_DIR/NAME/VERSION

Workers write ordinary files, so every worker has to see the input and DATA_DIR under the same paths.
"""

import dataclasses
import functools
import itertools
import json
import os
import shutil
import socket
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath
from tensorflow_datasets.core import naming
from tensorflow_datasets.core.file_adapters import FileFormat
from tensorflow_datasets.core.splits import SplitDict

from ibq_jax.base.errors import UsageError
from ibq_jax.base.files import PARTIAL
from ibq_jax.base.parts import remove_partials, unique_partial
from ibq_jax.data.beam_map import BeamRunner, beam_map, paths_in
from ibq_jax.data.preprocess import UnreadableImage
from ibq_jax.data.sources import Example, ImageCollection, ParallelMap
from ibq_jax.data.store import (
    WriteSummary,
    check_absent,
    check_some,
    dataset_info,
    disk_full_as_usage_error,
    load,
    locked,
    replace_folder,
    why_skipped,
    write_examples,
)

SPLITS = ("train", "validation")
MAX_NAMED = 10_000  # unreadable images listed in the metadata, which are read whole whenever the data set is opened
MAX_ITEMS = 4096  # every item makes one file per split, and a reader keeps all of them open
KEPT = "free room and rerun, what is whole was kept"
SHARD_NAME = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_INDEX}"  # the pattern that SequentialWriter uses


def write_dataset_with_beam(
    collect: Callable[[ParallelMap], ImageCollection],
    name: str,
    data_dir: str | os.PathLike,
    settings: Mapping[str, str | int | float],
    runner: BeamRunner,
    overwrite: bool = False,
) -> tuple[ImageCollection, WriteSummary]:
    """Writes the same data set as `store.write_dataset`. Called again after a kill, it writes only the missing shards.

    A shard counts as missing if its tar, its file names (for a folder of images) or the settings have changed.

    Args:
        collect: makes the collection, given a map over files that runs on Beam; the collection must have parts.
        name: the collection's name.
        data_dir: the folder of the data sets.
        settings: stored in the data set's metadata.
        runner: the Beam runner.
        overwrite: whether to replace an existing data set once this one is complete.

    Returns:
        the collection and what was written.

    Raises:
        UsageError: as `store.write_dataset`; or a worker does not see the input.
        Failed: the runner gave up.
    """
    home = Path(data_dir, name).resolve()
    work = home / "beam.incomplete"
    with locked(work), disk_full_as_usage_error(home, KEPT):
        mapped = functools.partial(beam_map, runner=runner)
        collection = collect(functools.partial(mapped, folder=work / "labels", description="reading labels"))
        path = home / collection.version
        check_absent(path, overwrite)
        data = work / "data"
        data.mkdir(exist_ok=True)
        remove_partials(data)
        writer = _ShardWriter(dataclasses.replace(collection, examples=tuple, parts=()), data)
        results = mapped(
            writer,
            _items(collection),
            folder=work / "shards",
            identity=json.dumps([settings, collection.class_names]),
            description="writing images",
            still_whole=writer.has_whole,
        )
        counts, skipped = _finish(collection, data, settings, results)
        remove_partials(data)
        replace_folder(data, path)
        shutil.rmtree(work, ignore_errors=True)
    return collection, WriteSummary(Path(data_dir, name, collection.version), counts, tuple(skipped))


def _items(collection: ImageCollection) -> list[tuple]:
    """Returns the work items (number, *parts): at most MAX_ITEMS groups of neighbouring parts, as equal as possible."""
    count = min(len(collection.parts), MAX_ITEMS)
    bounds = [len(collection.parts) * number // count for number in range(count + 1)]
    return [(number, *collection.parts[bounds[number] : bounds[number + 1]]) for number in range(count)]


@dataclass(frozen=True)
class _ShardWriter:
    """A callable that writes an item's images to `data`, one file per split, and returns their counts and sizes."""

    collection: ImageCollection  # without its parts, which are many
    data: Path

    def __call__(self, item: tuple) -> dict:
        number, *parts = item
        for path in paths_in(parts):
            if not path.exists():
                raise UsageError(f"the worker {socket.gethostname()} does not see {path}: it needs it under this path")
        folder = unique_partial(self.data / f"{number:05}")
        folder.mkdir()
        try:
            with disk_full_as_usage_error(self.data, KEPT):
                return self._write(number, parts, folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _write(self, number: int, parts: list, folder: Path) -> dict:
        skipped: list[str] = []
        counts: dict[str, Counter] = {}
        info = dataset_info(self.collection, folder, {})
        examples = itertools.chain.from_iterable(map(self.collection.read_part, parts))
        write_examples(_readable(examples, skipped), info, counts, per_shard=2**62)
        files = {}
        for split in SPLITS:
            [written] = list(folder.glob(f"*-{split}.array_record-*")) or [_empty_shard(folder / split)]
            files[split] = written.stat().st_size
            os.replace(written, self._shard(split, number))
        return {
            "number": number,
            "files": files,
            "images": {split: sorted(counted.items()) for split, counted in counts.items()},
            "bytes": {split: info.splits[split].num_bytes for split in counts},
            "skipped": skipped,
        }

    def _shard(self, split: str, number: int) -> Path:
        return Path(_template(self.collection, self.data, split).sharded_filepath(shard_index=number, num_shards=None))

    def has_whole(self, result: Mapping) -> bool:
        """Returns whether the files of a result exist and have the recorded sizes."""
        for split, size in result["files"].items():
            path = self._shard(split, result["number"])
            if not path.is_file() or path.stat().st_size != size:
                return False
        return True


def _readable(examples: Iterable[Example], skipped: list[str]) -> Iterator[tuple[Example, bytes]]:
    for example in examples:
        try:
            encoded = load(example)
        except (OSError, UnreadableImage) as error:
            skipped.append(why_skipped(example, error))
        else:
            yield example, encoded


def _empty_shard(path: Path) -> Path:
    """Writes a shard without records, so that the shards' numbers have no gaps."""
    ArrayRecordWriter(str(path), "group_size:1").close()
    return path


def _template(collection: ImageCollection, folder: Path, split: str) -> naming.ShardedFileTemplate:
    return naming.ShardedFileTemplate(
        dataset_name=collection.name,
        data_dir=epath.Path(folder),
        split=split,
        filetype_suffix=FileFormat.ARRAY_RECORD.file_suffix,
        template=SHARD_NAME,
    )


def _finish(
    collection: ImageCollection, data: Path, settings: Mapping, results: list[Mapping]
) -> tuple[dict[str, Counter], list[str]]:
    """Writes TFDS's metadata. Returns the number of images per split and label, and one line per skipped image."""
    skipped = [line for result in results for line in result["skipped"]]
    counts: dict[str, Counter] = {}
    splits, whole = [], set()
    for split in SPLITS:
        lengths = [sum(count for _, count in result["images"].get(split, ())) for result in results]
        if not any(lengths):
            continue
        counts[split] = Counter()
        for result in results:
            counts[split].update(dict(map(tuple, result["images"].get(split, ()))))
        template = _template(collection, data, split)
        size = sum(result["bytes"].get(split, 0) for result in results)
        splits.append(tfds.core.SplitInfo(split, lengths, size, filename_template=template))
        whole |= {
            Path(template.sharded_filepath(shard_index=number, num_shards=None)) for number in range(len(results))
        }
    check_some(collection, counts, skipped)
    for path in set(data.iterdir()) - whole:  # from a split without images, or from an earlier call with more shards
        if not path.name.endswith(PARTIAL):
            path.unlink()
    for line in skipped[:MAX_NAMED]:
        print(f"skipped {line}", file=sys.stderr)
    info: Any = dataset_info(collection, data, settings)
    info.metadata["skipped"] = skipped[:MAX_NAMED]
    info.set_file_format(FileFormat.ARRAY_RECORD)
    info.set_splits(SplitDict(splits))
    info.write_to_directory(data)
    return counts, skipped
