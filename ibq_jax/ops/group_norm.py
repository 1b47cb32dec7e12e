"""Group normalisation of images, followed by SiLU or not, with its gradient written out.

Shapes: x [B, H, W, C] in G groups of C / G consecutive channels (arXiv 1803.08494); scale and bias [C].

For an image's group of n values with mean m and variance v, r = 1 / sqrt(v + epsilon):

    xh = (x - m) r        z = scale xh + bias        y = z sigmoid(z), or z without SiLU

With dz = dL/dz, and sums over the pixels of an image t0 = sum dz, t1 = sum dz xh, both [B, C]:

    dscale = sum over images of t1        dbias = sum over images of t0
    dx = r (scale dz - mean over the group of (scale dz) - xh mean over the group of (scale dz xh))

so that two sums per image and channel are all that the gradient needs. Everything is float32 but x, y and their
gradients; of the activations only x is kept for the backward pass. Functions are jitted in order to be traced once for
each shape, as in `ibq_jax.ops.convolution`.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from ibq_jax.ops.pixel_sums import image_sums


class GroupNormForm(NamedTuple):
    """How to normalise: in `groups`, with or without SiLU, on the devices of `mesh` (None for one)."""

    groups: int
    epsilon: float
    silu: bool
    mesh: Mesh | None = None


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def group_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, form: GroupNormForm) -> jax.Array:
    """Returns x [B, H, W, C] normalised, scaled and shifted by [C], and through SiLU if asked, in the type of `x`."""
    return _forward(x, scale, bias, form)[0]


@partial(jax.jit, static_argnums=3, inline=True)
def _forward(x, scale, bias, form: GroupNormForm):
    mean, rstd = statistics(x, form)
    return normalise(x, mean, rstd, scale, bias, form), (x, mean, rstd, scale, bias)


def normalise(
    x: jax.Array, mean: jax.Array, rstd: jax.Array, scale: jax.Array, bias: jax.Array, form: GroupNormForm
) -> jax.Array:
    """Returns what `group_norm` does of x [B, H, W, C], any rows of the images whose statistics [B, C] are given."""
    z = _normalised(x, mean, rstd) * _of_channels(scale) + _of_channels(bias)
    y = z * jax.nn.sigmoid(z) if form.silu else z
    return y.astype(x.dtype)


@partial(jax.jit, static_argnums=0, inline=True)
def _backward(form: GroupNormForm, saved, dy):
    twice, once = (partial(_gradients, form=form, twice=twice) for twice in (True, False))
    return lax.platform_dependent(*saved, dy, cuda=twice, rocm=twice, default=once)


def _gradients(x, mean, rstd, scale, bias, dy, form: GroupNormForm, twice: bool):
    """Returns the gradients of x, scale and bias; `twice` computes dz a second time from x and dy, and stores none.

    A GPU waits for its memory: it would write and read dz in float32, as much as x and dy in bfloat16 together.
    """
    if twice:
        x = lax.optimization_barrier(x)  # else XLA may keep the exponential of the forward pass, in float32
        dz = _of_normalised(x, mean, rstd, scale, bias, dy, form)
        # The sums are one reduction, so that dz is computed within it. If they were not behind a barrier, XLA would
        # keep dz for the lines below, and sum it once more for the sums over the batch.
        summands = dz, dz * _normalised(x, mean, rstd)
        t0, t1 = lax.reduce(summands, (0.0, 0.0), lambda sums, more: (sums[0] + more[0], sums[1] + more[1]), (1, 2))
        x, dy, t0, t1 = lax.optimization_barrier((x, dy, t0, t1))
        dz = _of_normalised(x, mean, rstd, scale, bias, dy, form)
    else:
        dz = _of_normalised(x, mean, rstd, scale, bias, dy, form)
        dz = dz.astype(x.dtype).astype(jnp.float32)  # it is written once, and read by three
        xh = _normalised(x, mean, rstd)
        t0, t1 = (image_sums(summand.astype(x.dtype), form.mesh) for summand in (dz, dz * xh))
    pixels, scale = x.shape[1] * x.shape[2], scale.reshape(1, -1)
    mean_dz, mean_dz_xh = (_group_mean(scale * t, form.groups) / pixels for t in (t0, t1))
    # rstd * (scale * dz - mean_dz - xh * mean_dz_xh) with xh = (x - mean) * rstd, as one factor of dz and one of x
    of_x = -rstd * rstd * mean_dz_xh
    dx = _of_images(rstd * scale) * dz + _of_images(of_x) * x.astype(jnp.float32)
    dx -= _of_images(rstd * mean_dz + mean * of_x)
    return dx.astype(x.dtype), t1.sum(0), t0.sum(0)


def _of_normalised(x, mean, rstd, scale, bias, dy, form: GroupNormForm) -> jax.Array:
    """Returns dz, float32 in the shape of x."""
    dz = dy.astype(jnp.float32)
    if form.silu:
        z = _normalised(x, mean, rstd) * _of_channels(scale) + _of_channels(bias)
        gate = jax.nn.sigmoid(z)
        dz *= gate * (1 + z * (1 - gate))
    return dz


group_norm.defvjp(_forward, _backward)


def squared_sums(x: jax.Array, mean: jax.Array, form: GroupNormForm) -> jax.Array:
    """Returns the sums over pixels of (x - mean)^2, for x [B, H, W, C] and mean [B, C], float32 [B, C]."""
    return image_sums(jnp.square(x - _of_images(mean)), form.mesh)


def statistics(
    x: jax.Array, form: GroupNormForm, squared_sums: Callable[..., jax.Array] = squared_sums
) -> tuple[jax.Array, jax.Array]:
    """Returns (mean, 1 / standard deviation) of each image's groups, for each channel [B, C].

    `squared_sums` may compute what the function of that name does in another way; it is asked for float32 only.
    """
    pixels = x.shape[1] * x.shape[2]
    if x.dtype == jnp.bfloat16:
        # One pass, about the first pixel: the squares of what is left lose nothing where an image is flat.
        shift = x[:, 0, 0].astype(jnp.float32)
        squares = jnp.square(x.astype(jnp.float32) - _of_images(shift)).astype(x.dtype)
        means = image_sums(x, form.mesh) / pixels
        variances = jnp.maximum(image_sums(squares, form.mesh) / pixels - jnp.square(means - shift), 0.0)
        mean = _group_mean(means, form.groups)
        variance = _group_mean(variances + jnp.square(means - mean), form.groups)
    else:
        mean = _group_mean(image_sums(x, form.mesh) / pixels, form.groups)
        variance = _group_mean(squared_sums(x, mean, form) / pixels, form.groups)
    return mean, lax.rsqrt(variance + form.epsilon)


def _group_mean(values: jax.Array, groups: int) -> jax.Array:
    """[B, C] -> the mean over each group's channels, for each of them, [B, C]."""
    images, channels = values.shape
    means = values.reshape(images, groups, channels // groups).mean(2)
    return jnp.repeat(means, channels // groups, axis=1)


def _normalised(x: jax.Array, mean: jax.Array, rstd: jax.Array) -> jax.Array:
    return (x.astype(jnp.float32) - _of_images(mean)) * _of_images(rstd)


def _of_images(values: jax.Array) -> jax.Array:
    """[B, C] -> [B, 1, 1, C]."""
    return values[:, None, None]


def _of_channels(values: jax.Array) -> jax.Array:
    """[C] -> [1, 1, 1, C]."""
    return values.reshape(1, 1, 1, -1)
