"""Normalisations that several frozen networks share.

Shapes: images [B, H, W, 3]; anything else [..., C] or [B, H, W, C].
"""

import jax
import jax.numpy as jnp

from ibq_jax.base.precision import FULL

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's channels, in [0, 1]
EPSILON = 1e-6


def standardised(images: jax.Array) -> jax.Array:
    """Returns images in [0, 1] less ImageNet's mean, divided by its standard deviation, float32."""
    mean, deviation = (jnp.asarray(values, jnp.float32).reshape(1, 1, 1, 3) for values in (MEAN, DEVIATION))
    return (images.astype(jnp.float32) - mean) / deviation


def normalise_layer(layer: dict, x: jax.Array) -> jax.Array:
    """Applies a layer norm {"scale", "bias"} [C] to x [..., C], computed in float32; returns the type of `x`."""
    x32 = x.astype(jnp.float32)
    centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    normed = centred * jax.lax.rsqrt(jnp.mean(centred**2, axis=-1, keepdims=True) + EPSILON)
    scale, bias = (layer[name].astype(jnp.float32).reshape(*(1,) * (x.ndim - 1), -1) for name in ("scale", "bias"))
    return (normed * scale + bias).astype(x.dtype)


@jax.custom_vjp
def unit_channels(features: jax.Array) -> jax.Array:
    """Scales each position's channels [B, H, W, C] to length 1, float32; where all are 0, so is their gradient."""
    return _unit_forward(features)[0]


def _unit_forward(features: jax.Array):
    squared = _sums(jnp.square(features.astype(jnp.float32)), features.dtype)
    active = squared > 0
    length = jnp.sqrt(jnp.where(active, squared, 1.0))
    inverse = jnp.where(active, 1.0 / (length + 1e-10), 0.0)
    return features.astype(jnp.float32) * inverse, (features, inverse, length)


def _unit_backward(saved, gradient: jax.Array):
    """Returns r g - r^2 (f . g) f / |f| for features f with r = 1 / |f|."""
    features, inverse, length = saved
    along = _sums(features.astype(jnp.float32) * gradient, features.dtype) * inverse**2 / length
    return ((inverse * gradient - along * features.astype(jnp.float32)).astype(features.dtype),)


unit_channels.defvjp(_unit_forward, _unit_backward)


def _sums(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """[B, H, W, C] -> [B, H, W, 1], of summands that are rounded to `dtype`."""
    return weighted_channels(x.astype(dtype), jnp.ones(x.shape[-1], dtype))[..., None]


@jax.custom_vjp
def weighted_channels(x: jax.Array, weights: jax.Array) -> jax.Array:
    """Sums channels [B, H, W, C] with one weight [C] each, in float32 -> [B, H, W].

    TPUs do so by a product: in their vector registers the channels of a position lie side by side, and to add those
    takes far longer (docs/speed.md).
    """
    return jax.lax.platform_dependent(x, weights.astype(x.dtype), tpu=_by_convolution, default=_by_product)


def _by_product(x: jax.Array, weights: jax.Array) -> jax.Array:
    return jnp.einsum("bhwc,c->bhw", x, weights, precision=FULL, preferred_element_type=jnp.float32)


def _by_convolution(x: jax.Array, weights: jax.Array) -> jax.Array:
    # XLA computes a convolution's operands as it goes, and those of a product before.
    return jax.lax.conv_general_dilated(
        x,
        weights.reshape(1, 1, -1, 1),
        (1, 1),
        "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=FULL,
        preferred_element_type=jnp.float32,
    )[..., 0]


def _weighted_forward(x, weights):
    return weighted_channels(x, weights), (weights, jnp.zeros((), x.dtype))


def _weighted_backward(saved, gradient):
    """Returns x's gradient, an array of broadcasts; the weights are frozen, and theirs is not wanted."""
    weights, like = saved
    return (gradient[..., None] * weights.reshape(1, 1, 1, -1)).astype(like.dtype), jnp.zeros_like(weights)


weighted_channels.defvjp(_weighted_forward, _weighted_backward)
