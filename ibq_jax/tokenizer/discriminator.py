"""The patch discriminator: PatchGAN (arXiv 1611.07004) with batch normalisation over a stated number of images.

Shapes: images [B, H, W, 3] -> one logit per patch [B, h', w', 1]; each batch norm sees groups of G consecutive images.
"""

from math import prod

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn.initializers import normal, zeros

from ibq_jax.base.errors import UsageError
from ibq_jax.tokenizer.autoencoder import Computing, Conv

RUNNING = "batch_stats"
RUNNING_MOMENTUM = 0.1
EPSILON = 1e-5
MAX_MULTIPLIER = 8


def _near_one(key, shape, dtype):
    return 1.0 + normal(0.02)(key, shape, dtype)


class GroupedBatchNorm(nn.Module):
    """BatchNorm that always uses the statistics of the current batch, separately for each group of `group` images.

    The running statistics (collection "batch_stats": mean, unbiased variance and number of calls) exist for exported
    checkpoints only: they are updated whenever the collection is mutable and never enter the output.
    """

    group: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = x.shape[-1]
        scale = self.param("scale", nn.with_logical_partitioning(_near_one, ("conv_out",)), (c,), jnp.float32)
        bias = self.param("bias", nn.with_logical_partitioning(zeros, ("conv_out",)), (c,), jnp.float32)
        grouped = x.astype(jnp.float32).reshape(-1, self.group, *x.shape[1:])
        mean = grouped.mean((1, 2, 3), keepdims=True)
        variance = grouped.var((1, 2, 3), keepdims=True)
        count = prod(grouped.shape[1:4])
        unbiased = variance * (count / max(count - 1, 1))
        self._update_running(mean.mean((0, 1, 2, 3)), unbiased.mean((0, 1, 2, 3)))
        normed = (grouped - mean) * jax.lax.rsqrt(variance + EPSILON)
        return (normed.reshape(x.shape) * scale.reshape(1, 1, 1, c) + bias.reshape(1, 1, 1, c)).astype(x.dtype)

    def _update_running(self, mean: jax.Array, variance: jax.Array) -> None:
        running_mean = self.variable(RUNNING, "mean", jnp.zeros, mean.shape)
        running_variance = self.variable(RUNNING, "var", jnp.ones, variance.shape)
        calls = self.variable(RUNNING, "num_batches_tracked", jnp.zeros, (), jnp.int32)
        if self.is_mutable_collection(RUNNING) and not self.is_initializing():
            running_mean.value += RUNNING_MOMENTUM * (jax.lax.stop_gradient(mean) - running_mean.value)
            running_variance.value += RUNNING_MOMENTUM * (jax.lax.stop_gradient(variance) - running_variance.value)
            calls.value += 1


class PatchDiscriminator(nn.Module):
    """A convolutional classifier of patches, images [B, H, W, 3] -> logits float32 [B, h', w', 1].

    All convolutions are 4x4: `num_layers` of stride 2, then two of stride 1; each doubles the channels, up to eight
    times `channels`. Each batch norm sees `norm_group` consecutive images (0: the whole batch). Raises UsageError if
    that does not divide the batch, or if the images are too small for the layers.
    """

    channels: int
    num_layers: int
    norm_group: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        b, h, w, _ = x.shape
        group = self.norm_group or b
        if b % group:
            raise UsageError(
                f"a batch of {b} images does not divide into groups of {group}; set discriminator.norm_group to a "
                f"divisor of {b}, or to 0 for the whole batch"
            )
        if min(h, w) < 3 * 2**self.num_layers:
            raise UsageError(
                f"discriminator.num_layers={self.num_layers} leaves no patch of {h}x{w} images; they need sides of "
                f"at least {3 * 2**self.num_layers} pixels, or fewer layers"
            )
        for i in range(self.num_layers + 2):
            last = i == self.num_layers + 1
            normed = 0 < i <= self.num_layers
            x = Conv(
                1 if last else self.channels * min(2**i, MAX_MULTIPLIER),
                4,
                stride=2 if i < self.num_layers else 1,
                padding=((1, 1), (1, 1)),
                use_bias=not normed,
                kernel_init=normal(0.02),
                computing=Computing(self.dtype),
                name=f"conv_{i}",
            )(x)
            if normed:
                x = GroupedBatchNorm(group, name=f"norm_{i}")(x)
            if not last:
                x = nn.leaky_relu(x, 0.2)
        return x.astype(jnp.float32)
