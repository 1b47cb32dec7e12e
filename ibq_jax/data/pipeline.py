"""Batches as a pure function of (seed, step), from a TFDS data set in ArrayRecord form, by way of Grain.

Shapes: B images of a global batch, b = B / processes of this process's part, S the side of an image in pixels.
Positions count a run's examples from its start: step s holds positions s*B .. (s+1)*B - 1, and a process reads some
rows of them. What lies at a position, crop included, depends on the seed and the position alone, not on the number of
processes, workers or threads.
"""

import contextlib
import functools
import os
import resource
from collections.abc import Generator, Iterator, Sequence
from typing import TypedDict

import grain
import numpy as np
import tensorflow_datasets as tfds
from absl import flags

from ibq_jax.base.errors import UsageError, one_line
from ibq_jax.base.supervise import end_after
from ibq_jax.data.preprocess import UnreadableImage, centre_crop, decode_image, random_crop, resize_shorter_side
from ibq_jax.data.store import find_dataset, open_builder

NO_LABEL = -1
OTHER_FILES = 256  # that a process has open besides a data set's shards


class Record(TypedDict):
    """One stored example, still encoded."""

    image: bytes
    label: int  # NO_LABEL in a data set without classes
    index: int  # in its split


class ImageSource:
    """A split of a data set: `len(source)` records, `source[i]` -> Record, read in any order and from any process."""

    def __init__(self, name: str, data_dir: str | os.PathLike, split: str, builder: tfds.core.DatasetBuilder):
        self.name, self.data_dir, self.split = name, data_dir, split
        self._records = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
        features = builder.info.features
        has_classes = "label" in features and isinstance(features["label"], tfds.features.ClassLabel)
        self.class_names: tuple[str, ...] = tuple(features["label"].names) if has_classes else ()

    @property
    def num_classes(self) -> int:
        """Classes of the labels; 0 in a data set without classes."""
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record:
        try:
            record = self._records[index]
            label = int(record["label"]) if self.class_names else NO_LABEL
        except Exception as error:  # ArrayRecord's, protobuf's and TFDS's, of which each has its own
            reason = one_line(error)
            raise UsageError(f"{self}, record {index} is damaged ({reason}): prepare it with --overwrite") from error
        return Record(image=record["image"], label=label, index=index)

    def __iter__(self) -> Iterator[Record]:
        return map(self.__getitem__, range(len(self)))

    def __str__(self) -> str:
        return f"data set {self.name} in {os.path.abspath(self.data_dir)}, split {self.split!r}"

    def __reduce__(self):
        return open_split, (self.name, self.data_dir, self.split)


