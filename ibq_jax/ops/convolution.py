"""Convolutions of images, with a gradient of the kernel that suits each platform.

Shapes: x [B, H, W, C]; kernels [h, w, C, O]; results [B, H', W', O].

XLA for CPUs computes a kernel's gradient as a convolution whose window is a whole image, at a fifth to a half of the
speed of its matrix products. Here it is h * w matrix products over pixels, where there are enough channels. One device
takes some rows of pixels at a time in a loop, which stay in its cache; and since XLA runs a loop as a whole, it frees
x and dy after it instead of keeping those of all layers for products that it computes later (docs/speed.md).

Jitted functions here only spare Python: JAX traces them, with every platform's form, once for each shape instead of
once for each layer, and puts a copy of the result in its place (`inline`), so that the program is the same.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from ibq_jax.base.sharding import batch_sharding

NHWC = ("NHWC", "HWIO", "NHWC")
LEAST_CHANNELS = 128  # of both sides: products of fewer take longer than XLA's convolution
PIXELS_AT_ONCE = 2048  # of all images, in a product of the kernel's gradient
Padding = tuple[tuple[int, int], tuple[int, int]]


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5))
def convolve(
    x: jax.Array,
    kernel: jax.Array,
    stride: int,
    padding: Padding,
    precision: lax.Precision | None,
    mesh: Mesh | None = None,
):
    """Returns the convolution of x [B, H, W, C] with a kernel [h, w, C, O], [B, H', W', O].

    Args:
        x: the images.
        kernel: the weights, in the type of `x`.
        stride: pixels between windows, down and across.
        padding: zeros (above, below), (left, right).
        precision: how operands are multiplied, forward and backward (`ibq_jax.base.precision`).
        mesh: the devices that share the images, None for one.
    """
    return plain_convolution(x, kernel, stride, padding, precision)


def plain_convolution(x, kernel, stride, padding, precision):
    """Returns what `convolve` does, with XLA's own gradient."""
    return lax.conv_general_dilated(x, kernel, (stride, stride), padding, dimension_numbers=NHWC, precision=precision)


def _forward(x, kernel, stride, padding, precision, mesh):
    return plain_convolution(x, kernel, stride, padding, precision), (x, kernel)


@partial(jax.jit, static_argnums=(0, 1, 2, 3), inline=True)
def _backward(stride, padding, precision, mesh, saved, dy):
    x, kernel = saved
    plain = partial(plain_convolution, stride=stride, padding=padding, precision=precision)
    (dx,) = jax.vjp(lambda x: plain(x, kernel), x)[1](dy)

    def by_xla(x, dy):
        return jax.vjp(lambda kernel: plain(x, kernel), kernel)[1](dy)[0]

    def by_products(x, dy):
        # Several devices would add up their gradients in every turn of a loop.
        rows = _rows_at_once(dy.shape) if mesh is None or mesh.size == 1 else dy.shape[1]
        return kernel_gradient(x, dy, kernel.shape[:2], stride, padding, precision, rows)

    if min(kernel.shape[2:]) < LEAST_CHANNELS or stride > 1:
        return dx, by_xla(x, dy)
    return dx, lax.platform_dependent(x, dy, cpu=by_products, default=by_xla)


convolve.defvjp(_forward, _backward)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def convolve_doubled(
    x: jax.Array, kernel: jax.Array, precision: lax.Precision | None, mesh: Mesh | None = None
) -> jax.Array:
    """Returns the 3 x 3 convolution of images of twice the size, [B, H, W, C] -> [B, 2H, 2W, O].

    Each pixel is repeated, down and across, before the convolution with the kernel [3, 3, C, O], whose edges see zeros.
    TPUs convolve the images as they are (`_spread`), and nothing else is kept for the backward pass anywhere.
    """
    return _doubled_forward(x, kernel, precision, mesh)[0]


def _repeated(x, kernel, precision, mesh):
    doubled = x.repeat(2, axis=1).repeat(2, axis=2)
    if mesh is not None and x.shape[0] % mesh.size == 0:
        # Said once more, because the partitioner would rather split channels as the kernel's gradient is stored, and
        # gather the images of all devices for it.
        doubled = lax.with_sharding_constraint(doubled, batch_sharding(mesh))
    return convolve(doubled, kernel, 1, ((1, 1), (1, 1)), precision, mesh)


def _spread(x, kernel, precision):
    """Convolves pixels with zeros between them, instead of repeated ones, with the sum of the kernel at four places."""
    summed = _at_four_places(jnp.pad(kernel.astype(jnp.float32), ((1, 1), (1, 1), (0, 0), (0, 0))))
    return lax.conv_general_dilated(
        x,
        summed.astype(kernel.dtype),
        (1, 1),
        ((2, 2), (2, 2)),
        lhs_dilation=(2, 2),
        dimension_numbers=NHWC,
        precision=precision,
    )


