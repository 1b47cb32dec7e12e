"""Writes and finds TFDS data sets in ArrayRecord form, without TensorFlow.

Examples are written by `tfds.core.SequentialWriter`, because TFDS's own builders shuffle any split over 1 GB through
TensorFlow's files. They keep the source's order on disk; readers shuffle.
"""

import contextlib
import errno
import fcntl
import itertools
import os
import shutil
import sys
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from tensorflow_datasets.core.dataset_info import DatasetIdentity
from tqdm import tqdm

from ibq_jax.base.errors import UsageError, one_line
from ibq_jax.base.json_files import read_json
from ibq_jax.data.preprocess import UnreadableImage, decode_image
from ibq_jax.data.sources import MAX_ENCODED_BYTES, Example, ImageCollection, printable

EXAMPLES_PER_SHARD = 8192
EXAMPLES_PER_CALL = 256  # TFDS rewrites its metadata at every call
FEATURES = "tensorflow_datasets.core.features."  # the module of TFDS's own features
CLASS_NAMES = ("pythonClassName", "python_class_name", "type")  # fields of features.json that name a class


@dataclass(frozen=True)
class WriteSummary:
    """The result of `write_dataset`: images per split and label, and the skipped images with the reason."""

    path: Path
    counts: Mapping[str, Counter]  # split -> label (None without classes) -> images
    skipped: tuple[str, ...]  # "name: reason"


def find_dataset(name: str, data_dir: str | os.PathLike) -> Path | None:
    """Returns the folder of the data set's newest finished version, `data_dir/name/version`; None if there is none."""
    folder = Path(data_dir, name)
    versions = [
        path
        for path in (folder.iterdir() if folder.is_dir() else ())
        if tfds.core.Version.is_valid(path.name) and (path / "dataset_info.json").is_file()
    ]
    return max(versions, key=lambda path: tfds.core.Version(path.name), default=None)


def open_builder(path: Path) -> tfds.core.DatasetBuilder:
    """Opens the data set at `path` with TFDS.

    Raises UsageError if its metadata are damaged or name a feature class that is not TFDS's own.
    """
    try:
        if (path / "features.json").is_file():
            _check_features(read_json(path / "features.json"))
        return tfds.builder_from_directory(path)
    except Exception as error:  # given foreign metadata, TFDS may raise anything
        raise UsageError(
            f"data set {path} has damaged metadata ({one_line(error)}): prepare it with --overwrite"
        ) from error


def _check_features(described: object) -> None:
    """Checks that all features are TFDS's own: TFDS imports whatever module the file names, and so runs its code."""
    for name, value in described.items() if isinstance(described, dict) else ():
        if name in CLASS_NAMES and isinstance(value, str) and not value.startswith(FEATURES):
            raise ValueError(f"a feature of type {value}, which is not one of TFDS's")
        _check_features(value)
    for value in described if isinstance(described, list) else ():
        _check_features(value)


def made_with(path: Path) -> Mapping[str, str | int | float] | None:
    """Returns the settings that the data set at `path` was written with; None if something else wrote it."""
    info: Any = open_builder(path).info
    return info.metadata.get("settings")


def write_dataset(
    collection: ImageCollection,
    data_dir: str | os.PathLike,
    settings: Mapping[str, str | int | float],
    overwrite: bool = False,
) -> WriteSummary:
    """Writes every readable image of the collection to `data_dir/name/version`, which appears only once it is complete.

    Each image is decoded fully first, so that every stored image can be read. Unreadable images are skipped, named on
    stderr, and listed in the data set's metadata, which also hold the `settings`.

    Raises:
        UsageError: the data set exists and `overwrite` is off, another process is writing it, no image can be read, or
            the disk is full.
    """
    path = Path(data_dir, collection.name, collection.version)
    check_absent(path, overwrite)
    counts: dict[str, Counter] = {}
    skipped: list[str] = []
    with _complete_or_absent(path) as folder:
        info: Any = dataset_info(collection, folder, settings)
        info.metadata["skipped"] = skipped
        write_examples(_readable(collection, skipped), info, counts, EXAMPLES_PER_SHARD)
        check_some(collection, counts, skipped)
    return WriteSummary(path, counts, tuple(skipped))


def check_absent(path: Path, overwrite: bool) -> None:
    """Checks that `path` does not exist or may be replaced. Raises UsageError."""
    if path.exists() and not overwrite:
        raise UsageError(f"{path} is there already: pass --overwrite to build it again, or choose another --name")


def check_some(collection: ImageCollection, counts: Mapping[str, Counter], skipped: Sequence[str]) -> None:
    """Checks that at least one image could be read. Raises UsageError."""
    if not counts:
        first = f", the first {skipped[0]}" if skipped else ""
        raise UsageError(f"{collection.name}: {len(skipped)} images found and none can be read{first}")