def _allow_open_files(shards: int, what: str) -> None:
    """ArrayRecord keeps every shard it has read from open, and systems allow 1,024 files to a process that asks not."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or shards + OTHER_FILES <= soft:
        return
    if hard != resource.RLIM_INFINITY and shards + OTHER_FILES > hard:
        raise UsageError(f"{what} has {shards} shards, and no process may open over {hard} files: raise ulimit -Hn")
    wanted = 2 * shards + OTHER_FILES  # for a second split too
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))


def open_split(name: str, data_dir: str | os.PathLike, split: str) -> ImageSource:
    """Opens a split, e.g. "train", or one of TFDS's slices such as "train[:90%]".

    Raises:
        UsageError: the data set is not in `data_dir`, is damaged, is not in ArrayRecord form, or lacks the split, or
            has no images in it.
    """
    path = find_dataset(name, data_dir)
    if path is None:
        sources = {"openmoji": "openmoji", "imagenet2012": "imagenet --tars=DIR"}
        source = sources.get(name, f"folder --in=DIR --name={name}")
        raise UsageError(
            f"no data set {name!r} in {os.path.abspath(data_dir)}: "
            f"make it with python -m ibq_jax prepare {source} --data_dir={data_dir}"
        )
    builder = open_builder(path)
    if "image" not in builder.info.features:
        raise UsageError(f"data set {path} has no images; it has {', '.join(builder.info.features)}")
    if split.partition("[")[0] not in builder.info.splits:
        raise UsageError(f"data set {path} has no split {split!r}; it has {', '.join(builder.info.splits)}")
    try:
        images = builder.info.splits[split].num_examples
    except ValueError as error:  # TFDS's, about the slice
        raise UsageError(f"data set {path} has no split {split!r}: {str(error).splitlines()[-1]}") from error
    if not images:
        raise UsageError(f"data set {path} has no images in split {split!r}")
    try:
        _allow_open_files(len(builder.info.splits[split].file_instructions), f"data set {path}, split {split!r}")
        return ImageSource(name, data_dir, split, builder)
    except UsageError:
        raise
    except NotImplementedError as error:
        raise UsageError(f"data set {path} is in {builder.info.file_format.value} form, not array_record") from error
    except (KeyError, OSError, RuntimeError, TypeError, ValueError) as error:  # of metadata that do not fit the files
        raise UsageError(f"data set {path} is damaged ({one_line(error)}): prepare it with --overwrite") from error


def training_batches(
    source: ImageSource,
    *,
    image_size: int,
    resize: int,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    rows: Sequence[int] | None = None,
    num_workers: int = 0,
    num_threads: int = 2,
) -> Generator[dict[str, np.ndarray]]:
    """Endless batches of random crops, reshuffled every epoch; every record comes exactly once an epoch.

    Args:
        source: the records.
        image_size: S, the side of the crop.
        resize: pixels of the shorter side before cropping (antialiased).
        batch_size: B, over all processes. A batch may straddle two epochs.
        seed: of the order and the crops, 0..2**32 - 1.
        start_step: steps to leave out at the start; costs nothing.
        process_index: this process's place among process_count.
        process_count: processes that share every batch.
        rows: of every batch to read, in place of the part that the two before say.
        num_workers: reader processes, which need a script that guards its entry point with `if __name__ == "__main__"`; 0
            reads in threads of this process.
        num_threads: reader threads in each process; each holds one batch.

    Yields:
        {"image": uint8 [b, S, S, 3], "label": int32 [b], "index": int64 [b], the record's index in the split}. The
        iterator has a close(), which ends the readers.

    Raises:
        UsageError: sizes that do not fit each other; while iterating, a record that cannot be decoded.
    """
    rows = rows_of_process(batch_size, process_index, process_count) if rows is None else rows
    check_sizes(image_size, resize)
    check_readers(num_threads, num_workers)
    check_seed(seed)
    crop = functools.partial(_training_example, image_size=image_size, resize=resize, origin=str(source))
    examples = grain.MapDataset.source(source).seed(seed).shuffle().repeat().random_map(crop)
    batches = batches_of_rows(examples, batch_size, rows)[start_step:]
    return iterate(batches, num_workers, num_threads)


def _training_example(
    record: Record, rng: np.random.Generator, *, image_size: int, resize: int, origin: str
) -> dict[str, np.ndarray]:
    image = resize_shorter_side(decode_record(record, origin), resize)
    return _example(random_crop(image, image_size, rng), record)


def _example(image: np.ndarray, record: Record) -> dict[str, np.ndarray]:
    return {"image": image, "label": np.int32(record["label"]), "index": np.int64(record["index"])}


def evaluation_batches(
    source: ImageSource,
    *,
    image_size: int,
    resize: int,
    batch_size: int,
    examples: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    rows: Sequence[int] | None = None,
    antialias: bool = True,
    num_threads: int = 2,
) -> Generator[dict[str, np.ndarray]]:
    """One pass over centre crops, as many batches for every process.

    Args:
        source: the records.
        image_size: S, the side of the crop.
        resize: pixels of the shorter side before cropping.
        batch_size: B, over all processes.
        examples: how many records, spread evenly over the split so that every class has its share; 0 takes all.
        process_index: this process's place among process_count.
        process_count: processes that share every batch.
        rows: of every batch to read, in place of the part that the two before say.
        antialias: False resizes as the published numbers' evaluation did (`preprocess.resize_shorter_side`).
        num_threads: reader threads.

    Yields:
        what `training_batches` yields, and "mask": bool [b]. The last batch is filled up with black images, label and
        index -1, mask False.

    Raises:
        UsageError: as `training_batches`.
    """
    rows = rows_of_process(batch_size, process_index, process_count) if rows is None else rows
    check_sizes(image_size, resize)
    check_readers(num_threads)
    count = min(examples, len(source)) if examples else len(source)
    padded = -(-count // batch_size) * batch_size
    load = functools.partial(
        _evaluation_example, source=source, count=count, image_size=image_size, resize=resize, antialias=antialias
    )
    batches = batches_of_rows(grain.MapDataset.range(padded).map(load), batch_size, rows)
    return iterate(batches, 0, num_threads)


def _evaluation_example(
    position: int, *, source: ImageSource, count: int, image_size: int, resize: int, antialias: bool
) -> dict[str, np.ndarray]:
    if position >= count:
        black = np.zeros((image_size, image_size, 3), np.uint8)
        return {**_example(black, Record(image=b"", label=NO_LABEL, index=-1)), "mask": np.False_}
    record = source[position * len(source) // count]
    image = resize_shorter_side(decode_record(record, str(source)), resize, antialias)
    return {**_example(centre_crop(image, image_size), record), "mask": np.True_}


def decode_record(record: Record, origin: str) -> np.ndarray:
    """The record's image, uint8 [H, W, 3]. Raises UsageError naming the record of `origin` when it is none."""
    try:
        return decode_image(record["image"])
    except UnreadableImage as error:
        raise UsageError(f"{origin}, record {record['index']} is no image ({error}): prepare it anew") from error


def iterate(batches: grain.MapDataset, workers: int, threads: int) -> Generator[dict[str, np.ndarray]]:
    """The batches in order, read ahead by `threads` threads of this process, or of each of `workers` processes."""
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain asks absl for its options when it starts a worker
    # Every thread makes whole batches, so as many are in flight, finished or not, as there are threads.
    stream = batches.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads))
    if workers:
        options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=1)
        stream = stream.mp_prefetch(options, worker_init_fn=functools.partial(_begin_worker, os.getpid()))
    with contextlib.closing(iter(stream)) as iterator:
        try:
            yield from iterator
        except UsageError as error:
            raise UsageError(str(error).partition("\n")[0]) from error  # Grain adds lines on its tracebacks


