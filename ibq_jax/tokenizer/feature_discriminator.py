"""Small heads on a frozen network's hidden maps that judge images together (StyleGAN-T, arXiv 2301.09515, section 3).

VAR (arXiv 2404.02905) and GigaTok (arXiv 2504.08736) train their tokenizers against such heads on DINO. Shapes: hidden
maps of the network, finest first, [B, h_m, w_m, C_m]; logits [B, h, w, M], one channel per map, at the finest map's
positions.
"""

from collections.abc import Sequence
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from ibq_jax.base.errors import UsageError
from ibq_jax.tokenizer.autoencoder import Computing, Conv
from ibq_jax.tokenizer.discriminator import GroupedBatchNorm

SLOPE = 0.2
MAPS, TOKENS = "maps", "tokens"  # how heads see a network's positions: in two dimensions, or one after the other
REACH = 4  # tokens to either side that a convolution along them sees


class FeatureHead(nn.Module):
    """A 1x1 and a wider residual convolution, each normalised, and a 1x1 convolution: [B, h, w, C] -> [B, h, w, 1].

    With form="maps" the wider one is 3x3. With "tokens" it is of 9 along the tokens of a vision transformer, row after
    row, the last of which is followed by the first again: StyleGAN-T's head, without the biases that batch norms undo.
    """

    channels: int
    norm_group: int
    form: str
    computing: Computing

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def block(x: jax.Array, number: int, size: int | tuple[int, int], padding=None) -> jax.Array:
            conv = partial(Conv, use_bias=False, computing=self.computing, name=f"conv_{number}")
            x = conv(self.channels, size, padding=padding)(x)
            return nn.leaky_relu(GroupedBatchNorm(self.norm_group, name=f"norm_{number}")(x), SLOPE)

        shape = x.shape
        if self.form == TOKENS:
            x = block(x.reshape(shape[0], 1, -1, shape[3]), 0, 1)
            around = jnp.pad(x, ((0, 0), (0, 0), (REACH, REACH), (0, 0)), mode="wrap")
            wide = block(around, 1, (1, 2 * REACH + 1), ((0, 0), (0, 0)))
        else:
            x = block(x, 0, 1)
            wide = block(x, 1, 3)
        logits = Conv(1, 1, computing=self.computing, name="conv_2")((x + wide) * 2**-0.5)
        return logits.reshape(*shape[:3], 1)


class FeatureDiscriminator(nn.Module):
    """One head for each of the hidden maps [B, h_m, w_m, C_m] -> logits float32 [B, h, w, M].

    Logits of coarser maps are repeated over the finest map's positions, so that every head weighs the same. Each batch
    norm sees `norm_group` consecutive images (0: the whole batch). `form` is that of `FeatureHead`. Raises UsageError
    if the group does not divide the batch.
    """

    channels: int
    norm_group: int
    form: str = MAPS
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
            head = FeatureHead(self.channels, group, self.form, Computing(self.dtype), name=f"head_{number}")
            logits.append(jax.image.resize(head(hidden).astype(jnp.float32), (b, h, w, 1), "nearest"))
        return jnp.concatenate(logits, axis=-1)
