"""Cross entropy of a language model over a very large vocabulary, without an array [tokens, vocabulary].

Shapes: N tokens, V rows of the output layer, C dimensions; in einsums n, v, c. T tokens of a chunk.
Logits l = head x^T are held as [rows of a block, T], rows first, as in `ibq_jax.ops.streamed`.

    m_n = max_v l_vn     S_n = sum_v e^(l_vn - m_n)     loss_n = m_n + log S_n - x_n . head_tn,   t_n the target

With g_n the cotangent of loss_n and w_n = g_n / S_n, the gradients are

    dx_n = w_n (sum_v e^(l_vn - m_n) head_v - S_n head_tn)
    dhead_v = sum_n e^(l_vn - m_n) (w_n x_n),  then -S_n (w_n x_n) is added to row t_n

so that a block needs only one exponential. The product w_n x_n may be rounded to bfloat16: since the target's part is
made of the same rounded numbers, the terms that should cancel for a confident token (m_n = l_tn, S_n near 1) do cancel.

`cross_entropy` scans the head twice, chunk by chunk of tokens: once for m and S and, when g is known, once for the
gradients, which compute every block's logits again: four products of N V C multiplications. `weighted_cross_entropy`
knows g, the weights, in advance. It makes both scans for one chunk before it goes on to the next, and can therefore
keep the chunk's logits [V, T] in between: three products. In exchange, dhead exists from the end of the forward pass.

On a mesh, tokens are split over all axes and the head's rows over the axis `codebook` (see `ibq_jax.ops.block_scan`).
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from ibq_jax.base.errors import UsageError
from ibq_jax.base.precision import FULL
from ibq_jax.base.sharding import platform
from ibq_jax.ops.block_scan import (
    CODES,
    GATHERED,
    OWNED,
    BlockScan,
    add_rows,
    own_rows,
    per_token,
    product,
    sizes_on_a_device,
)

LEAST_CHUNK = 128  # tokens; with fewer, adding to dhead costs about as much as the product that kept logits save


class Limits(NamedTuple):
    """Bounds of the arrays that one kind of device works on at a time."""

    block_bytes: int  # of a block's rows, and of its logits
    least_block: int  # rows
    chunk: int  # tokens; with more, dhead is read and written less often
    kept_bytes: int  # of a chunk's logits, which `weighted_cross_entropy` keeps


# A block should stay in a CPU's cache, and CPUs multiply blocks of more tokens more slowly.
LIMITS = Limits(block_bytes=4 * 2**20, least_block=512, chunk=512, kept_bytes=256 * 2**20)
# Every block launches a dozen kernels on a GPU, and every chunk reads and writes dhead in its memory.
GPU_LIMITS = Limits(block_bytes=2**30, least_block=512, chunk=16_384, kept_bytes=2**30)


def cross_entropy(
    x: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    *,
    block_size: int = 0,
    implementation: Literal["streamed", "dense"] = "streamed",
    mesh: Mesh | None = None,
) -> jax.Array:
    """Returns the loss of every token in nats, [N] float32: logsumexp_v(x_n . head_v) - x_n . head_targets_n.

    Differentiable in x and head. Inputs are float32 or bfloat16. bfloat16 inputs are multiplied without conversion,
    with float32 results; all other arithmetic is float32, and gradients have the inputs' types. Products of float32
    keep every bit on every machine: with fewer they would not cancel a gradient's target part, which is no product.

    Args:
      x: [N, C] final hidden states.
      head: [V, C] rows of the output layer.
      targets: [N] integers in 0..V-1.
      block_size: rows per block of the streamed form; it need not divide V. 0 chooses as many as keep both the rows
        and the logits of a block within 4 MiB in float32 (1 GiB on GPUs), but at least 512.
      implementation: "streamed", or "dense", which ignores block_size and leaves the mesh to the partitioner.
      mesh: None runs on one device (or as the partitioner decides). A mesh with the axes of `ibq_jax.base.sharding`
        splits tokens over all its axes and the head's rows over `codebook`; losses are equal along `codebook`.

    Raises:
      UsageError: the mesh does not divide a size, block_size is negative, or the implementation does not exist.
      ValueError: arrays of other shapes or types.
    """
    _check_arrays(x, head, targets)
    if implementation == "dense":
        return _dense(x, head, targets)
    stream = _stream(x, head, block_size, implementation, mesh)
    dtype = jnp.result_type(x, head)
    return _losses(stream, x.astype(dtype), head.astype(dtype), targets)


def weighted_cross_entropy(
    x: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    block_size: int = 0,
    implementation: Literal["streamed", "dense"] = "streamed",
    mesh: Mesh | None = None,
) -> jax.Array:
    """Returns sum_n weights_n loss_n, [] float32; losses, other arguments and errors are those of `cross_entropy`.

    Differentiable in x, head and weights [N]. Under differentiation the streamed form is faster than `cross_entropy`,
    because it computes the logits once: it keeps those of a chunk of tokens, [V, T] on one device, with as many tokens
    as fit into 256 MiB (at least 128, at most 512; on GPUs 1 GiB and at most 16,384). The gradients exist from the end
    of the forward pass, and occupy memory during the whole backward pass of the network that computed x: [V, C] on one
    device, in the type of head.
    """
    _check_arrays(x, head, targets)
    if weights.shape != targets.shape:
        raise ValueError(f"expected weights {targets.shape}, one per token; got {weights.shape}")
    weights = weights.astype(jnp.float32)
    if implementation == "dense":
        return (_dense(x, head, targets) * weights).sum()
    stream = _stream(x, head, block_size, implementation, mesh)
    dtype = jnp.result_type(x, head)
    return _total(stream, x.astype(dtype), head.astype(dtype), targets, weights)


def _dense(x: jax.Array, head: jax.Array, targets: jax.Array) -> jax.Array:
    logits = jnp.einsum("nc,vc->nv", x.astype(jnp.float32), head.astype(jnp.float32), precision=FULL)
    return jax.nn.logsumexp(logits, axis=1) - jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0]


def _check_arrays(x: jax.Array, head: jax.Array, targets: jax.Array) -> None:
    if x.ndim != 2 or head.ndim != 2 or x.shape[1] != head.shape[1] or 0 in x.shape + head.shape:
        raise ValueError(f"expected x [N, C] and head [V, C], none of them empty; got {x.shape}, {head.shape}")
    if not {x.dtype, head.dtype} <= {jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)}:
        raise ValueError(f"expected float32 or bfloat16, got x {x.dtype} and head {head.dtype}")
    if targets.shape != x.shape[:1] or not jnp.issubdtype(targets.dtype, jnp.integer):
        raise ValueError(f"expected targets {x.shape[:1]} of integers; got {targets.shape} of {targets.dtype}")


def _stream(x: jax.Array, head: jax.Array, block_size: int, implementation: str, mesh: Mesh | None) -> BlockScan:
    if implementation != "streamed":
        raise UsageError(f"implementation={implementation!r} does not exist; it is 'streamed' or 'dense'")
    if block_size < 0:
        raise UsageError(f"block_size={block_size} must not be negative (0 chooses one)")
    (tokens, width), rows = x.shape, head.shape[0]
    _, rows = sizes_on_a_device(tokens, rows, mesh, f"a vocabulary of {rows} rows")
    if block_size == 0:
        limits = _limits(mesh)
        block_size = max(limits.block_bytes // (4 * max(width, _chunk_tokens(rows, mesh))), limits.least_block)
    return BlockScan(block_size, mesh)


def _limits(mesh: Mesh | None) -> Limits:
    return GPU_LIMITS if platform(mesh) == "gpu" else LIMITS


def _chunk_tokens(rows: int, mesh: Mesh | None) -> int:
    """Returns the most tokens of a chunk, for the rows of the head that a device has."""
    limits = _limits(mesh)
    return min(max(limits.kept_bytes // (4 * rows), LEAST_CHUNK), limits.chunk)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _losses(stream: BlockScan, x: jax.Array, head: jax.Array, targets: jax.Array) -> jax.Array:
    return _losses_forward(stream, x, head, targets)[0]


def _losses_forward(stream: BlockScan, x: jax.Array, head: jax.Array, targets: jax.Array):
    run = stream.on_devices(partial(_local_losses, stream), (OWNED, CODES, GATHERED), GATHERED)
    losses, m, s = run(x, head, targets)
    return losses, (x, head, targets, m, s)


def _losses_backward(stream: BlockScan, residuals, g):
    in_specs = (OWNED, CODES, *[GATHERED] * 4)
    run = stream.on_devices(partial(_local_gradients, stream), in_specs, (OWNED, CODES))
    return *run(*residuals, g), None


_losses.defvjp(_losses_forward, _losses_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _total(stream: BlockScan, x: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
    losses: Any = _losses(stream, x, head, targets)  # `partial` hides the type from checkers
    return (losses * weights).sum()


def _total_forward(stream: BlockScan, x: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array):
    in_specs, out_specs = (OWNED, CODES, GATHERED, GATHERED), (GATHERED, OWNED, CODES)
    run = stream.on_devices(partial(_local_losses_and_gradients, stream), in_specs, out_specs)
    losses, dx, dhead = run(x, head, targets, weights)
    return (losses * weights).sum(), (losses, dx, dhead)


def _total_backward(stream: BlockScan, residuals, g):
    losses, dx, dhead = jax.tree.map(lambda array: (g * array).astype(array.dtype), residuals)
    return dx, dhead, None, losses


_total.defvjp(_total_forward, _total_backward)


def _local_losses(stream: BlockScan, x: jax.Array, head: jax.Array, targets: jax.Array) -> tuple[jax.Array, ...]:
    """Returns the losses [N], and m and S with the entries of the padding tokens of the last chunk."""
    tokens = targets.shape[0]
    x = lax.all_gather(x, stream.code_axes, tiled=True)

    def chunk(arrays):
        own_x, own_targets = arrays
        losses, m, s, _ = _chunk_losses(stream, own_x, own_targets, head, None)
        return losses, m, s

    losses, m, s = _joined(lax.map(chunk, _chunks(stream, head, (x, targets))))
    return losses[:tokens], m, s


def _local_gradients(stream: BlockScan, x, head, targets, m, s, g) -> tuple[jax.Array, jax.Array]:
    """Returns dx of the device's own tokens and dhead of its own rows."""
    x = lax.all_gather(x, stream.code_axes, tiled=True)

    def chunk(dhead, arrays):
        x, targets, m, s, g = arrays

        def logits_of(rows, first):
            return product("vc,nc->vn", rows, x)

        return _chunk_gradients(stream, x, targets, m, s, g, head, dhead, logits_of, only_once=chunks == 1)

    arrays = _chunks(stream, head, (x, targets, m, s, g))
    chunks = arrays[0].shape[0]
    dhead, dx = lax.scan(chunk, _zeros(stream, head.shape), arrays)
    return _to_owners(stream, _joined(dx)[: targets.shape[0]], dhead, head.dtype)


