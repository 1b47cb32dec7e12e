"""Finds the code with the largest dot product exactly, at little more than the cost of one low-precision product.

Full float32 products cost a TPU six bfloat16 passes, and a GPU up to fifteen times a bfloat16 product. Here a fast pass
rules out nearly all codes, and only the few that remain are compared, without rounding errors that matter:

  1. Fast pass. Products l'_kn = z'_n . e'_k of operands rounded to bfloat16 (on CPUs: not rounded), of which only the
     maximum of each group of W codes is kept. By Cauchy-Schwarz, and with the usual bound for a sum of D terms,

         |l'_kn - l_kn| <= |z_n - z'_n| B + |z_n| max_k |e_k - e'_k| + g |z_n| B  =: bound_n,   B >= |e_k|, |e'_k|

     so that a group whose maximum lies more than 2 bound_n below the largest does not hold the largest product. The
     codes of up to T remaining groups are compared in float32, where only the last term of the bound is left.
  2. Tokens with more than T groups left are searched again, with full float32 products in the fast pass.
  3. Tokens with up to F codes that float32 cannot tell apart: these codes are compared in three times its precision.
  4. Tokens with more such codes: all codes are looked through once more, and all such codes are compared.

Few tokens need the second and third step, and hardly any the fourth, which is slow: tokens for which more than F codes
agree to float32's rounding error. The result depends on neither blocks, batch, devices nor machine.

Before all this, latents and codebook are multiplied by powers of two, so that nothing overflows. Numbers below
float32's normal range count as zero, as they do in all of XLA's programs. A latent with a NaN gets code 0.

Shapes: N tokens, K codes of one device, D dimensions; S codes of a block; group g = (o, s) holds the W codes
(o W + w) S + s, so that group maxima are maxima of whole blocks, which compilers fuse into the product.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ibq_jax.base.precision import compute_dtype
from ibq_jax.ops.block_scan import CODES, GATHERED, OWNED, BlockScan, first_code, per_token, product

TOKENS_AT_ONCE = 1024  # bounds the memory of the group maxima
GROUPS_COMPARED = 4  # T
FINALISTS = 4  # F
TOKENS_OF_A_CROWD = 16  # that the fourth step takes at once; more would make it compare more codes in vain
# Parts of the names that operations have in compiled programs.
FAST_PASS = "fast_pass"
FOR_FEW = "search_again"  # the loops over the few tokens that need the second and third step
NO_CODE = jnp.iinfo(jnp.int32).max
UPPER_HALF = 0xFFFFF000  # of a float32's bits: sign, exponent and the first 12 of 24 significant bits


class _Found(NamedTuple):
    """The best code of each token among those of one device, as far as it is known."""

    high: jax.Array  # [N] the best product, rounded to float32
    rest: tuple[jax.Array, ...]  # [N] twice: the rest of that product, once it has been compared exactly
    error: jax.Array  # [N] bounds the error of `high`
    unseen: jax.Array  # [N] an upper bound of the products that were not compared; -inf if all others are smaller
    codes: jax.Array  # [N, F] int32, the device's rows whose products float32 cannot tell from the best, ascending


def exact_nearest_codes(z: jax.Array, codebook: jax.Array, stream: BlockScan, fast: str) -> jax.Array:
    """Returns argmax_k of z E^T, [N] int32; on a tie the smallest index.

    Args:
        z: [N, D], float32 or bfloat16.
        codebook: [K, D], float32 or bfloat16.
        stream: how to scan; the public functions check beforehand that sizes divide.
        fast: how the fast pass multiplies: "bfloat16", or "float32", which is faster on CPUs.
    """

    def local(z, codebook):
        z = lax.all_gather(z.astype(jnp.float32), stream.code_axes, tiled=True)
        z, codebook = z * _inverse_power(jnp.abs(z).max(axis=1, keepdims=True)), codebook.astype(jnp.float32)
        scale = _inverse_power(lax.pmax(jnp.abs(codebook).max(), stream.code_axes))
        found = _search(z, codebook, scale, stream, fast)
        with jax.named_scope(FOR_FEW):
            if fast != "float32":
                again = partial(_search, codebook=codebook, scale=scale, stream=stream, precision="float32")
                found = _replace(found, _unsure(found, stream), z, lambda z, _: again(z))
            crowded = _unsure(found, stream)
            tied = ~crowded & (_contenders(found, stream) > 1)
            few = partial(_compare_few, codebook=codebook, scale=scale)
            all_near = partial(_compare_all, codebook=codebook, scale=scale, size=stream.block_size)
            found = _replace(found, tied, z, few)
            found = _replace(found, crowded, z, all_near, TOKENS_OF_A_CROWD)
        return _best_of_devices(found, codebook, stream)

    return stream.on_devices(local, (OWNED, CODES), GATHERED)(z, codebook)


def _search(z: jax.Array, codebook: jax.Array, scale: jax.Array, stream: BlockScan, precision: str) -> _Found:
    """Runs the first step for all tokens [N, D], at most `TOKENS_AT_ONCE` at a time."""
    if precision == "float32":
        rows, rounded = codebook, jnp.float32(0)
    else:
        rows = (codebook * scale).astype(compute_dtype(precision))
        rounded = _length(codebook * scale - rows.astype(jnp.float32)).max()
    longest = _length(codebook * scale).max() + rounded
    summation_share = 4 * (z.shape[1] + 8) * jnp.finfo(jnp.float32).eps * longest

    def chunk(z):
        z_rounded, length = z.astype(rows.dtype), _length(z)
        error = summation_share * length
        bound = _length(z - z_rounded.astype(jnp.float32)) * longest + length * rounded + error
        with jax.named_scope(f"{precision}_{FAST_PASS}"):
            best, maxima, group = _group_maxima(z_rounded, rows, scale, stream.block_size)
        numbers = jnp.arange(maxima.shape[0], dtype=jnp.int32)[:, None]
        groups, all_groups = _largest(maxima, numbers, best, 2 * bound, GROUPS_COMPARED)
        products, codes = _group_products(z, codebook, scale, groups, stream.block_size, group)
        high = products.max(axis=0)
        finalists, all_codes = _largest(products, codes, high, 2 * error, FINALISTS)
        complete = (all_groups & all_codes) | (bound == 0)  # without a bound, all products are zero
        unseen = jnp.where(complete, -jnp.inf, best + bound)
        return _Found(high, (jnp.zeros_like(high),) * 2, error, unseen, finalists.T)

    return _in_chunks(chunk, z)


def _group_maxima(z: jax.Array, rows: jax.Array, scale: jax.Array, size: int) -> tuple[jax.Array, jax.Array, int]:
    """Returns the largest product of all [N], that of every group [groups, N], and W."""
    blocks = rows.shape[0] // size
    # About as much time then goes into looking through the maxima as into comparing the codes of the groups left.
    most = max(1, math.isqrt(rows.shape[0] // 256))
    group = max(width for width in range(1, most + 1) if blocks % width == 0)

    start = jnp.broadcast_to(per_token(z, -jnp.inf) + 0 * scale, (size, z.shape[0]))

    def maxima(best, first):
        def larger(number, maxima):
            block = lax.dynamic_slice_in_dim(rows, (first + number) * size, size)
            block = block * scale if rows.dtype == jnp.float32 else block
            return jnp.maximum(maxima, product("kd,nd->kn", block, z))

        maxima = lax.fori_loop(0, group, larger, start)
        return jnp.maximum(best, maxima), maxima

    best, maxima = lax.scan(maxima, start, jnp.arange(0, blocks, group))
    return best.max(axis=0), maxima.reshape(-1, z.shape[0]), group


def _group_products(
    z: jax.Array, codebook: jax.Array, scale: jax.Array, groups: jax.Array, size: int, group: int
) -> tuple[jax.Array, jax.Array]:
    """Returns the float32 products and the codes of the given groups' rows, [T W, N]; -inf for `NO_CODE`."""
    outer, inner = jnp.divmod(jnp.where(groups == NO_CODE, 0, groups), size)
    codes = (outer[None] * group + jnp.arange(group, dtype=jnp.int32)[:, None, None]) * size + inner[None]  # [W, T, N]
    products = _products(z, codebook, scale, codes)
    products = jnp.where(groups[None] == NO_CODE, -jnp.inf, products)
    return products.reshape(-1, z.shape[0]), codes.reshape(-1, z.shape[0])


