"""Normalisations that several frozen networks share.

Shapes: images [B, H, W, 3]; anything [..., C].
"""

import jax
import jax.numpy as jnp

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


def unit_channels(features: jax.Array) -> jax.Array:
    """Scales each position's channels [..., C] to length 1; if all are 0, they and their gradient stay 0."""
    squared = jnp.sum(features**2, axis=-1, keepdims=True)
    active = squared > 0
    length = jnp.sqrt(jnp.where(active, squared, 1.0))
    return jnp.where(active, features / (length + 1e-10), 0.0)
