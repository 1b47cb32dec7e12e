"""The lookups of `ibq_jax.ops.index_backprop` and their gradients without an [N, K] array, on one device or many.

Shapes: N tokens, K codes, D dimensions, C codes of a block, R runs of T consecutive tokens; in einsums n, k, d.
Logits are held as [C, N], codes first: the products of both gradients then transpose only the smaller operand.

Code k has a key e_k, a row of E [K, D], and a value w_k, a row of V [K, W]. A quantizer's values are its keys: V is E.
Both are scanned in blocks, three times, and a block's logits l = E z^T are computed again each time:

  pass 1, forward   m_n = max_k l_kn, its index i_n, and S_n = sum_k e^((l_kn - m_n)/tau), rescaled whenever m_n grows.

  pass 2, forward   Now log q_kn = (l_kn - m_n)/tau - log S_n is known. A block holds every token, so its means a over
                    the groups are final, and so is v = d batch_entropy / d a = -log(a + eps) - a/(a + eps). Sums:
                        s_n  = sum_k e^(l_kn - m_n)          p_kn = e^(l_kn - m_n) / s_n
                        mu_n = sum_k e^(l_kn - m_n) w_k
                        H_n  = -sum_k q_kn log q_kn = log S_n - sum_k q_kn (l_kn - m_n)/tau
                        u_n  = sum_k q_kn v_k

  pass 3, backward  With g = dL/dvalue, gs = dL/dsample_entropy, ga = dL/dbatch_entropy and r_n = g_n . mu_n / s_n
                        dl_kn = p_kn (g_n . w_k - r_n) + q_kn / (N tau) (ga (v_k - u_n) - gs (log q_kn + H_n))
                        dz = dl^T E          dE = dl z          dV = g_n added to row i_n

dl holds the derivatives of two softmaxes, x -> p (x - sum p x); r, u and H are their inner sums. Because v does not
depend on cotangents, the forward pass can compute u. The total is five products of N K D multiplications (l three
times, dz, dE), two of N K W (mu, g V^T) and five exponentials of N K elements. Kept between the passes: mu [N, W],
v [K, R] and six numbers per token.

Every column of dl sums to zero except for rounding, since g_n . w_k and r_n come from different products. For a
confident token nearly all of that excess lies in the winner's entry, p = 1 times a difference that should vanish, and
may outweigh the gradient itself. Pass 3 therefore also sums the columns, and subtracts the winner's share of the
excess, p_in times it, from that entry.

Entropy groups of G tokens need not match devices. A run is gcd(G, a device's tokens) tokens, so that both consist of
whole runs; a and v have one column per run, and the columns of runs of the same group are equal. If a device holds
whole groups, which are independent of each other, every pass takes them in chunks of about a thousand tokens, one after
another: blocks can then have more codes, and their columns need not be split into groups, which a TPU does by copying.

On a mesh, tokens are split over all axes and codes over the axis `codebook`. Each device gathers the tokens of its
neighbours along `codebook`, scans its own codes, and combines maxima and sums along that axis; values, mu and dz are
scattered back to the tokens' owners, and dE and dV are summed over the other axes.
"""

import dataclasses
import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from ibq_jax.base.sharding import CODEBOOK, DATA, FSDP, platform
from ibq_jax.ops.block_scan import (
    CODES,
    EQUAL,
    GATHERED,
    OWNED,
    BlockScan,
    add_rows,
    chunk_tokens,
    first_code,
    own_rows,
    per_token,
    product,
)

LOG_EPSILON = 1e-5  # eps, in the logarithm of the batch entropy, as in the released code
NO_CODE = jnp.iinfo(jnp.int32).max

CODES_BY_RUNS = P(CODEBOOK, (DATA, FSDP))


