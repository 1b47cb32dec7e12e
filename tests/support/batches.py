"""Helpers to take and compare batches of arrays."""

from collections.abc import Generator
from itertools import islice

import numpy as np


def take(batches: Generator[dict], count: int) -> list[dict]:
    """Returns the first batches of an endless iterator, and ends its readers."""
    taken = list(islice(batches, count))
    batches.close()
    return taken


def joined(batches: list[dict], key: str) -> np.ndarray:
    """Returns an array of all batches as one."""
    return np.concatenate([batch[key] for batch in batches])


def side_by_side(parts: list[list[dict]]) -> list[dict]:
    """Returns the global batches whose rows the processes read."""
    return [{key: joined(list(rows), key) for key in rows[0]} for rows in zip(*parts, strict=True)]


def assert_same(batches: list[dict], others: list[dict]) -> None:
    """Checks that all arrays of two lists of batches are equal."""
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        for key in batch | other:
            np.testing.assert_array_equal(batch[key], other[key])
