"""A residual block of a large image in bands of rows, so that a CPU holds two of its arrays instead of three.

Shapes: x [B, H, W, C], the result [B, H, W, O]; kernels [3, 3, C, O] and [3, 3, O, O]; norms and biases by channel.

With s = SiLU and n1, n2 the group norms, the block is x + conv2(s(n2(conv1(s(n1(x)))))). Written out, each convolution
has its normalised input next to x and its own result: three arrays of the image's size, 13 GB for 2,048 x 2,048 pixels
of 256 channels. A norm needs sums over the whole image, but once they are known, a band of the convolution's result
needs its own rows and one more on each side. So the first convolution is written band by band to one new array, and
the second is added band by band to x itself, whose rows it no longer needs. Formulas are those of the plain block.

Only CPUs do so. Elsewhere, and in the backward pass, the block is the plain one.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ibq_jax.ops.convolution import plain_convolution
from ibq_jax.ops.group_norm import GroupNormForm, normalise, squared_sums, statistics

PIXELS_AT_ONCE = 2**15  # of an image, in a band: 16 rows of 2,048 pixels

Plain = Callable[[jax.Array, Mapping], jax.Array]  # the block on whole images, of x and the parameters


class BlockForm(NamedTuple):
    """How a block computes: its norms, its type (which x has), and how convolutions multiply operands."""

    norm: GroupNormForm
    dtype: Any
    precision: lax.Precision | None


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def residual_block(x: jax.Array, params: Mapping, form: BlockForm, plain: Plain) -> jax.Array:
    """Returns a residual block's result, [B, H, W, C] -> [B, H, W, O], in bands of rows on CPUs.

    Args:
        x: the images.
        params: {"norm1", "norm2": {"scale", "bias"}, "conv1", "conv2": {"kernel", "bias"}}, and "shortcut" as a
            convolution of one pixel if O is not C.
        form: how to compute.
        plain: the same block on whole images, for other machines and for the gradient.
    """
    return lax.platform_dependent(x, params, cpu=partial(_in_bands, form=form), default=plain)


def _forward(x, params, form, plain):
    return residual_block(x, params, form, plain), (x, params)


def _backward(form, plain, saved, dy):
    return jax.vjp(plain, *saved)[1](dy)


residual_block.defvjp(_forward, _backward)


def _in_bands(x: jax.Array, params: Mapping, form: BlockForm) -> jax.Array:
    x = x.astype(form.dtype)
    features = params["conv1"]["kernel"].shape[-1]
    hidden = jnp.zeros((*x.shape[:3], features), form.dtype)
    hidden = _each_band(_convolved(x, params["norm1"], params["conv1"], form), hidden)
    if "shortcut" in params:
        x = _convolve(x, params["shortcut"], ((0, 0), (0, 0)), form)
    return _each_band(_convolved(hidden, params["norm2"], params["conv2"], form), x, add=True)


def _convolved(x: jax.Array, norm: Mapping, conv: Mapping, form: BlockForm) -> Callable[..., jax.Array]:
    """Returns a function of (first row, rows, rows above, rows below) that gives those rows of the convolution of x,
    normalised.

    One row above and below is 1, or 0 at the image's edge, where the convolution sees zeros.
    """
    mean, rstd = statistics(x, form.norm, _squared_sums)

    def rows_of(first: Any, rows: int, above: int, below: int) -> jax.Array:
        band = lax.dynamic_slice_in_dim(x, first - above, rows + above + below, 1)
        normed = normalise(band, mean, rstd, norm["scale"], norm["bias"], form.norm)
        return _convolve(normed, conv, ((1 - above, 1 - below), (1, 1)), form)

    return rows_of


def _squared_sums(x: jax.Array, mean: jax.Array, form: GroupNormForm) -> jax.Array:
    """Computes `squared_sums` band by band, because XLA may write x - mean down as a whole."""
    rows, bands = _bands(x.shape)

    def of_rows(first: Any, rows: int) -> jax.Array:
        return squared_sums(lax.dynamic_slice_in_dim(x, first, rows, 1), mean, form)

    total = lax.fori_loop(0, bands - 1, lambda i, total: total + of_rows(i * rows, rows), jnp.zeros_like(mean))
    return total + of_rows((bands - 1) * rows, x.shape[1] - (bands - 1) * rows)


def _bands(shape: tuple[int, ...]) -> tuple[int, int]:
    """Returns the rows of a band of images [B, H, W, C], and how many bands there are; the last may have fewer rows."""
    _, height, width, _ = shape
    rows = max(1, min(PIXELS_AT_ONCE // width, height // 2))
    return rows, -(-height // rows)


def _convolve(x: jax.Array, conv: Mapping, padding, form: BlockForm) -> jax.Array:
    y = plain_convolution(x, conv["kernel"].astype(form.dtype), 1, padding, form.precision)
    return y + conv["bias"].astype(form.dtype).reshape(1, 1, 1, -1)


def _each_band(rows_of: Callable[..., jax.Array], target: jax.Array, add: bool = False) -> jax.Array:
    """Returns `target` [B, H, W, O] with its rows replaced by those of a function, or with them added to it.

    The first band and the last one, which may be shorter, have no row on one side.
    """
    rows, bands = _bands(target.shape)
    last = (bands - 1) * rows

    def write(target: jax.Array, first: Any, rows: int, above: int, below: int) -> jax.Array:
        band = rows_of(first, rows, above, below)
        if add:
            band = lax.dynamic_slice_in_dim(target, first, rows, 1) + band
        return lax.dynamic_update_slice_in_dim(target, band, first, 1)

    if bands == 1:
        return write(target, 0, rows, 0, 0)
    target = write(target, 0, rows, 0, 1)
    if bands > 2:
        target = lax.fori_loop(1, bands - 1, lambda i, target: write(target, i * rows, rows, 1, 1), target)
    return write(target, last, target.shape[1] - last, 1, 0)
