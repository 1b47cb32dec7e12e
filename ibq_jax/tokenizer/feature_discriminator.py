"""Small heads on a frozen network's hidden maps that judge images together (StyleGAN-T, arXiv 2301.09515, section 3).

VAR and GigaTok train their tokenizers against such heads on DINO. Shapes: hidden maps of the network, finest first,
[B, h_m, w_m, C_m]; logits [B, h, w, M], one channel per map, at the finest map's positions.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from ibq_jax.base.errors import UsageError
from ibq_jax.tokenizer.autoencoder import Computing, Conv
from ibq_jax.tokenizer.discriminator import GroupedBatchNorm

SLOPE = 0.2


class FeatureHead(nn.Module):
    """A 1x1 and a residual 3x3 convolution, each normalised, and a 1x1 convolution: [B, h, w, C] -> [B, h, w, 1].

    In VAR the second one runs over the positions of a vision transformer as a line of 9; here maps are two-dimensional.
    """

    channels: int
    norm_group: int
    computing: Computing

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def block(x: jax.Array, size: int, number: int) -> jax.Array:
            x = Conv(self.channels, size, use_bias=False, computing=self.computing, name=f"conv_{number}")(x)
            return nn.leaky_relu(GroupedBatchNorm(self.norm_group, name=f"norm_{number}")(x), SLOPE)

        x = block(x, 1, 0)
        x = (x + block(x, 3, 1)) * 2**-0.5
        return Conv(1, 1, computing=self.computing, name="conv_2")(x)


class FeatureDiscriminator(nn.Module):
    """One head for each of the hidden maps [B, h_m, w_m, C_m] -> logits float32 [B, h, w, M].

    Logits of coarser maps are repeated over the finest map's positions, so that every head weighs the same. Each batch
    norm sees `norm_group` consecutive images (0: the whole batch). Raises UsageError if that does not divide the batch.
    """

    channels: int
    norm_group: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, maps: Sequence[jax.Array]) -> jax.Array:
        b, h, w, _ = maps[0].shape
        group = self.norm_group or b
        if b % group:
            raise UsageError(
                f"a batch of {b} images does not divide into groups of {group}; set discriminator.norm_group to a "
                f"divisor of {b}, or to 0 for the whole batch"
            )
        logits = []
        for number, hidden in enumerate(maps):
            head = FeatureHead(self.channels, group, Computing(self.dtype), name=f"head_{number}")
            logits.append(jax.image.resize(head(hidden).astype(jnp.float32), (b, h, w, 1), "nearest"))
        return jnp.concatenate(logits, axis=-1)