def _local_losses_and_gradients(stream: BlockScan, x, head, targets, weights) -> tuple[jax.Array, ...]:
    """Returns the losses [N], dx of the device's own tokens and dhead of its own rows."""
    x = lax.all_gather(x, stream.code_axes, tiled=True)

    def chunk(carry, arrays):
        dhead, kept = carry
        x, targets, weights = arrays
        losses, m, s, kept = _chunk_losses(stream, x, targets, head, kept)

        def logits_of(rows, first):
            return lax.dynamic_slice_in_dim(kept, first, rows.shape[0])

        dhead, dx = _chunk_gradients(stream, x, targets, m, s, weights, head, dhead, logits_of, only_once=chunks == 1)
        return (dhead, kept), (losses, dx)

    arrays = _chunks(stream, head, (x, targets, weights))
    chunks, chunk_tokens = arrays[1].shape
    start = _zeros(stream, head.shape), _zeros(stream, (head.shape[0], chunk_tokens))
    (dhead, _), by_chunks = lax.scan(chunk, start, arrays)
    losses, dx = jax.tree.map(lambda array: array[: targets.shape[0]], _joined(by_chunks))
    return losses, *_to_owners(stream, dx, dhead, head.dtype)


def _chunk_losses(
    stream: BlockScan, x: jax.Array, targets: jax.Array, head: jax.Array, kept: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array, Any]:
    """Returns the losses, m and S [T] of a chunk, and `kept` [V, T] with the chunk's logits (or None if it is None)."""

    def step(carry, rows, first):
        m_before, s, kept = carry
        logits = product("vc,nc->vn", rows, x)
        m = jnp.maximum(m_before, logits.max(axis=0))
        s = s * jnp.exp(m_before - m) + jnp.exp(logits - m[None]).sum(axis=0)
        return m, s, None if kept is None else lax.dynamic_update_slice_in_dim(kept, logits, first, 0)

    m_here, s, kept = stream.fold(step, (per_token(x, -jnp.inf), per_token(x, 0.0), kept), head)
    m = lax.pmax(m_here, stream.code_axes)
    s = lax.psum(s * jnp.exp(m_here - m), stream.code_axes)
    _, target_rows = own_rows(head, targets, stream)
    target_logits = lax.psum(product("nc,nc->n", target_rows, x), stream.code_axes)
    return m + jnp.log(s) - target_logits, m, s, kept


