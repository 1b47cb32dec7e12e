"""From the devices to the host, and what every process counted of its own pictures, brought together."""

from collections.abc import Iterable, Iterator
from functools import reduce

import jax
import numpy as np
from jax.experimental import multihost_utils

from ibq_jax.evaluate.statistics import FeatureStatistics


def to_host_async(queued: Iterable) -> Iterator:
    """What is queued, on the host one item late: the devices are at the next one meanwhile."""
    ahead = None
    for item in queued:
        if ahead is not None:
            yield jax.device_get(ahead)
        ahead = item
    if ahead is not None:
        yield jax.device_get(ahead)


def own_rows(mask: np.ndarray) -> np.ndarray:
    """Of the rows [B] that are True and that all processes hold, those that this process counts."""
    return mask & (np.arange(len(mask)) % jax.process_count() == jax.process_index())


def merge_across_processes(statistics: FeatureStatistics) -> FeatureStatistics:
    """Every process calls it, and gets the statistics of all pictures."""
    if jax.process_count() == 1:
        return statistics
    packed = statistics.to_array()
    as_bytes = multihost_utils.process_allgather(np.frombuffer(packed.tobytes(), np.uint8))  # JAX would cut float64
    parts = [FeatureStatistics.from_array(np.frombuffer(row.tobytes(), packed.dtype)) for row in np.asarray(as_bytes)]
    return reduce(FeatureStatistics.merge, parts)