def streamed_nearest_codes(z: jax.Array, codebook: jax.Array, stream: BlockScan, precision: str) -> jax.Array:
    """Returns argmax_k of z E^T as computed at `precision`, [N] int32; the public functions check that sizes divide."""

    def local(z, codebook):
        z = lax.all_gather(z, stream.code_axes, tiled=True)

        def step(best, block):
            rows, codes = block
            return _improve(best, product("kd,nd->kn", rows, z, precision), codes), None

        best, _ = stream.scan(step, _no_best(z), (codebook, _own_codes(codebook, stream)))
        return _best_of_devices(best, stream)[1]

    return stream.on_devices(local, (OWNED, CODES), GATHERED)(z, codebook)


def streamed_lookup(
    z: jax.Array,
    keys: jax.Array,
    values: jax.Array | None,
    temperature: float,
    group_tokens: int,
    precisions: tuple[str, str],
    stream: BlockScan,
) -> tuple[jax.Array, ...]:
    """Returns the fields of `SoftLookup` in order. The public functions check beforehand that sizes divide.

    `values` are None if they are the keys. `precisions` are those of the logits and of the other products.
    """
    dtype = jnp.result_type(z, keys)
    plan = _Plan(temperature, group_tokens, z.shape[0], *precisions, stream)
    return _lookup(plan, z.astype(dtype), keys.astype(dtype), values)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """All static arguments of the passes."""

    temperature: float
    group_tokens: int
    tokens: int  # N, of all devices
    precision: str  # of the logits, a name from `ibq_jax.base.precision`
    gradient_precision: str  # of the other products
    stream: BlockScan


class _Saved(NamedTuple):
    """The results of passes 1 and 2 that pass 3 needs, with the letters of the module's docstring."""

    indices: jax.Array  # [N]
    m: jax.Array  # [N]
    s: jax.Array  # [N]
    log_s_tau: jax.Array  # [N]  log S
    h: jax.Array  # [N]
    u: jax.Array  # [N]
    mu: jax.Array  # [N, W]
    v: jax.Array  # [K, R]


SAVED = _Saved(*[GATHERED] * 6, mu=OWNED, v=CODES_BY_RUNS)  # pyright: ignore[reportArgumentType]: specs, not arrays


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _lookup(plan: _Plan, z: jax.Array, keys: jax.Array, values: jax.Array | None) -> tuple[jax.Array, ...]:
    return _forward(plan, z, keys, values)[0]


def _forward(plan: _Plan, z: jax.Array, keys: jax.Array, values: jax.Array | None):
    out_specs = (OWNED, GATHERED, EQUAL, EQUAL, EQUAL, EQUAL), SAVED
    run = plan.stream.on_devices(partial(_local_forward, plan), (OWNED, CODES, CODES), out_specs)
    outputs, saved = run(z, keys, values)
    return outputs, (z, keys, values, saved)


def _backward(plan: _Plan, residuals, cotangents):
    g, _, g_sample, g_avg, _, _ = cotangents  # indices and diagnostics have no gradient
    in_specs = (OWNED, CODES, CODES, SAVED, OWNED, EQUAL, EQUAL)
    run = plan.stream.on_devices(partial(_local_backward, plan), in_specs, (OWNED, CODES, CODES))
    return run(*residuals, g, g_sample, g_avg)


_lookup.defvjp(_forward, _backward)


def _local_forward(
    plan: _Plan, z: jax.Array, keys: jax.Array, values: jax.Array | None
) -> tuple[tuple[jax.Array, ...], _Saved]:
    stream = plan.stream
    z = lax.all_gather(z, stream.code_axes, tiled=True)
    m, indices, s_tau, largest = _maxima(plan, z, keys)
    log_s_tau = jnp.log(s_tau)
    s, mu, h, u, batch_entropy, v = _expectations(plan, z, keys, values, m, log_s_tau)

    _, chosen = own_rows(keys if values is None else values, indices, stream)
    value = lax.psum_scatter(chosen.astype(jnp.float32), stream.code_axes, tiled=True)
    sample_entropy = lax.psum(h.sum(), stream.token_axes) / plan.tokens
    max_probability = lax.psum((1 / s).sum(), stream.token_axes) / plan.tokens
    outputs = (value, indices, sample_entropy, batch_entropy, max_probability, largest)
    return outputs, _Saved(indices, m, s, log_s_tau, h, u, mu, v)


