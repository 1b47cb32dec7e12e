"""Convolutions of images, with a gradient of the kernel that suits each platform.

Shapes: x [B, H, W, C]; kernels [h, w, C, O]; results [B, H', W', O].

XLA for CPUs computes a kernel's gradient as a convolution whose window is a whole image, at a fifth to a half of the
speed of its matrix products. Here it is h * w matrix products over all pixels, where there are enough channels
(docs/speed.md has the figures).
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

NHWC = ("NHWC", "HWIO", "NHWC")
LEAST_CHANNELS = 128  # of both sides: products of fewer take longer than XLA's convolution
Padding = tuple[tuple[int, int], tuple[int, int]]


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def convolve(x: jax.Array, kernel: jax.Array, stride: int, padding: Padding, precision: lax.Precision | None):
    """Returns the convolution of x [B, H, W, C] with a kernel [h, w, C, O], [B, H', W', O].

    Args:
        x: the images.
        kernel: the weights, in the type of `x`.
        stride: pixels between windows, down and across.
        padding: zeros (above, below), (left, right).
        precision: how operands are multiplied, forward and backward (`ibq_jax.base.precision`).
    """
    return plain_convolution(x, kernel, stride, padding, precision)


def plain_convolution(x, kernel, stride, padding, precision):
    """Returns what `convolve` does, with XLA's own gradient."""
    return lax.conv_general_dilated(x, kernel, (stride, stride), padding, dimension_numbers=NHWC, precision=precision)


def _forward(x, kernel, stride, padding, precision):
    return plain_convolution(x, kernel, stride, padding, precision), (x, kernel)


def _backward(stride, padding, precision, saved, dy):
    x, kernel = saved
    plain = partial(plain_convolution, stride=stride, padding=padding, precision=precision)
    (dx,) = jax.vjp(lambda x: plain(x, kernel), x)[1](dy)

    def by_xla(x, dy):
        return jax.vjp(lambda kernel: plain(x, kernel), kernel)[1](dy)[0]

    def by_products(x, dy):
        return kernel_gradient(x, dy, kernel.shape[:2], stride, padding, precision)

    if min(kernel.shape[2:]) < LEAST_CHANNELS or stride > 1:
        return dx, by_xla(x, dy)
    return dx, lax.platform_dependent(x, dy, cpu=by_products, default=by_xla)


convolve.defvjp(_forward, _backward)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def convolve_doubled(x: jax.Array, kernel: jax.Array, precision: lax.Precision | None) -> jax.Array:
    """Returns the 3 x 3 convolution of images of twice the size, [B, H, W, C] -> [B, 2H, 2W, O].

    Each pixel is repeated, down and across, before the convolution with the kernel [3, 3, C, O], whose edges see zeros.
    TPUs convolve the images as they are (`_spread`), and nothing else is kept for the backward pass anywhere.
    """
    return lax.platform_dependent(
        x, kernel, tpu=partial(_spread, precision=precision), default=partial(_repeated, precision=precision)
    )


def _repeated(x, kernel, precision):
    return convolve(x.repeat(2, axis=1).repeat(2, axis=2), kernel, 1, ((1, 1), (1, 1)), precision)


def _spread(x, kernel, precision):
    """Convolves pixels with zeros between them, instead of repeated ones, with the sum of the kernel at four places."""
    padded = jnp.pad(kernel.astype(jnp.float32), ((1, 1), (1, 1), (0, 0), (0, 0)))
    summed = padded[:-1, :-1] + padded[1:, :-1] + padded[:-1, 1:] + padded[1:, 1:]
    return lax.conv_general_dilated(
        x,
        summed.astype(kernel.dtype),
        (1, 1),
        ((2, 2), (2, 2)),
        lhs_dilation=(2, 2),
        dimension_numbers=NHWC,
        precision=precision,
    )


def _doubled_forward(x, kernel, precision):
    return convolve_doubled(x, kernel, precision), (x, kernel)


def _doubled_backward(precision, saved, dy):
    def of(form):
        return lambda x, kernel, dy: jax.vjp(partial(form, precision=precision), x, kernel)[1](dy)

    return lax.platform_dependent(*saved, dy, tpu=of(_spread), default=of(_repeated))


convolve_doubled.defvjp(_doubled_forward, _doubled_backward)


def kernel_gradient(
    x: jax.Array, dy: jax.Array, size: tuple[int, int], stride: int, padding: Padding, precision: lax.Precision | None
) -> jax.Array:
    """Returns the gradient [h, w, C, O] of a kernel of h x w pixels: for each, one product [C, pixels] x [pixels, O].

    Args:
        x: the convolved images [B, H, W, C].
        dy: the gradient with respect to the result, [B, H', W', O].
        size: h and w.
        stride, padding, precision: as in `convolve`.
    """
    height, width = dy.shape[1:3]
    rows_of_dy = dy.reshape(-1, dy.shape[-1])
    padded = jnp.pad(x, ((0, 0), *padding, (0, 0)))

    def of_pixel(i: int, j: int) -> jax.Array:
        rows, columns = (slice(k, k + stride * (n - 1) + 1, stride) for k, n in ((i, height), (j, width)))
        rows_of_x = padded[:, rows, columns].reshape(-1, x.shape[-1])
        return jnp.einsum("pc,po->co", rows_of_x, rows_of_dy, precision=precision)

    return jnp.stack([jnp.stack([of_pixel(i, j) for j in range(size[1])]) for i in range(size[0])])
