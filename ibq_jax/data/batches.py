"""Batches as a pure function of seed and step, read by Grain from any source of records.

Shapes: a global batch has B examples, of which this process reads b.
Positions count a run's examples from its start: step s holds positions s*B .. (s+1)*B - 1. The example at a position,
its random crop included, depends on the seed and the position alone, not on the number of processes, workers or
threads.
"""

import contextlib
import functools
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any, Required, TypedDict, cast

import grain
import numpy as np
from absl import flags

from ibq_jax.base.errors import UsageError
from ibq_jax.base.supervise import end_after

NO_LABEL = -1  # the label of an image of none of the data set's classes, which may have none
ArrayDict = dict[str, np.ndarray]  # one example, or one batch of them


class Source(ABC):
    """A split of labelled records, `source[i]` for i below `len(source)`; read in any order and from any process.

    Attributes:
        class_names: names of the labels; empty in a data set without classes.
    """

    class_names: tuple[str, ...]
    _records: Any  # as stored

    @property
    def num_classes(self) -> int:
        """The number of classes; 0 in a data set without classes."""
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self._records)

    @abstractmethod
    def __getitem__(self, index: int) -> Any:
        """Returns the record at `index`. Raises UsageError if it is damaged."""

    def __iter__(self) -> Iterator[Any]:
        return map(self.__getitem__, range(len(self)))


class ShuffledOptions(TypedDict, total=False):
    """The options of `shuffled_batches`."""

    batch_size: Required[int]
    seed: Required[int]
    start_step: int
    rows: Sequence[int] | np.ndarray | None
    num_workers: int
    num_threads: int


class OnePassOptions(TypedDict, total=False):
    """The options of `one_pass_batches`."""

    batch_size: Required[int]
    examples: int
    rows: Sequence[int] | np.ndarray | None
    num_threads: int


def shuffled_batches(
    source: Source,
    make_example: Callable[[Any, np.random.Generator], Mapping[str, Any]],
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    rows: Sequence[int] | np.ndarray | None = None,
    num_workers: int = 0,
    num_threads: int = 2,
) -> Generator[ArrayDict]:
    """Returns endless batches, reshuffled every epoch; every record occurs exactly once per epoch.

    Args:
        source: the records.
        make_example: makes an example from a record and a random generator of its own; must be picklable.
        batch_size: B, over all processes. A batch may straddle two epochs.
        seed: determines the order and the random generators, 0..2**32 - 1.
        start_step: number of steps to skip; skipping costs nothing.
        rows: the rows of every batch that this process reads; None reads all B.
        num_workers: number of reader processes; 0 reads in threads of this process. With reader processes a script has
            to guard its entry point with `if __name__ == "__main__":`.
        num_threads: reader threads per process; each holds one batch.

    Returns:
        an iterator over batches of b examples. Its close() ends the readers.

    Raises:
        UsageError: an option is out of range. Iterating raises whatever `source` and `make_example` raise.
    """
    check_readers(num_threads, num_workers)
    if not 0 <= seed < 2**32:
        raise UsageError(f"seed={seed}: it must be in 0..2**32 - 1")
    examples = grain.MapDataset.source(cast(Any, source)).seed(seed).shuffle().repeat().random_map(make_example)
    return iterate(_batches_of_rows(examples, batch_size, rows)[start_step:], num_workers, num_threads)


def one_pass_batches(
    source: Source,
    make_example: Callable[[Any], Mapping[str, Any]],
    padding: Mapping[str, Any],
    *,
    batch_size: int,
    examples: int = 0,
    rows: Sequence[int] | np.ndarray | None = None,
    num_threads: int = 2,
) -> Generator[ArrayDict]:
    """Returns one pass over the records in order; every process gets the same number of batches.

    Args:
        source: the records.
        make_example: makes an example from a record.
        padding: the example that fills up the last batch.
        batch_size: B, over all processes.
        examples: number of records to take, evenly spaced in the source so that every class has its share; 0 takes all.
        rows: the rows of every batch that this process reads; None reads all B.
        num_threads: reader threads.

    Returns:
        an iterator over batches of b examples with one more array, "mask": bool [b], False where padded.

    Raises:
        UsageError: as `shuffled_batches`.
    """
    check_readers(num_threads)
    count = min(examples, len(source)) if examples else len(source)

    def load(position: int) -> dict[str, Any]:
        if position >= count:
            return {**padding, "mask": np.False_}
        return {**make_example(source[position * len(source) // count]), "mask": np.True_}

    padded = -(-count // max(1, batch_size)) * batch_size
    return iterate(_batches_of_rows(grain.MapDataset.range(padded).map(load), batch_size, rows), 0, num_threads)


def iterate(batches: grain.MapDataset, num_workers: int, num_threads: int) -> Generator[ArrayDict]:
    """Yields the batches in order, read ahead by `num_threads` threads of this process or of each worker process."""
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain asks absl for its options when it starts a worker
    # Every thread makes whole batches, so as many are in flight, finished or not, as there are threads.
    stream = batches.to_iter_dataset(grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=num_threads))
    if num_workers:
        options = grain.MultiprocessingOptions(num_workers=num_workers, per_worker_buffer_size=1)
        stream = stream.mp_prefetch(options, worker_init_fn=functools.partial(_begin_worker, os.getpid()))
    with contextlib.closing(iter(stream)) as iterator:
        try:
            yield from iterator
        except UsageError as error:
            raise UsageError(str(error).partition("\n")[0]) from error  # Grain adds lines about its tracebacks


def _begin_worker(parent: int, _index: int, _count: int) -> None:
    end_after(parent)  # otherwise the readers of a killed run would stay, with all the memory they hold


class _Rows:
    """A source for Grain that holds only the given rows of every batch of B examples."""

    def __init__(self, examples: grain.MapDataset, batch_size: int, rows: Sequence[int] | np.ndarray):
        self._examples, self._batch_size, self._rows = examples, batch_size, [int(row) for row in rows]

    def __len__(self) -> int:
        return len(self._examples) // self._batch_size * len(self._rows)

    def __getitem__(self, index: int) -> ArrayDict:
        step, row = divmod(int(index), len(self._rows))
        examples: Any = self._examples
        return examples[step * self._batch_size + self._rows[row]]


def _batches_of_rows(
    examples: grain.MapDataset, batch_size: int, rows: Sequence[int] | np.ndarray | None
) -> grain.MapDataset:
    """Returns batches of B examples in order, cut down to `rows` (None: all B)."""
    if batch_size <= 0:
        raise UsageError(f"a batch of {batch_size} images: it must have at least 1")
    rows = range(batch_size) if rows is None else rows
    return grain.MapDataset.source(_Rows(examples, batch_size, rows)).batch(len(rows))


def check_readers(num_threads: int, num_workers: int = 0) -> None:
    """Checks that neither number is negative. Raises UsageError if one is."""
    if min(num_threads, num_workers) < 0:
        raise UsageError(f"num_threads={num_threads}, num_workers={num_workers}: neither can be negative")