def _chunk_gradients(
    stream: BlockScan, x, targets, m, s, g, head, dhead: jax.Array, logits_of: Callable, only_once: bool
) -> tuple[jax.Array, jax.Array]:
    """Returns dhead with this chunk's part added, and dx [T, C], both from this device's rows alone.

    `logits_of(rows, first)` gives a block's logits. With `only_once`, dhead is known to be zero.
    """
    w = (g / s)[:, None]
    weighted = (w * x).astype(x.dtype)

    def step(carry, rows, first):
        dx, dhead = carry
        e = jnp.exp(logits_of(rows, first) - m[None]).astype(x.dtype)
        dx += product("vn,vc->nc", e, rows)
        return dx, add_rows(dhead, product("vn,nc->vc", e, weighted), first, only_once)

    dx, dhead = stream.fold(step, (jnp.zeros_like(x, jnp.float32), dhead), head)
    own, target_rows = own_rows(head, targets, stream)
    dx = w * (dx - s[:, None] * target_rows)
    dhead = dhead.at[own].add(-s[:, None] * weighted, mode="drop", wrap_negative_indices=False)
    return dhead, dx


def _to_owners(stream: BlockScan, dx: jax.Array, dhead: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    dx = lax.psum_scatter(dx, stream.code_axes, tiled=True)
    return dx.astype(dtype), lax.psum(dhead, stream.token_axes).astype(dtype)


def _zeros(stream: BlockScan, shape: tuple[int, ...]) -> jax.Array:
    """Returns float32 zeros, marked as varying over the devices, on each of which they will be added to."""
    return lax.pcast(jnp.zeros(shape, jnp.float32), stream.token_axes + stream.code_axes, to="varying")


def _chunks(stream: BlockScan, head: jax.Array, arrays: Any) -> Any:
    """Splits [N, ...] into [chunks, T, ...], as evenly as possible; zeros fill the last chunk."""
    most = _chunk_tokens(head.shape[0], stream.mesh)

    def split(array):
        tokens = array.shape[0]
        chunks = math.ceil(tokens / most)
        chunk = math.ceil(tokens / chunks)
        filled = jnp.pad(array, [(0, chunks * chunk - tokens), *[(0, 0)] * (array.ndim - 1)])
        return filled.reshape(chunks, chunk, *array.shape[1:])

    return jax.tree.map(split, arrays)


def _joined(arrays: Any) -> Any:
    """Joins [chunks, T, ...] to [chunks * T, ...]."""
    return jax.tree.map(lambda array: array.reshape(-1, *array.shape[2:]), arrays)
