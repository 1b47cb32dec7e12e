"""What operations that walk over the rows of a large matrix in blocks share, on one device or many.

On a mesh, tokens lie on all axes and the matrix's rows ("codes") on axis `codebook`. Each device gathers the tokens of
its neighbours along `codebook`, walks over its own rows, and combines what it found along that axis. Without a mesh
these axes are the empty tuple, over which every collective is the identity, so that one program serves both.

These functions run inside `BlockScan.on_devices`: the matrix that they take is what one device holds of it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from ibq_jax.base.errors import UsageError
from ibq_jax.base.sharding import AXES, CODEBOOK, DATA, FSDP

OWNED = P(AXES)  # per token, split over every device
GATHERED = P((DATA, FSDP))  # per token, equal along `codebook`
CODES = P(CODEBOOK)
EQUAL = P()


@dataclasses.dataclass(frozen=True)
class BlockScan:
    """How a matrix is walked over: rows of a block, and the mesh they are split over (None: one device)."""

    block_size: int
    mesh: Mesh | None = None

    @property
    def code_axes(self) -> tuple[str, ...]:
        return () if self.mesh is None else (CODEBOOK,)

    @property
    def token_axes(self) -> tuple[str, ...]:
        """The axes over which tokens stay split once they are gathered along `code_axes`."""
        return () if self.mesh is None else (DATA, FSDP)

    def on_devices(self, function: Callable, in_specs: Any, out_specs: Any) -> Callable:
        if self.mesh is None:
            return function
        return jax.shard_map(function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs)

    def scan(self, step: Callable, carry: Any, arrays: Any) -> tuple[Any, Any]:
        """`lax.scan` over blocks of the arrays' rows; the rows that steps return are joined again."""
        blocks = jax.tree.map(lambda rows: rows.reshape(-1, self.block_size, *rows.shape[1:]), arrays)
        carry, joined = lax.scan(step, carry, blocks)
        return carry, jax.tree.map(lambda rows: rows.reshape(-1, *rows.shape[2:]), joined)

    def fold(self, step: Callable, carry: Any, matrix: jax.Array) -> Any:
        """carry = step(carry, rows, first) for each block of rows, `first` being the number of its first row here.

        The block size need not divide: what remains is a smaller block, and no copy of the matrix is made for it.
        """
        size = min(self.block_size, matrix.shape[0])
        blocks, remaining = divmod(matrix.shape[0], size)

        def block(number, carry):
            return step(carry, lax.dynamic_slice_in_dim(matrix, number * size, size), number * size)

        carry = lax.fori_loop(0, blocks, block, carry)
        return step(carry, matrix[-remaining:], matrix.shape[0] - remaining) if remaining else carry


def sizes_on_a_device(tokens: int, codes: int, mesh: Mesh | None, matrix: str, unit: str = "tokens") -> tuple[int, int]:
    """Tokens, once gathered along `codebook`, and codes.

    Raises UsageError if they are not whole, naming the `matrix` and the `unit` that is split over all devices.
    """
    if mesh is None:
        return tokens, codes
    shards = mesh.shape[CODEBOOK]
    if tokens % mesh.size:
        raise UsageError(f"{tokens} {unit} do not divide over the {mesh.size} devices of the mesh")
    if codes % shards:
        raise UsageError(f"{matrix} does not divide over mesh axis {CODEBOOK}={shards}")
    return tokens * shards // mesh.size, codes // shards


def product(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


def per_token(tokens: jax.Array, value: float) -> jax.Array:
    """[N] float32 for tokens [N, D]."""
    return jnp.full_like(tokens[:, 0], value, jnp.float32)


def first_code(matrix: jax.Array, stream: BlockScan) -> jax.Array:
    return lax.axis_index(stream.code_axes) * matrix.shape[0]


def own_rows(matrix: jax.Array, indices: jax.Array, stream: BlockScan) -> tuple[jax.Array, jax.Array]:
    """The rows [...] of this device's matrix that `indices` name, out of range for other devices' codes, and their
    values [..., D], zero for other devices' codes."""
    own = indices - first_code(matrix, stream)
    return own, matrix.at[own].get(mode="fill", fill_value=0, wrap_negative_indices=False)


def add_rows(total: jax.Array, rows: jax.Array, first: jax.Array, only_once: bool) -> jax.Array:
    """Adds to the rows from `first` on, in place within a loop; `only_once`: they are zero still."""
    if not only_once:
        rows += lax.dynamic_slice_in_dim(total, first, rows.shape[0])
    return lax.dynamic_update_slice_in_dim(total, rows, first, 0)
