"""Lookup of rows in a table that is split over devices, without gathering the table."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from ibq_jax.ops.block_scan import CODES, GATHERED, OWNED, BlockScan, own_rows, sizes_on_a_device


def embedding_lookup(table: jax.Array, indices: jax.Array, *, mesh: Mesh | None = None) -> jax.Array:
    """Returns table[indices], [B, S, C] in the table's type; differentiable in the table.

    Args:
      table: [V, C] of a floating type, in which the gradient is accumulated too.
      indices: [B, S] integers; those out of range are clipped to the nearest row.
      mesh: None runs on one device (or as the partitioner decides). A mesh with the axes of `ibq_jax.base.sharding`
        splits the table's rows over `codebook`, and B over all axes: each device looks up the rows that it holds for
        its neighbours along `codebook`, with zeros for the others, and the sums are scattered to the indices' owners.

    Raises:
      UsageError: the mesh does not divide B or V.
      ValueError: arrays of other shapes or types.
    """
    if table.ndim != 2 or indices.ndim != 2 or 0 in (*table.shape, len(indices)):
        raise ValueError(
            f"expected table [V, C] and indices [B, S], of at least one row; got {table.shape}, {indices.shape}"
        )
    if not jnp.issubdtype(table.dtype, jnp.floating) or not jnp.issubdtype(indices.dtype, jnp.integer):
        raise ValueError(f"expected floating table and integer indices, got {table.dtype} and {indices.dtype}")
    if mesh is None:
        return jnp.take(table, indices, axis=0, mode="clip")
    rows = table.shape[0]
    sizes_on_a_device(indices.shape[0], rows, mesh, f"a table of {rows} rows", "sequences")
    stream = BlockScan(rows, mesh)

    def local(table, indices):
        _, found = own_rows(table, indices, stream)
        return lax.psum_scatter(found, stream.code_axes, tiled=True)

    return stream.on_devices(local, (CODES, GATHERED), OWNED)(table, jnp.clip(indices, 0, rows - 1))
