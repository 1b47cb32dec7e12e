"""The residual discriminator of StyleGAN2 (arXiv 1912.04958, section 4.1 and appendix B), with plain weights.

Shapes: images [B, H, W, 3] -> logits [B, h', w', 1], one per image if it is a square whose side is a power of two.

Differences from StyleGAN2: weights are initialised as He et al. do instead of being scaled at every use, and the
minibatch's standard deviation is of consecutive images, which lie on one device.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn.initializers import variance_scaling

from ibq_jax.base.errors import UsageError
from ibq_jax.tokenizer.autoencoder import Computing, Conv
from ibq_jax.tokenizer.discriminator import MAX_MULTIPLIER

LAST_SIDE = 4  # pixels; halving ends when a side is not longer
FILTER = (0.125, 0.375, 0.375, 0.125)  # the blur before every second pixel is left out
SLOPE = 0.2
HE = variance_scaling(2 / (1 + SLOPE**2), "fan_in", "normal")
EPSILON = 1e-8
UNPADDED = ((0, 0), (0, 0))


def blur(x: jax.Array, padding: int, stride: int = 1) -> jax.Array:
    """Convolves images with `FILTER`, across and down, after `padding` zeros on every side.

    [B, H, W, C] -> [B, H + 2 padding - 3, W + 2 padding - 3, C], or every `stride`-th pixel of that.
    """
    x = jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    for axis in (1, 2):
        size = x.shape[axis] - len(FILTER) + 1
        shifted = (jax.lax.slice_in_dim(x, i, i + size, stride, axis) for i in range(len(FILTER)))
        x = sum((share * part for share, part in zip(FILTER, shifted, strict=True)), jnp.zeros((), x.dtype))
    return x


def minibatch_deviation(x: jax.Array, group: int) -> jax.Array:
    """Returns the standard deviation over groups of consecutive images, averaged over pixels and channels.

    [B, H, W, C] -> [B, H, W, 1] in the type of `x`: one number per group (arXiv 1710.10196, section 3).
    """
    grouped = x.astype(jnp.float32).reshape(-1, group, *x.shape[1:])
    deviation = jnp.mean(jnp.sqrt(jnp.var(grouped, axis=1) + EPSILON), axis=(1, 2, 3))
    return jnp.broadcast_to(jnp.repeat(deviation, group)[:, None, None, None], (*x.shape[:3], 1)).astype(x.dtype)


class Halving(nn.Module):
    """Two 3x3 convolutions that halve the resolution, and a shortcut; [B, H, W, any] -> [B, H/2, W/2, features]."""

    features: int
    computing: Computing

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        conv = partial(Conv, kernel_init=HE, computing=self.computing)
        unpadded = partial(conv, self.features, padding=UNPADDED)
        # With a stride of 2 the shortcut's kernel of one pixel would look at every second blurred pixel only.
        shortcut = unpadded(size=1, use_bias=False, name="shortcut")(blur(x, 1, stride=2))
        y = conv(x.shape[-1], 3, name="conv1")(x)
        y = unpadded(size=3, stride=2, name="conv2")(blur(nn.leaky_relu(y, SLOPE), 2))
        return (nn.leaky_relu(y, SLOPE) + shortcut) * 2**-0.5


class StyleDiscriminator(nn.Module):
    """StyleGAN2's classifier of images, [B, H, W, 3] -> logits float32 [B, h', w', 1].

    The resolution is halved until a side is at most 4; channels double each time, up to eight times `channels`. The
    deviation of `norm_group` consecutive images (0: of the whole batch) is one of the last channels. Raises UsageError
    if that does not divide the batch.
    """

    channels: int
    norm_group: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        group = self.norm_group or x.shape[0]
        if x.shape[0] % group:
            raise UsageError(
                f"a batch of {x.shape[0]} images does not divide into groups of {group}; set discriminator.norm_group "
                f"to a divisor of {x.shape[0]}, or to 0 for the whole batch"
            )
        computing, level, features = Computing(self.dtype), 0, self.channels
        conv = partial(Conv, kernel_init=HE, computing=computing)
        x = nn.leaky_relu(conv(features, 1, name="conv_in")(x), SLOPE)
        while min(x.shape[1:3]) > LAST_SIDE:
            level += 1
            features = self.channels * min(2**level, MAX_MULTIPLIER)
            x = Halving(features, computing, name=f"halving_{level}")(x)
        x = jnp.concatenate([x, minibatch_deviation(x, group)], axis=-1)
        x = nn.leaky_relu(conv(features, 3, name="conv_out")(x), SLOPE)
        x = nn.leaky_relu(conv(features, min(x.shape[1:3]), padding=UNPADDED, name="whole")(x), SLOPE)
        return Conv(1, 1, computing=computing, name="logit")(x).astype(jnp.float32)