def _products(z: jax.Array, codebook: jax.Array, scale: jax.Array, codes: jax.Array) -> jax.Array:
    """Returns the float32 products of tokens z [N, D] with the rows `codes` [W, T, N]."""
    return (codebook[codes] * scale * z[None, None]).sum(axis=-1)


def _compare_few(z: jax.Array, found: _Found, *, codebook: jax.Array, scale: jax.Array) -> _Found:
    """Compares the finalists' products exactly; all codes of the result are the best one."""
    rows = codebook[jnp.where(found.codes == NO_CODE, 0, found.codes)] * scale  # [N, F, D]
    products = _exact_product(*(jnp.moveaxis(factor, -1, 0) for factor in (rows, z[:, None])))
    return _decided(found, *_first_largest(products, found.codes, axis=1))


def _compare_all(z: jax.Array, found: _Found, *, codebook: jax.Array, scale: jax.Array, size: int) -> _Found:
    """Compares the products of all codes that float32 cannot tell from the best exactly."""
    floor = found.high - 2 * found.error

    def block(best, first):
        rows = lax.dynamic_slice_in_dim(codebook, first, size) * scale
        near = product("kd,nd->kn", rows, z) >= floor[None]

        def compare(best):
            codes = jnp.where(near, first + jnp.arange(size, dtype=jnp.int32)[:, None], NO_CODE)
            of_block = _first_largest(_exact_product(rows.T[:, :, None], z.T[:, None]), codes, axis=0)
            return _first_largest(*jax.tree.map(lambda *arrays: jnp.stack(arrays), best, of_block), axis=0)

        return lax.cond(near.any(), compare, lambda best: best, best), None

    best = ((found.high, *found.rest), jnp.maximum(found.codes[:, 0], NO_CODE))  # none yet
    best, _ = lax.scan(block, best, jnp.arange(0, codebook.shape[0], size, dtype=jnp.int32))
    return _decided(found, *best)