def dataset_info(collection: ImageCollection, folder: Path, settings: Mapping) -> tfds.core.DatasetInfo:
    """Returns TFDS's description of the collection's data set, which will be in `folder`; it has no splits yet."""
    features = {"image": tfds.features.Image(), "file_name": tfds.features.Text()}
    if collection.class_names:
        features["label"] = tfds.features.ClassLabel(names=list(collection.class_names))
    identity = DatasetIdentity(
        name=collection.name,
        version=tfds.core.Version(collection.version),
        data_dir=str(folder),
        module_name=__name__,
    )
    return tfds.core.DatasetInfo(
        builder=identity,
        description=collection.description,
        features=tfds.features.FeaturesDict(features),
        homepage=collection.homepage,
        citation=collection.citation,
        license=collection.license,
        metadata=tfds.core.MetadataDict(settings=dict(settings)),
    )


def write_examples(
    examples: Iterable[tuple[Example, bytes]],
    info: tfds.core.DatasetInfo,
    counts: dict[str, Counter],
    per_shard: int,
) -> None:
    """Writes examples with their bytes, and the metadata, to the folder of `info`; counts them in `counts`.

    `info.metadata` may grow meanwhile; its final state is written.
    """
    writer = tfds.core.SequentialWriter(info, per_shard, file_format="array_record")
    examples = iter(examples)
    while chunk := list(itertools.islice(examples, EXAMPLES_PER_CALL)):
        _write(chunk, writer, counts)
    writer.close_all()


def _write(
    chunk: Iterable[tuple[Example, bytes]], writer: tfds.core.SequentialWriter, counts: dict[str, Counter]
) -> None:
    records: dict[str, list[dict]] = {}
    for example, encoded in chunk:
        record = {"image": encoded, "file_name": printable(example.name)}
        if example.label is not None:
            record["label"] = example.label
        records.setdefault(example.split, []).append(record)
        counts.setdefault(example.split, Counter())[example.label] += 1
    writer.initialize_splits(list(records), fail_if_exists=False)
    writer.add_examples(records)


def _readable(collection: ImageCollection, skipped: list[str]) -> Iterator[tuple[Example, bytes]]:
    """Yields the readable examples with their bytes, in order, decoding on all cores; names the others in `skipped`."""
    cores = os.cpu_count() or 1
    pending: deque[tuple[Example, Future[bytes]]] = deque()
    examples = iter(collection.examples())
    with ThreadPoolExecutor(cores) as pool, tqdm(total=collection.total, unit=" images", dynamic_ncols=True) as bar:
        while True:
            for example in itertools.islice(examples, 4 * cores - len(pending)):
                pending.append((example, pool.submit(load, example)))
            if not pending:
                return
            example, encoded = pending.popleft()
            bar.update()
            if error := encoded.exception():
                if not isinstance(error, OSError | UnreadableImage):
                    raise error
                skipped.append(why_skipped(example, error))
                bar.write(f"skipped {skipped[-1]}", file=sys.stderr)
            else:
                yield example, encoded.result()


def why_skipped(example: Example, error: Exception) -> str:
    """Returns the line that names a skipped image and the reason."""
    return printable(f"{example.name}: {error}")


def load(example: Example) -> bytes:
    """Returns the example's bytes after decoding them as a check. Raises OSError or UnreadableImage."""
    encoded = example.read()
    if len(encoded) > MAX_ENCODED_BYTES:
        raise UnreadableImage(f"larger than {MAX_ENCODED_BYTES >> 20} MiB")
    decode_image(encoded)
    return encoded


@contextlib.contextmanager
def _complete_or_absent(path: Path) -> Iterator[Path]:
    """Gives a folder to write into, which replaces `path` if the block succeeds and is removed otherwise.

    A killed process leaves it behind unlocked; the next one empties it.
    """
    unfinished = path.with_name(f"{path.name}.incomplete")
    with locked(unfinished), disk_full_as_usage_error(path, "nothing was kept"):
        try:
            for leftover in unfinished.iterdir():
                leftover.unlink()
            yield unfinished
            replace_folder(unfinished, path)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)


def replace_folder(folder: Path, path: Path) -> None:
    """Renames the complete `folder` to `path`, replacing what is there."""
    if path.exists():
        shutil.rmtree(path)
    folder.rename(path)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Makes `folder` and locks it while the block runs. Raises UsageError if another process has locked it."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            message = f"{folder} is being written by another process: wait, or choose another --name"
            raise UsageError(message) from error
        yield
    finally:
        os.close(lock)


@contextlib.contextmanager
def disk_full_as_usage_error(path: Path, kept: str) -> Iterator[None]:
    """Turns a full disk while the block runs into a UsageError that names `path` and says what was `kept`."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # ArrayRecord raises RuntimeError with the system's message in its text
        if any(os.strerror(code) in str(error) for code in (errno.ENOSPC, errno.EDQUOT)):
            raise UsageError(f"{path}: the disk is full; {kept}") from error
        raise
