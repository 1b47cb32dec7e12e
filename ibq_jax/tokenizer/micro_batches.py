"""A batch taken in micro-batches, so that the activations of only one are held in memory.

Shapes: A micro-batches of b images make up a batch of B = A * b.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ibq_jax.base.sharding import AXES


class MicroBatches(NamedTuple):
    """The number of micro-batches, A, and the devices over which each is split."""

    count: int
    mesh: Mesh

    def map(self, function: Callable, *arrays):
        """Applies `function` to A micro-batches of arrays [B, ...] in turn; every output gets a leading axis A.

        The arrays may be trees of such arrays.

        It is differentiable. The backward pass computes each micro-batch again.
        """
        if self.count == 1:
            return jax.tree.map(lambda leaf: leaf[None], function(*arrays))
        return jax.lax.map(lambda batch: jax.checkpoint(function)(*batch), self.split(arrays))

    def split(self, arrays):
        """Returns a tree of arrays [B, ...] as one of [A, b, ...], each micro-batch of which lies on all devices."""
        sharding = NamedSharding(self.mesh, PartitionSpec(None, AXES))

        def split(x: jax.Array) -> jax.Array:
            return jax.lax.with_sharding_constraint(x.reshape(self.count, -1, *x.shape[1:]), sharding)

        return jax.tree.map(split, arrays)


def merge(micro_batches: jax.Array) -> jax.Array:
    """Micro-batches [A, b, ...] -> the whole batch [B, ...]."""
    return micro_batches.reshape(-1, *micro_batches.shape[2:])
