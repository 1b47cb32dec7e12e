"""Scans over the rows of a large matrix in blocks, on one device or many; shared by the operations of this folder.

On a mesh, tokens are split over all axes and the matrix's rows ("codes") over the axis `codebook`. Each device gathers
the tokens of its neighbours along `codebook`, scans its own rows, and combines the results along that axis. Without a
mesh these axes are the empty tuple, over which every collective is the identity, so that one program serves both cases.

The functions below `chunk_tokens` run inside `BlockScan.on_devices`: their matrix is one device's part of it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from ibq_jax.base.errors import UsageError
from ibq_jax.base.precision import FULL, product_precision
from ibq_jax.base.sharding import AXES, CODEBOOK, DATA, FSDP, platform

OWNED = P(AXES)  # one entry per token, split over all devices
GATHERED = P((DATA, FSDP))  # one entry per token, equal along `codebook`
CODES = P(CODEBOOK)
EQUAL = P()

LEAST_CHUNK = 1024  # tokens; products of fewer tokens do not keep a TPU's matrix units busy
GPU_LEAST_CHUNK = 8192  # tokens; for every chunk, a GPU copies and reads all codes


@dataclasses.dataclass(frozen=True)
class BlockScan:
    """A way to scan a matrix: the rows per block, and the mesh they are split over (None: one device)."""

    block_size: int
    mesh: Mesh | None = None

    @property
    def code_axes(self) -> tuple[str, ...]:
        """The axes over which the matrix's rows are split."""
        return () if self.mesh is None else (CODEBOOK,)

    @property
    def token_axes(self) -> tuple[str, ...]:
        """The axes over which tokens stay split once they are gathered along `code_axes`."""
        return () if self.mesh is None else (DATA, FSDP)

    def on_devices(self, function: Callable, in_specs: Any, out_specs: Any) -> Callable:
        """Returns `jax.shard_map` of the function over the mesh, or the function itself without a mesh."""
        if self.mesh is None:
            return function
        return jax.shard_map(function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs)

    def scan(self, step: Callable, carry: Any, arrays: Any) -> tuple[Any, Any]:
        """Applies `lax.scan` to blocks of the arrays' rows, and joins the rows that the steps return."""
        blocks = jax.tree.map(lambda rows: rows.reshape(-1, self.block_size, *rows.shape[1:]), arrays)
        carry, joined = lax.scan(step, carry, blocks)
        return carry, jax.tree.map(lambda rows: rows.reshape(-1, *rows.shape[2:]), joined)

    def fold(self, step: Callable, carry: Any, matrix: jax.Array) -> Any:
        """Returns the last carry of carry = step(carry, rows, first) over the blocks; `first` is a block's first row.

        If the block size does not divide the rows, the last block is smaller. The matrix is not copied for it.
        """
        size = min(self.block_size, matrix.shape[0])
        blocks, remaining = divmod(matrix.shape[0], size)

        def block(number, carry):
            return step(carry, lax.dynamic_slice_in_dim(matrix, number * size, size), number * size)

        carry = lax.fori_loop(0, blocks, block, carry)
        return step(carry, matrix[-remaining:], matrix.shape[0] - remaining) if remaining else carry


def sizes_on_a_device(tokens: int, codes: int, mesh: Mesh | None, matrix: str, unit: str = "tokens") -> tuple[int, int]:
    """Returns one device's number of tokens, once they are gathered along `codebook`, and of codes.

    Raises UsageError if the mesh does not divide them, naming the `matrix` and the `unit` that is split.
    """
    if mesh is None:
        return tokens, codes
    shards = mesh.shape[CODEBOOK]
    if tokens % mesh.size:
        raise UsageError(f"{tokens} {unit} do not divide over the {mesh.size} devices of the mesh")
    if codes % shards:
        raise UsageError(f"{matrix} does not divide over mesh axis {CODEBOOK}={shards}")
    return tokens * shards // mesh.size, codes // shards


def chunk_tokens(tokens: int, group_tokens: int, mesh: Mesh | None) -> int:
    """Returns how many of the `tokens` on a device of `mesh` the passes take at once: whole groups, or all of them."""
    if tokens % group_tokens:
        return tokens
    groups, least = tokens // group_tokens, GPU_LEAST_CHUNK if platform(mesh) == "gpu" else LEAST_CHUNK
    fitting = (count for count in range(1, groups + 1) if groups % count == 0 and count * group_tokens >= least)
    return next(fitting, groups) * group_tokens


def product(spec: str, a: jax.Array, b: jax.Array, precision: str = "float32") -> jax.Array:
    """Returns the einsum with a float32 result.

    `precision` says how float32 operands are multiplied (`ibq_jax.base.precision`); bfloat16 ones need no conversion.
    """
    chosen = FULL
    if a.dtype == b.dtype == jnp.bfloat16:
        chosen = lax.Precision.DEFAULT  # one pass, which is all of them
    elif a.dtype == b.dtype == np.float32:  # and not float64, in which tests compute
        chosen = product_precision(precision)
    return jnp.einsum(spec, a, b, precision=chosen, preferred_element_type=jnp.float32)


def per_token(tokens: jax.Array, value: float) -> jax.Array:
    """Returns float32 [N] filled with `value`, for tokens [N, D]."""
    return jnp.full_like(tokens[:, 0], value, jnp.float32)


def first_code(matrix: jax.Array, stream: BlockScan) -> jax.Array:
    """Returns the index, in the whole matrix, of this device's first row."""
    return lax.axis_index(stream.code_axes) * matrix.shape[0]


def own_rows(matrix: jax.Array, indices: jax.Array, stream: BlockScan) -> tuple[jax.Array, jax.Array]:
    """Returns `indices` [...] as rows of this device's matrix, and those rows' values [..., D].

    Codes of other devices give rows out of range, and zeros.
    """
    own = indices - first_code(matrix, stream)
    return own, matrix.at[own].get(mode="fill", fill_value=0, wrap_negative_indices=False)


def add_rows(total: jax.Array, rows: jax.Array, first: jax.Array, only_once: bool) -> jax.Array:
    """Adds `rows` to those of `total` from `first` on, in place within a loop.

    With `only_once` the rows of `total` are known to be zero, and are not read.
    """
    if not only_once:
        rows += lax.dynamic_slice_in_dim(total, first, rows.shape[0])
    return lax.dynamic_update_slice_in_dim(total, rows, first, 0)