def _maxima(plan: _Plan, z: jax.Array, keys: jax.Array) -> tuple[jax.Array, ...]:
    """Runs pass 1: returns m, i, S [N], and the largest |l| []."""
    stream, tau = plan.stream, plan.temperature

    def chunk(z):
        def step(carry, block):
            best, s_tau, lowest = carry
            rows, codes = block
            logits = product("kd,nd->kn", rows, z, plan.precision)
            top = logits.max(axis=0)
            m = jnp.maximum(best[0], top)
            first, of_block = _first_and_sum(logits, codes, top, m, tau)
            improved = m, jnp.where(top > best[0], first, best[1])
            s_tau = s_tau * jnp.exp((best[0] - m) / tau) + of_block
            return (improved, s_tau, jnp.minimum(lowest, logits.min(axis=0))), None

        start = (_no_best(z), per_token(z, 0.0), per_token(z, jnp.inf))
        return stream.scan(step, start, (keys, _own_codes(keys, stream)))[0]

    best, s_tau, lowest = _joined(lax.map(chunk, _chunks(plan, z)))
    m, indices = _best_of_devices(best, stream)
    s_tau = lax.psum(s_tau * jnp.exp((best[0] - m) / tau), stream.code_axes)
    largest = lax.pmax(jnp.maximum(m, -lowest).max(), stream.token_axes + stream.code_axes)
    return m, indices, s_tau, largest


def _expectations(
    plan: _Plan, z: jax.Array, keys: jax.Array, values: jax.Array | None, m: jax.Array, log_s_tau: jax.Array
) -> tuple[jax.Array, ...]:
    """Runs pass 2: returns s [N], mu [N, W] of the device's own tokens, H and u [N], batch_entropy [] and v [K, R]."""
    stream, tau, run_tokens = plan.stream, plan.temperature, _run_tokens(plan, z)
    width = (keys if values is None else values).shape[1]

    def chunk(arrays):
        z, m, log_s_tau = arrays

        def step(carry, block):
            s, mu, q_below, u, a_log_a = carry
            rows, values = block
            below = product("kd,nd->kn", rows, z, plan.precision) - m[None]
            values = rows if values is None else values
            weight = jnp.exp(below)
            q = jnp.exp(below / tau - log_s_tau[None])
            a = _group_means(plan, q, run_tokens)
            log_a = jnp.log(a + LOG_EPSILON)
            v = -log_a - a / (a + LOG_EPSILON)
            sums = (
                s + weight.sum(axis=0),
                mu + product("kd,kn->dn", values, weight.astype(values.dtype), plan.gradient_precision),
                q_below + (q * below).sum(axis=0),
                u + (q * _to_tokens(v, run_tokens)).sum(axis=0),
                a_log_a + (a * log_a).sum(),
            )
            return sums, v

        zeros = per_token(z, 0.0)
        start = (zeros, jnp.broadcast_to(zeros, (width, zeros.shape[0])), zeros, zeros, zeros[0])
        (s, mu, q_below, u, a_log_a), v = stream.scan(step, start, (keys, values))
        return (s, mu.T, q_below, u), a_log_a, v

    sums, a_log_a, v = lax.map(chunk, _chunks(plan, (z, m, log_s_tau)))
    s, mu, q_below, u = _joined(sums)
    v = v.swapaxes(0, 1).reshape(keys.shape[0], -1)
    s, q_below, u = lax.psum((s, q_below, u), stream.code_axes)
    mu = lax.psum_scatter(mu, stream.code_axes, tiled=True)
    a_log_a = lax.psum(a_log_a.sum(), stream.token_axes + stream.code_axes)
    return s, mu, log_s_tau - q_below / tau, u, -a_log_a * run_tokens / plan.tokens, v