def _decided(found: _Found, best: tuple[jax.Array, ...], code: jax.Array) -> _Found:
    """Returns what is known of tokens whose best code of this device [N], with its exact product, was found."""
    return found._replace(high=best[0], rest=best[1:], codes=jnp.broadcast_to(code[:, None], found.codes.shape))


def _first_largest(
    products: tuple[jax.Array, ...], codes: jax.Array, axis: int
) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """Returns the largest of exact products along an axis, and the smallest code that has it; `NO_CODE` is left out."""
    left, largest = codes != NO_CODE, []
    for part in products:
        part = jnp.where(left, part, -jnp.inf)
        largest.append(part.max(axis=axis, keepdims=True))
        left &= part == largest[-1]
    return tuple(part.squeeze(axis) for part in largest), jnp.where(left, codes, NO_CODE).min(axis=axis)


def _exact_product(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the dot products over the first axis as a sum of three, with about three times float32's precision.

    Every factor is cut into two halves of 12 bits, whose products are exact. The rounding error of each addition, also
    a float32, is added to a second sum, whose errors are added up in a third (Ogita, Rump, Oishi 2005). No rounded
    product is ever added, so a compiler that contracts multiplications and additions changes nothing.
    """

    def add(total, factors):
        high, middle, low = total
        high, error = _sum_and_error(high, factors[0] * factors[1])
        middle, error = _sum_and_error(middle, error)
        return (high, middle, low + error), None

    start = jnp.zeros_like(a[0] * b[0])
    (a1, a2), (b1, b2) = _halves(a), _halves(b)
    factors = jnp.concatenate((a1, a1, a2, a2)), jnp.concatenate((b1, b2, b1, b2))
    high, middle, low = lax.scan(add, (start,) * 3, factors)[0]
    high, middle = _sum_and_error(high, middle)
    middle, low = _sum_and_error(middle, low)
    high, middle = _sum_and_error(high, middle)
    return high, *_sum_and_error(middle, low)


def _halves(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    bits = lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(UPPER_HALF)
    upper = lax.bitcast_convert_type(bits, jnp.float32)
    return upper, x - upper


def _sum_and_error(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the rounded sum and its rounding error (Knuth's two-sum)."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def _in_chunks(function: Callable[[jax.Array], Any], z: jax.Array) -> Any:
    """Applies a function of tokens [n, D] to chunks of z [N, D], and joins its results [n, ...]."""
    tokens = z.shape[0]
    chunks = -(-tokens // TOKENS_AT_ONCE)
    size = -(-tokens // chunks)
    z = jnp.pad(z, ((0, chunks * size - tokens), (0, 0))).reshape(chunks, size, -1)
    return jax.tree.map(lambda rows: rows.reshape(-1, *rows.shape[2:])[:tokens], lax.map(function, z))


def _replace(
    found: _Found,
    chosen: jax.Array,
    z: jax.Array,
    function: Callable[[jax.Array, _Found], _Found],
    at_once: int = TOKENS_AT_ONCE,
) -> _Found:
    """Replaces what was found for the chosen tokens [N] by function(their latents, what was found), some at a time.

    Tokens that are not chosen may fill up the last time; what the function returns is as true of them.
    """
    size = min(at_once, z.shape[0])

    def replace(carry):
        found, left = carry
        _, tokens = lax.top_k(left.astype(jnp.int32), size)
        new = function(z[tokens], jax.tree.map(lambda array: array[tokens], found))
        found = jax.tree.map(lambda old, new: old.at[tokens].set(new), found, new)
        return found, left.at[tokens].set(False)

    return lax.while_loop(lambda carry: carry[1].any(), replace, (found, chosen))[0]


def _unsure(found: _Found, stream: BlockScan) -> jax.Array:
    """Returns for each token whether a code that was not compared may have the largest product."""
    largest = lax.pmax(found.high - found.error, stream.code_axes)  # at least
    return lax.pmax(found.unseen, stream.code_axes) >= largest


def _contenders(found: _Found, stream: BlockScan) -> jax.Array:
    """Returns for each token how many finalists on all devices may have the largest product."""
    floor = lax.pmax(found.high, stream.code_axes) - 2 * lax.pmax(found.error, stream.code_axes)
    own = jnp.where(found.high >= floor, (found.codes != NO_CODE).sum(axis=1), 0)
    return lax.psum(own, stream.code_axes)


def _best_of_devices(found: _Found, codebook: jax.Array, stream: BlockScan) -> jax.Array:
    is_best = found.codes[:, 0] != NO_CODE
    for part in (found.high, *found.rest):
        part = jnp.where(is_best, part, -jnp.inf)
        is_best &= part == lax.pmax(part, stream.code_axes)
    code = jnp.where(is_best, found.codes[:, 0] + first_code(codebook, stream), NO_CODE)
    code = lax.pmin(code, stream.code_axes)
    return jnp.where(code == NO_CODE, 0, code)


def _largest(
    values: jax.Array, numbers: jax.Array, best: jax.Array, margin: jax.Array, count: int
) -> tuple[jax.Array, jax.Array]:
    """Returns the numbers of the values within `margin` of the best, [count, N] ascending, and whether these are all.

    If there are more than `count`, only values equal to the best are taken. `NO_CODE` stands where there are fewer.
    values: [M, N]; numbers: [M, N] or [M, 1]; best, margin: [N].
    """
    near = values >= (best - margin)[None]
    complete = near.sum(axis=0, dtype=jnp.int32) <= count
    floor = jnp.where(complete, best - margin, best)[None]

    def next_one(last, _):
        last = jnp.where((values >= floor) & (numbers > last), numbers, NO_CODE).min(axis=0, keepdims=True)
        return last, last[0]

    before = jnp.where(complete, -1, -1)[None]
    _, found = lax.scan(next_one, before, length=count)
    return found, complete


def _length(vectors: jax.Array) -> jax.Array:
    """Returns Euclidean lengths over the last axis, rounded up generously."""
    return jnp.sqrt((vectors * vectors).sum(axis=-1)) * (1 + 2.0**-10)


def _inverse_power(x: jax.Array) -> jax.Array:
    """Returns the power of two 2^-n for positive x in [2^n, 2^(n+1)), within float32's normal range."""
    exponent = jnp.clip(lax.bitcast_convert_type(x, jnp.uint32) >> 23, 1, 253)
    return lax.bitcast_convert_type((254 - exponent) << 23, jnp.float32)
