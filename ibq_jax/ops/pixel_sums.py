"""Sums over pixels, of each image and of a whole batch.

Shapes: x [B, H, W, C] -> float32 [B, C] or [C].

A TPU's vector units take six times as long for a sum over the pixels of bfloat16 images as its memory does; its matrix
units, which multiply by a row of ones instead, take less (docs/speed.md). Elsewhere these are XLA's reductions.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from ibq_jax.base.sharding import batch_sharding

ROWS = 8  # of a TPU's vector registers: fewer rows of a matrix take as long


def image_sums(x: jax.Array, mesh: Mesh | None) -> jax.Array:
    """Returns the sums over the pixels of each image, [B, H, W, C] -> float32 [B, C].

    Args:
        x: the images; if they are bfloat16, TPUs sum them by matrix products, which are exact up to float32's rounding.
        mesh: the devices that share the batch, None for one.
    """
    if x.dtype != jnp.bfloat16:
        return _by_reduction(x)
    return lax.platform_dependent(x, tpu=partial(sums_by_products, mesh=mesh), default=_by_reduction)


def _by_reduction(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32).sum((1, 2))


def sums_by_products(x: jax.Array, mesh: Mesh | None) -> jax.Array:
    """Returns `image_sums` as a product with one row of zeros and ones for each image."""
    if mesh is None or x.shape[0] % mesh.size:
        return _one_product(x)
    # Each device multiplies its own images only: seen as a whole, the product has a row for every image of the batch.
    split = batch_sharding(mesh).spec
    return jax.shard_map(_one_product, mesh=mesh, in_specs=split, out_specs=split)(x)


def _one_product(x: jax.Array) -> jax.Array:
    images, height, width, _ = x.shape
    rows = jnp.eye(images, max(images, ROWS), dtype=x.dtype)
    rows = jnp.broadcast_to(rows[:, None, None], (images, height, width, rows.shape[1]))
    # Written as a convolution, because XLA computes a convolution's operands as it goes, and those of a product before.
    sums = lax.conv_general_dilated(
        rows,
        x,
        (1, 1),
        "VALID",
        dimension_numbers=("CHWN", "IHWO", "HWNC"),
        preferred_element_type=jnp.float32,
    )
    return sums[0, 0, :images]


@jax.custom_vjp
def add_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
    """Returns x [B, H, W, C] plus a bias [C], in the type of `x`; TPUs compute the bias's gradient by a product."""
    return x + bias.astype(x.dtype).reshape(1, 1, 1, -1)


def _add_forward(x, bias):
    return add_bias(x, bias), bias


def _add_backward(bias, dy):
    def by_reduction(dy):
        return dy.sum((0, 1, 2)).astype(bias.dtype)

    if dy.dtype != jnp.bfloat16:
        return dy, by_reduction(dy)
    return dy, lax.platform_dependent(dy, tpu=batch_sum_by_product, default=by_reduction).astype(bias.dtype)


add_bias.defvjp(_add_forward, _add_backward)


def batch_sum_by_product(x: jax.Array) -> jax.Array:
    """Returns the sum over all pixels of all images, [B, H, W, C] -> float32 [C], as a product with a row of ones."""
    ones = lax.broadcasted_iota(jnp.int32, (*x.shape[:3], ROWS), 3) == 0
    return jnp.einsum("bhwk,bhwc->kc", ones.astype(x.dtype), x, preferred_element_type=jnp.float32)[0]
