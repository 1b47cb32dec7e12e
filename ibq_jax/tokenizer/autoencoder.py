"""The convolutional encoder and decoder around the quantizer (VQGAN's, as deepened in arXiv 2412.02692, section 4.1).

Shapes: B images, H x W pixels, h x w latent positions with h = H / 2^(levels - 1), C channels, Z latent channels.
Everything is NHWC. Parameters are float32; `dtype` is what convolutions and attention compute in, and `precision` how
they multiply float32 operands (`ibq_jax.base.precision`). Normalisation statistics and the attention's softmax stay
float32. interop/tokenizer_names.py maps parameter names to the published ones.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn.initializers import ones, zeros

from ibq_jax.base.errors import UsageError
from ibq_jax.base.precision import convolution_precision, product_precision

NORM_GROUPS = 32


def conv(
    in_channels: int,
    features: int,
    size: int = 3,
    *,
    stride: int = 1,
    padding: str | int | Sequence[tuple[int, int]] = "SAME",
    use_bias: bool = True,
    kernel_init: Callable[..., jax.Array] | None = None,
    dtype: jnp.dtype = jnp.float32,
    precision: str = "float32",
    name: str | None = None,
) -> nn.Conv:
    """Returns a size x size convolution.

    Weights and biases are initialised uniformly in +-1 / sqrt(fan in), PyTorch's default; `kernel_init` replaces that
    for the weights.
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
        precision=convolution_precision(precision),
        kernel_init=nn.with_logical_partitioning(kernel_init or uniform, (None, None, "conv_in", "conv_out")),
        bias_init=nn.with_logical_partitioning(uniform, ("conv_out",)),
        name=name,
    )


def norm(channels: int, *, dtype: jnp.dtype, name: str) -> nn.GroupNorm:
    """Returns a group normalisation over 32 groups, eps 1e-6. Raises UsageError if 32 does not divide `channels`."""
    if channels % NORM_GROUPS:
        raise UsageError(
            f"a layer of the autoencoder has {channels} channels, which do not divide into {NORM_GROUPS} norm groups; "
            f"model.channels times each of model.channel_multipliers must be a multiple of {NORM_GROUPS}"
        )
    return nn.GroupNorm(
        NORM_GROUPS,
        epsilon=1e-6,
        use_fast_variance=False,  # its rounding errors are visible in flat images
        dtype=dtype,
        scale_init=nn.with_logical_partitioning(ones, ("conv_out",)),
        bias_init=nn.with_logical_partitioning(zeros, ("conv_out",)),
        name=name,
    )


class ResidualBlock(nn.Module):
    """Two normalised 3x3 convolutions with a residual connection, [B, h, w, any] -> [B, h, w, features]."""

    features: int
    dtype: jnp.dtype
    precision: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c, conv_of = x.shape[-1], partial(conv, dtype=self.dtype, precision=self.precision)
        y = nn.silu(norm(c, dtype=self.dtype, name="norm1")(x))
        y = conv_of(c, self.features, name="conv1")(y)
        y = nn.silu(norm(self.features, dtype=self.dtype, name="norm2")(y))
        y = conv_of(self.features, self.features, name="conv2")(y)
        if c != self.features:
            x = conv_of(c, self.features, 1, name="shortcut")(x)
        return x + y


class Attention(nn.Module):
    """Single-head self-attention over all positions, with a residual connection, [B, h, w, C] -> [B, h, w, C]."""

    dtype: jnp.dtype
    precision: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        b, h, w, c = x.shape
        conv_of = partial(conv, dtype=self.dtype, precision=self.precision)
        # In bfloat16, more than one pass would be spent on the float32 gradient of the logits only.
        precision = product_precision("bfloat16" if self.dtype == jnp.bfloat16 else self.precision)
        normed = norm(c, dtype=self.dtype, name="norm")(x)
        query, key, value = (
            conv_of(c, c, 1, name=name)(normed).reshape(b, h * w, c) for name in ("query", "key", "value")
        )
        logits = jnp.einsum("bqc,bkc->bqk", query, key, precision=precision, preferred_element_type=jnp.float32)
        logits *= c**-0.5
        weights = jax.nn.softmax(logits, axis=-1).astype(self.dtype)
        attended = jnp.einsum("bqk,bkc->bqc", weights, value, precision=precision).reshape(b, h, w, c)
        return x + conv_of(c, c, 1, name="out")(attended)