def _local_backward(plan: _Plan, z, keys, values, saved: _Saved, g, g_sample, g_avg) -> tuple[jax.Array | None, ...]:
    """Runs pass 3: returns dz of the device's own tokens, and dE and dV of its own codes."""
    stream, tau = plan.stream, plan.temperature
    r = lax.all_gather((g * saved.mu).sum(axis=1), stream.code_axes, tiled=True) / saved.s
    z = lax.all_gather(z, stream.code_axes, tiled=True)
    g = lax.all_gather(g, stream.code_axes, tiled=True)
    g_sample, g_avg = g_sample / (plan.tokens * tau), g_avg / (plan.tokens * tau)
    inner = g_avg * saved.u + g_sample * saved.h
    run_tokens = _run_tokens(plan, z)
    # A GPU writes dl to its memory for the two products after it, and half as much if they may round it to bfloat16.
    narrow = plan.gradient_precision == "bfloat16" and platform(stream.mesh) == "gpu"

    def multiplied(array):
        return array.astype(jnp.bfloat16) if narrow else array

    def as_multiplied(array):
        return lax.reduce_precision(array, 8, 7) if narrow else array  # which XLA keeps, unlike conversions

    def chunk(dkeys, arrays):
        (z, g, m, s, log_s_tau, r, inner), v = arrays

        def step(carry, block):
            dz, excess, dkeys = carry
            number, rows, values, v = block
            values = rows if values is None else values
            below = product("kd,nd->kn", rows, z, plan.precision) - m[None]
            p = jnp.exp(below) / s[None]
            through_p = p * (product("kd,nd->kn", values, g, plan.gradient_precision) - r[None])
            log_q = below / tau - log_s_tau[None]
            through_q = jnp.exp(log_q) * (_to_tokens(g_avg * v, run_tokens) - g_sample * log_q - inner[None])
            dl = multiplied((through_p + through_q).astype(z.dtype))
            dl = lax.optimization_barrier(dl) if narrow else dl  # else it would be written in float32, too
            first = number[0] * stream.block_size
            drows = product("kn,nd->kd", dl, multiplied(z), plan.gradient_precision)
            dkeys = add_rows(dkeys, drows, first, only_once=chunks == 1)
            dz += product("kd,kn->dn", multiplied(rows), dl, plan.gradient_precision)
            return (dz, excess + dl.sum(axis=0, dtype=jnp.float32), dkeys), None

        start = (jnp.zeros_like(z.T, jnp.float32), per_token(z, 0.0), dkeys)
        (dz, excess, dkeys), _ = stream.scan(step, start, (numbers, keys, values, v))
        return dkeys, (dz.T, excess)

    tokens = _chunks(
        plan, (z, g.astype(z.dtype if values is None else values.dtype), saved.m, saved.s, saved.log_s_tau, r, inner)
    )
    chunks = tokens[0].shape[0]
    v = saved.v.reshape(keys.shape[0], chunks, -1).swapaxes(0, 1)
    numbers = jnp.arange(keys.shape[0], dtype=jnp.int32) // stream.block_size

    def zeros(rows):
        return lax.pcast(jnp.zeros_like(rows, jnp.float32), stream.token_axes, to="varying")

    def add_at_winners(total, rows, like):
        total = total.at[own].add(rows, mode="drop", wrap_negative_indices=False)
        return lax.psum(total, stream.token_axes).astype(like.dtype)

    dkeys, by_chunks = lax.scan(chunk, zeros(keys), (tokens, v))
    dz, excess = _joined(by_chunks)
    p_winner = 1 / saved.s
    excess = (p_winner * lax.psum(excess, stream.code_axes))[:, None]
    own, winners = own_rows(keys, saved.indices, stream)
    dz = lax.psum_scatter(dz - excess * as_multiplied(winners), stream.code_axes, tiled=True).astype(z.dtype)
    from_excess = -excess * as_multiplied(z)
    if values is None:
        return dz, add_at_winners(dkeys, g + from_excess, keys), None
    return dz, add_at_winners(dkeys, from_excess, keys), add_at_winners(zeros(values), g, values)


def _chunks(plan: _Plan, arrays: Any) -> Any:
    """Splits [N, ...] into [chunks, N / chunks, ...]."""

    def split(array):
        at_once = chunk_tokens(array.shape[0], plan.group_tokens, plan.stream.mesh)
        return array.reshape(-1, at_once, *array.shape[1:])

    return jax.tree.map(split, arrays)