def _begin_worker(parent: int, _index: int, _count: int) -> None:
    end_after(parent)  # a killed run would leave its readers behind, with all the memory they hold


class _Rows:
    """Of every B examples of `examples`, those at `rows`: a source that Grain reads at random."""

    def __init__(self, examples: grain.MapDataset, batch_size: int, rows: Sequence[int]):
        self._examples, self._batch_size, self._rows = examples, batch_size, [int(row) for row in rows]

    def __len__(self) -> int:
        return len(self._examples) // self._batch_size * len(self._rows)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        step, place = divmod(int(index), len(self._rows))
        return self._examples[step * self._batch_size + self._rows[place]]


def batches_of_rows(examples: grain.MapDataset, batch_size: int, rows: Sequence[int]) -> grain.MapDataset:
    """Batches of B examples in order, and of each the examples at `rows`."""
    return grain.MapDataset.source(_Rows(examples, batch_size, rows)).batch(len(rows))


def rows_of_process(batch_size: int, process_index: int, process_count: int) -> range:
    """The rows of the process's part of a batch. Raises UsageError for one that does not divide."""
    if batch_size <= 0 or batch_size % process_count:
        raise UsageError(f"a batch of {batch_size} images does not divide among {process_count} processes")
    part = batch_size // process_count
    return range(process_index * part, (process_index + 1) * part)


def check_sizes(image_size: int, resize: int) -> None:
    """Raises UsageError unless a crop of `image_size` fits into an image whose shorter side is `resize`."""
    if image_size <= 0:
        raise UsageError(f"image_size={image_size}: it must be positive")
    if resize < image_size:
        raise UsageError(f"resize={resize} is smaller than image_size={image_size}: a crop would not fit")


def check_readers(threads: int, workers: int = 0) -> None:
    """Raises UsageError for a negative number."""
    if min(threads, workers) < 0:
        raise UsageError(f"threads={threads}, workers={workers}: neither can be negative")


def check_seed(seed: int) -> None:
    """Raises UsageError for a seed that Grain does not take."""
    if not 0 <= seed < 2**32:
        raise UsageError(f"seed={seed}: it must be in 0..2**32 - 1")