class Middle(nn.Module):
    """A residual block, attention and another block, at the lowest resolution."""

    dtype: jnp.dtype
    precision: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = x.shape[-1]
        x = ResidualBlock(c, self.dtype, self.precision, name="first_block")(x)
        x = Attention(self.dtype, self.precision, name="attention")(x)
        return ResidualBlock(c, self.dtype, self.precision, name="second_block")(x)


class Level(nn.Module):
    """The residual blocks of one resolution, each followed by attention if `attend`."""

    features: int
    num_blocks: int
    attend: bool
    dtype: jnp.dtype
    precision: str
    remat: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        block = nn.remat(ResidualBlock) if self.remat == "blocks" else ResidualBlock
        for i in range(self.num_blocks):
            x = block(self.features, self.dtype, self.precision, name=f"block_{i}")(x)
            if self.attend:
                x = Attention(self.dtype, self.precision, name=f"attention_{i}")(x)
        return x


class Layout(nn.Module, kw_only=True):
    """The fields that encoder, decoder and the whole tokenizer share.

    Attributes:
        channels: channels of the first level, at full resolution.
        channel_multipliers: each level's channels as a multiple of `channels`; every level but the first halves the
            resolution.
        num_res_blocks: residual blocks per level in the encoder; the decoder has one more.
        attention_resolutions: a level attends if its resolution is one of these. Resolutions are counted down from
            `resolution`, not from the images at hand, so that the weights work at other image sizes.
        z_channels: Z, channels between the autoencoder and the quantizer's 1x1 convolutions.
        resolution: side of the training images, in pixels.
        dtype: type that convolutions and attention compute in.
        precision: how they multiply operands if `dtype` is float32.
        remat: "none", or "blocks" to keep only each residual block's input for the backward pass, which then computes
            the block again.
    """

    channels: int
    channel_multipliers: Sequence[int]
    num_res_blocks: int
    attention_resolutions: Sequence[int]
    z_channels: int
    resolution: int
    dtype: jnp.dtype = jnp.float32
    precision: str = "float32"
    remat: str = "none"

    def layout(self) -> dict:
        """Returns these fields by name."""
        names = {field.name for field in dataclasses.fields(Layout)} - {"parent", "name"}  # those two are Linen's own
        return {name: getattr(self, name) for name in names}


class Encoder(Layout):
    """Images float [B, H, W, 3] in [-1, 1] -> [B, h, w, Z]."""

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        conv_of = partial(conv, dtype=self.dtype, precision=self.precision)
        x = conv_of(3, self.channels, name="conv_in")(images)
        for i, multiplier in enumerate(self.channel_multipliers):
            c = self.channels * multiplier
            attend = self.resolution // 2**i in self.attention_resolutions
            x = Level(c, self.num_res_blocks, attend, self.dtype, self.precision, self.remat, name=f"down_{i}")(x)
            if i < len(self.channel_multipliers) - 1:
                right_and_bottom = ((0, 1), (0, 1))
                x = conv_of(c, c, stride=2, padding=right_and_bottom, name=f"downsample_{i}")(x)
        x = Middle(self.dtype, self.precision, name="middle")(x)
        x = nn.silu(norm(c, dtype=self.dtype, name="norm_out")(x))
        return conv_of(c, self.z_channels, name="conv_out")(x)


class Decoder(Layout):
    """[B, h, w, Z] -> images float32 [B, H, W, 3], not clipped; mirrors the encoder, with one more block per level."""

    @nn.compact
    def __call__(self, z: jax.Array) -> jax.Array:
        c = self.channels * self.channel_multipliers[-1]
        conv_of = partial(conv, dtype=self.dtype, precision=self.precision)
        x = conv_of(self.z_channels, c, name="conv_in")(z)
        x = Middle(self.dtype, self.precision, name="middle")(x)
        for i in reversed(range(len(self.channel_multipliers))):
            c = self.channels * self.channel_multipliers[i]
            attend = self.resolution // 2**i in self.attention_resolutions
            x = Level(c, self.num_res_blocks + 1, attend, self.dtype, self.precision, self.remat, name=f"up_{i}")(x)
            if i > 0:
                doubled = x.repeat(2, axis=1).repeat(2, axis=2)
                x = conv_of(c, c, name=f"upsample_{i}")(doubled)
        x = nn.silu(norm(c, dtype=self.dtype, name="norm_out")(x))
        return conv_of(c, 3, name="conv_out")(x).astype(jnp.float32)