def _joined(arrays: Any) -> Any:
    """Joins [chunks, T, ...] to [N, ...]."""
    return jax.tree.map(lambda array: array.reshape(-1, *array.shape[2:]), arrays)


def _own_codes(codebook: jax.Array, stream: BlockScan) -> jax.Array:
    return first_code(codebook, stream) + jnp.arange(codebook.shape[0], dtype=jnp.int32)


def _no_best(z: jax.Array) -> tuple[jax.Array, jax.Array]:
    return per_token(z, -jnp.inf), jnp.zeros_like(z[:, 0], jnp.int32)


def _improve(best: tuple[jax.Array, jax.Array], logits: jax.Array, codes: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Updates the running maxima [N] and their codes [N] with a block of logits [C, N]; the first code wins a tie."""
    m, index = best
    top = logits.max(axis=0)

    def by_two_reductions(logits, codes):
        return _only_of_largest(codes, logits, top).min(axis=0)

    def by_argmax(logits, codes):
        return codes[lax.argmax(logits, 0, jnp.int32)]

    # XLA for TPUs computes an argmax along with the product before it; on CPUs it takes twice as long as the product.
    first = lax.platform_dependent(logits, codes, tpu=by_argmax, default=by_two_reductions)
    return jnp.maximum(m, top), jnp.where(top > m, first, index)


def _first_and_sum(logits, codes, top, m, tau: float) -> tuple[jax.Array, jax.Array]:
    """Returns the first code of a block whose logit is the largest, and the sum of e^((logits - m)/tau), both [N]."""

    def separately(logits, codes, top, m):
        return _only_of_largest(codes, logits, top).min(axis=0), jnp.exp((logits - m[None]) / tau).sum(axis=0)

    def together(logits, codes, top, m):
        operands = _only_of_largest(codes, logits, top), jnp.exp((logits - m[None]) / tau)
        starts = (jnp.int32(NO_CODE), jnp.zeros((), operands[1].dtype))
        return lax.reduce(operands, starts, lambda a, b: (jnp.minimum(a[0], b[0]), a[1] + b[1]), (0,))

    # XLA for TPUs and GPUs does not merge the two; on CPUs a reduction of pairs takes longer than both.
    return lax.platform_dependent(logits, codes, top, m, cpu=separately, default=together)


def _only_of_largest(codes: jax.Array, logits: jax.Array, top: jax.Array) -> jax.Array:
    """Returns codes [C] where a token's logit is its largest, `top` [N], and NO_CODE elsewhere, [C, N]."""
    return jnp.where(logits == top[None], codes[:, None], NO_CODE)


def _best_of_devices(best: tuple[jax.Array, jax.Array], stream: BlockScan) -> tuple[jax.Array, jax.Array]:
    m = lax.pmax(best[0], stream.code_axes)
    return m, lax.pmin(jnp.where(best[0] == m, best[1], NO_CODE), stream.code_axes)


def _run_tokens(plan: _Plan, z: jax.Array) -> int:
    return math.gcd(plan.group_tokens, z.shape[0])


def _group_means(plan: _Plan, q: jax.Array, run_tokens: int) -> jax.Array:
    """Returns [C, R]: for each run on this device, the mean of q [C, N] over the whole group of that run."""
    axes = plan.stream.token_axes
    shares = q.reshape(q.shape[0], -1, run_tokens).sum(axis=2) / plan.group_tokens
    if run_tokens == plan.group_tokens:
        return shares
    runs = lax.axis_index(axes) * shares.shape[1] + jnp.arange(shares.shape[1])
    groups = runs // (plan.group_tokens // run_tokens)
    means = jnp.zeros((q.shape[0], plan.tokens // plan.group_tokens)).at[:, groups].add(shares)
    return lax.psum(means, axes)[:, groups]


def _to_tokens(v: jax.Array, run_tokens: int) -> jax.Array:
    """Repeats a value per run, [C, R], for every token of the run, [C, N]."""
    return jnp.broadcast_to(v[:, :, None], (*v.shape, run_tokens)).reshape(v.shape[0], -1)
