"""Moves results from the devices to the host, and merges the statistics that every process collected."""

from collections.abc import Iterable, Iterator
from functools import reduce

import jax
import numpy as np
from jax.experimental import multihost_utils

from ibq_jax.evaluate.statistics import FeatureStatistics


def to_host_async(queued: Iterable) -> Iterator:
    """Yields the queued items on the host, one item late, so that the devices compute the next one meanwhile."""
    ahead = None
    for item in queued:
        if ahead is not None:
            yield jax.device_get(ahead)
        ahead = item
    if ahead is not None:
        yield jax.device_get(ahead)


def mask_for_process(mask: np.ndarray) -> np.ndarray:
    """Returns the rows of `mask` (bool [B], the same in all processes) that this process counts: every n-th."""
    return mask & (np.arange(len(mask)) % jax.process_count() == jax.process_index())


def merge_across_processes(statistics: FeatureStatistics) -> FeatureStatistics:
    """Returns the statistics of all processes' images; every process must call it."""
    if jax.process_count() == 1:
        return statistics
    packed = statistics.to_array()
    # As bytes, because JAX would round float64 to float32.
    as_bytes = multihost_utils.process_allgather(np.frombuffer(packed.tobytes(), np.uint8))
    parts = [FeatureStatistics.from_array(np.frombuffer(row.tobytes(), packed.dtype)) for row in np.asarray(as_bytes)]
    return reduce(FeatureStatistics.merge, parts)