@partial(jax.jit, static_argnums=(2, 3), inline=True)
def _doubled_forward(x, kernel, precision, mesh):
    spread, repeated = partial(_spread, precision=precision), partial(_repeated, precision=precision, mesh=mesh)
    return lax.platform_dependent(x, kernel, tpu=spread, default=repeated), (x, kernel)


@partial(jax.jit, static_argnums=(0, 1), inline=True)
def _doubled_backward(precision, mesh, saved, dy):
    def of_repeated(x, kernel, dy):
        return jax.vjp(partial(_repeated, precision=precision, mesh=mesh), x, kernel)[1](dy)

    return lax.platform_dependent(*saved, dy, tpu=partial(_spread_backward, precision=precision), default=of_repeated)


def _spread_backward(x, kernel, dy, precision):
    """Returns the gradients of `_spread`.

    With p a pixel of y, y[p] = sum_i x[i] s[2i - p + 2] for the summed kernel s, so that with b = 3 - a

        ds[a] = sum_i x[i] dy[2i - 1 + b]

    is a convolution of dy with x, whose pixels lie two apart. XLA by itself would reverse dy and write it once more.
    """
    (dx,) = jax.vjp(lambda x: _spread(x, kernel, precision), x)[1](dy)
    of_b = lax.conv_general_dilated(
        dy,
        x,
        (1, 1),
        ((1, 1), (1, 1)),
        rhs_dilation=(2, 2),
        dimension_numbers=("CHWN", "IHWO", "HWCN"),
        precision=precision,
    )
    return dx, _at_four_places(jnp.flip(of_b.astype(jnp.float32), (0, 1))).astype(kernel.dtype)


def _at_four_places(x: jax.Array) -> jax.Array:
    """Returns the sums of each four neighbours, [h, w, ...] -> [h - 1, w - 1, ...]."""
    return x[:-1, :-1] + x[1:, :-1] + x[:-1, 1:] + x[1:, 1:]


convolve_doubled.defvjp(_doubled_forward, _doubled_backward)


def kernel_gradient(
    x: jax.Array,
    dy: jax.Array,
    size: tuple[int, int],
    stride: int,
    padding: Padding,
    precision: lax.Precision | None,
    rows_at_once: int,
) -> jax.Array:
    """Returns the gradient [h, w, C, O] of a kernel of h x w pixels: for each, products [C, pixels] x [pixels, O].

    Args:
        x: the convolved images [B, H, W, C].
        dy: the gradient with respect to the result, [B, H', W', O].
        size: h and w.
        stride: as in `convolve`, like the next two.
        padding: see there.
        precision: see there.
        rows_at_once: rows of `dy`, of every image, in one product; a divisor of H'.
    """
    height, width = dy.shape[1:3]
    padded = jnp.pad(x, ((0, 0), *padding, (0, 0)))

    def of_rows(x, dy):
        rows_of_dy = dy.reshape(-1, dy.shape[-1])

        def of_pixel(i: int, j: int) -> jax.Array:
            rows, columns = (slice(k, k + stride * (n - 1) + 1, stride) for k, n in ((i, dy.shape[1]), (j, width)))
            rows_of_x = x[:, rows, columns].reshape(-1, x.shape[-1])
            return jnp.einsum("pc,po->co", rows_of_x, rows_of_dy, precision=precision)

        return jnp.stack([jnp.stack([of_pixel(i, j) for j in range(size[1])]) for i in range(size[0])])

    if rows_at_once == height:
        return of_rows(padded, dy)

    def add(total, first):
        under = stride * (rows_at_once - 1) + size[0]  # the kernel's rows, wherever it lies
        part_of_x = lax.dynamic_slice_in_dim(padded, stride * first, under, 1)
        return total + of_rows(part_of_x, lax.dynamic_slice_in_dim(dy, first, rows_at_once, 1)), None

    zeros = jnp.zeros((*size, x.shape[-1], dy.shape[-1]), x.dtype)
    return lax.scan(add, zeros, jnp.arange(0, height, rows_at_once))[0]


def _rows_at_once(shape: tuple[int, ...]) -> int:
    """Returns the largest divisor of H for which as many rows of [B, H, W, O] have `PIXELS_AT_ONCE` pixels, or 1."""
    images, height, width, _ = shape
    fitting = (rows for rows in range(height, 0, -1) if height % rows == 0 and images * rows * width <= PIXELS_AT_ONCE)
    return next(fitting, 1)
