"""The convolutional encoder and decoder around the quantizer (VQGAN's, as deepened in arXiv 2412.02692, section 4.1).

Shapes: B images, H x W pixels, h x w latent positions with h = H / 2^(levels - 1), C channels, Z latent channels.
Everything is NHWC. Parameters are float32; `dtype` is what convolutions and attention compute in, while normalisation
statistics and the attention's softmax stay float32. Parameter names map to the published ones in interop/names.py.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn.initializers import Initializer, ones, zeros

from ibq_jax.base.errors import UsageError

NORM_GROUPS = 32


def conv(
    in_channels: int,
    features: int,
    size: int = 3,
    *,
    stride: int = 1,
    padding: str | int | Sequence[tuple[int, int]] = "SAME",
    use_bias: bool = True,
    kernel_init: Initializer | None = None,
    dtype: jnp.dtype = jnp.float32,
    name: str | None = None,
) -> nn.Conv:
    """A convolution of size x size.

    Weights and biases start uniform within 1 / sqrt(fan in), PyTorch's default; `kernel_init` replaces it for weights.
    """
    bound = (size * size * in_channels) ** -0.5

    def uniform(key, shape, dtype):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return nn.Conv(
        features,
        (size, size),
        (stride, stride),
        padding,
        use_bias=use_bias,
        dtype=dtype,
        kernel_init=nn.with_logical_partitioning(kernel_init or uniform, (None, None, "conv_in", "conv_out")),
        bias_init=nn.with_logical_partitioning(uniform, ("conv_out",)),
        name=name,
    )


def norm(channels: int, *, dtype: jnp.dtype, name: str) -> nn.GroupNorm:
    """Normalisation over 32 groups of channels, eps 1e-6. Raises UsageError when 32 does not divide `channels`."""
    if channels % NORM_GROUPS:
        raise UsageError(
            f"a layer of the autoencoder has {channels} channels, which do not divide into {NORM_GROUPS} norm groups; "
            f"model.channels times each of model.channel_multipliers must be a multiple of {NORM_GROUPS}"
        )
    return nn.GroupNorm(
        NORM_GROUPS,
        epsilon=1e-6,
        use_fast_variance=False,  # its rounding errors show in flat pictures
        dtype=dtype,
        scale_init=nn.with_logical_partitioning(ones, ("conv_out",)),
        bias_init=nn.with_logical_partitioning(zeros, ("conv_out",)),
        name=name,
    )


class ResidualBlock(nn.Module):
    """[B, h, w, any] -> [B, h, w, features]."""

    features: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = x.shape[-1]
        y = nn.silu(norm(c, dtype=self.dtype, name="norm1")(x))
        y = conv(c, self.features, dtype=self.dtype, name="conv1")(y)
        y = nn.silu(norm(self.features, dtype=self.dtype, name="norm2")(y))
        y = conv(self.features, self.features, dtype=self.dtype, name="conv2")(y)
        if c != self.features:
            x = conv(c, self.features, 1, dtype=self.dtype, name="shortcut")(x)
        return x + y


class Attention(nn.Module):
    """Every position attends to every other: one head, residual, [B, h, w, C] -> [B, h, w, C]."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        b, h, w, c = x.shape
        normed = norm(c, dtype=self.dtype, name="norm")(x)
        query, key, value = (
            conv(c, c, 1, dtype=self.dtype, name=name)(normed).reshape(b, h * w, c)
            for name in ("query", "key", "value")
        )
        logits = jnp.einsum("bqc,bkc->bqk", query, key, preferred_element_type=jnp.float32) * c**-0.5
        weights = jax.nn.softmax(logits, axis=-1).astype(self.dtype)
        attended = jnp.einsum("bqk,bkc->bqc", weights, value).reshape(b, h, w, c)
        return x + conv(c, c, 1, dtype=self.dtype, name="out")(attended)


class Middle(nn.Module):
    """Block, attention, block at the lowest resolution."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = x.shape[-1]
        x = ResidualBlock(c, self.dtype, name="first_block")(x)
        x = Attention(self.dtype, name="attention")(x)
        return ResidualBlock(c, self.dtype, name="second_block")(x)


class Level(nn.Module):
    """The blocks of one resolution, each followed by attention where `attend`."""

    features: int
    num_blocks: int
    attend: bool
    dtype: jnp.dtype
    remat: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        block = nn.remat(ResidualBlock) if self.remat == "blocks" else ResidualBlock
        for i in range(self.num_blocks):
            x = block(self.features, self.dtype, name=f"block_{i}")(x)
            if self.attend:
                x = Attention(self.dtype, name=f"attention_{i}")(x)
        return x


class Encoder(nn.Module):
    """Images float [B, H, W, 3] in [-1, 1] -> [B, h, w, Z].

    A level attends where its resolution, counted down from `resolution` (and not from the images at hand, so that
    weights work at other sizes), is one of `attention_resolutions`. With `remat` "blocks" the backward pass finds only
    what went into each residual block, and computes its inside again.
    """

    channels: int
    channel_multipliers: Sequence[int]
    num_res_blocks: int
    attention_resolutions: Sequence[int]
    z_channels: int
    resolution: int
    dtype: jnp.dtype = jnp.float32
    remat: str = "none"

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = conv(3, self.channels, dtype=self.dtype, name="conv_in")(images)
        for i, multiplier in enumerate(self.channel_multipliers):
            c = self.channels * multiplier
            attend = self.resolution // 2**i in self.attention_resolutions
            x = Level(c, self.num_res_blocks, attend, self.dtype, self.remat, name=f"down_{i}")(x)
            if i < len(self.channel_multipliers) - 1:
                right_and_bottom = ((0, 1), (0, 1))
                x = conv(c, c, stride=2, padding=right_and_bottom, dtype=self.dtype, name=f"downsample_{i}")(x)
        x = Middle(self.dtype, name="middle")(x)
        x = nn.silu(norm(c, dtype=self.dtype, name="norm_out")(x))
        return conv(c, self.z_channels, dtype=self.dtype, name="conv_out")(x)


class Decoder(nn.Module):
    """[B, h, w, Z] -> images float32 [B, H, W, 3], not clipped; mirrors the encoder with one more block a level."""

    channels: int
    channel_multipliers: Sequence[int]
    num_res_blocks: int
    attention_resolutions: Sequence[int]
    z_channels: int
    resolution: int
    dtype: jnp.dtype = jnp.float32
    remat: str = "none"

    @nn.compact
    def __call__(self, z: jax.Array) -> jax.Array:
        c = self.channels * self.channel_multipliers[-1]
        x = conv(self.z_channels, c, dtype=self.dtype, name="conv_in")(z)
        x = Middle(self.dtype, name="middle")(x)
        for i in reversed(range(len(self.channel_multipliers))):
            c = self.channels * self.channel_multipliers[i]
            attend = self.resolution // 2**i in self.attention_resolutions
            x = Level(c, self.num_res_blocks + 1, attend, self.dtype, self.remat, name=f"up_{i}")(x)
            if i > 0:
                doubled = x.repeat(2, axis=1).repeat(2, axis=2)
                x = conv(c, c, dtype=self.dtype, name=f"upsample_{i}")(doubled)
        x = nn.silu(norm(c, dtype=self.dtype, name="norm_out")(x))
        return conv(c, 3, dtype=self.dtype, name="conv_out")(x).astype(jnp.float32)
