"""The convolutional encoder and decoder around the quantizer (VQGAN's, as deepened in arXiv 2412.02692, section 4.1).

Shapes: B images, H x W pixels, h x w latent positions with h = H / 2^(levels - 1), C channels, Z latent channels.
Everything is NHWC. Parameters are float32; `dtype` is what convolutions and attention compute in, and `precision` how
they multiply float32 operands (`ibq_jax.base.precision`). Normalisation statistics and the attention's softmax stay
float32. interop/tokenizer_names.py maps parameter names to the published ones.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn.initializers import ones, zeros
from jax.sharding import Mesh

from ibq_jax.base.errors import UsageError
from ibq_jax.base.precision import convolution_precision, product_precision
from ibq_jax.ops.convolution import convolve, convolve_doubled
from ibq_jax.ops.group_norm import GroupNormForm, group_norm
from ibq_jax.ops.pixel_sums import add_bias
from ibq_jax.ops.row_bands import BlockForm, residual_block

NORM_GROUPS = 32
NORM_EPSILON = 1e-6
MOST_POSITIONS = 4096  # that attention takes at once, an image of 1,024 pixels with 16 per code; of more, by blocks
QUERY_BLOCK = 1024  # positions
MOST_PIXELS = 1024 * 1024  # of an image, of which residual blocks hold whole arrays; of more, CPUs by bands of rows
SEEN = "intermediates"  # the collection of values that losses may ask for; otherwise nothing is kept


class Computing(NamedTuple):
    """The type and precision that layers compute in, as in `Layout`, and the `mesh` of their devices (None for one)."""

    dtype: jnp.dtype = jnp.float32
    precision: str = "float32"
    mesh: Mesh | None = None


class Conv(nn.Module):
    """A size x size convolution, or one of a (height, width), [B, H, W, any] -> [B, H', W', features].

    Weights and biases are initialised uniformly in +-1 / sqrt(fan in), PyTorch's default; `kernel_init` replaces that
    for the weights. `padding` is ((above, below), (left, right)), by default half the kernel's sides, rounded down.
    With `doubled`, pixels are repeated before, down and across: then H' = 2H and W' = 2W.
    """

    features: int
    size: int | tuple[int, int] = 3
    stride: int = 1
    padding: tuple[tuple[int, int], tuple[int, int]] | None = None
    doubled: bool = False
    use_bias: bool = True
    kernel_init: Callable[..., jax.Array] | None = None
    computing: Computing = Computing()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        height, width = (self.size, self.size) if isinstance(self.size, int) else self.size
        shape = (height, width, x.shape[-1], self.features)
        bound = (height * width * x.shape[-1]) ** -0.5

        def uniform(key, shape, dtype):
            return jax.random.uniform(key, shape, dtype, -bound, bound)

        kernel_init = nn.with_logical_partitioning(self.kernel_init or uniform, (None, None, "conv_in", "conv_out"))
        kernel = self.param("kernel", kernel_init, shape, jnp.float32)
        dtype = self.computing.dtype
        padding = ((height // 2,) * 2, (width // 2,) * 2) if self.padding is None else self.padding
        precision = convolution_precision(self.computing.precision)
        x, kernel = x.astype(dtype), kernel.astype(dtype)
        y: Any  # as `jax.custom_vjp` says
        if self.doubled:
            y = convolve_doubled(x, kernel, precision, self.computing.mesh)
        else:
            y = convolve(x, kernel, self.stride, padding, precision, self.computing.mesh)
        if not self.use_bias:
            return y
        bias_init = nn.with_logical_partitioning(uniform, ("conv_out",))
        return add_bias(y, self.param("bias", bias_init, (self.features,), jnp.float32))


class GroupNorm(nn.Module):
    """Group normalisation over 32 groups, eps 1e-6, then SiLU if asked; [B, H, W, C] -> the same in `computing.dtype`.

    Raises UsageError if 32 does not divide C.
    """

    silu: bool
    computing: Computing

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        if channels % NORM_GROUPS:
            raise UsageError(
                f"a layer of the autoencoder has {channels} channels, which do not divide into {NORM_GROUPS} norm "
                "groups; model.channels times each of model.channel_multipliers must be a multiple of "
                f"{NORM_GROUPS}"
            )
        scale = self.param("scale", nn.with_logical_partitioning(ones, ("conv_out",)), (channels,), jnp.float32)
        bias = self.param("bias", nn.with_logical_partitioning(zeros, ("conv_out",)), (channels,), jnp.float32)
        form = GroupNormForm(NORM_GROUPS, NORM_EPSILON, self.silu, self.computing.mesh)
        return group_norm(x.astype(self.computing.dtype), scale, bias, form)


class ResidualBlock(nn.Module):
    """Two normalised 3x3 convolutions with a residual connection, [B, h, w, any] -> [B, h, w, features]."""

    features: int
    computing: Computing
    may_band: bool = True  # see `ibq_jax.ops.row_bands`

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if self.may_band and x.shape[1] * x.shape[2] > MOST_PIXELS and not self.is_initializing():
            return self._by_bands(x)
        y = GroupNorm(True, self.computing, name="norm1")(x)
        y = Conv(self.features, computing=self.computing, name="conv1")(y)
        y = GroupNorm(True, self.computing, name="norm2")(y)
        y = Conv(self.features, computing=self.computing, name="conv2")(y)
        if x.shape[-1] != self.features:
            x = Conv(self.features, 1, computing=self.computing, name="shortcut")(x)
        return x + y

    def _by_bands(self, x: jax.Array) -> jax.Array:
        norm = GroupNormForm(NORM_GROUPS, NORM_EPSILON, True, self.computing.mesh)
        form = BlockForm(norm, self.computing.dtype, convolution_precision(self.computing.precision))
        block: Any = self  # whose attribute `variables` pyright does not know
        whole = ResidualBlock(self.features, self.computing, may_band=False, parent=None)

        def plain(x: jax.Array, params: Any) -> jax.Array:
            return whole.apply({"params": params}, x)  # pyright: ignore[reportReturnType]

        return residual_block(x, nn.meta.unbox(block.variables["params"]), form, plain)


class Attention(nn.Module):
    """Single-head self-attention over all positions, with a residual connection, [B, h, w, C] -> [B, h, w, C]."""

    computing: Computing

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        b, h, w, c = x.shape
        dtype = self.computing.dtype
        of_pixels = partial(Conv, c, 1, computing=self.computing)
        # In bfloat16, more than one pass would be spent on the float32 gradient of the logits only.
        precision = product_precision("bfloat16" if dtype == jnp.bfloat16 else self.computing.precision)
        normed = GroupNorm(False, self.computing, name="norm")(x)
        query, key, value = (of_pixels(name=name)(normed).reshape(b, h * w, c) for name in ("query", "key", "value"))
        attend = _attend if h * w <= MOST_POSITIONS else _attend_by_blocks
        attended = attend(query, key, value, precision).reshape(b, h, w, c)
        return x + of_pixels(name="out")(attended)


def _attend(query: jax.Array, key: jax.Array, value: jax.Array, precision: Any) -> jax.Array:
    """Returns what queries [B, Q, C] get from keys and values [B, K, C], in one product: [B, Q, C]."""
    logits = jnp.einsum("bqc,bkc->bqk", query, key, precision=precision, preferred_element_type=jnp.float32)
    logits *= query.shape[-1] ** -0.5
    weights = jax.nn.softmax(logits, axis=-1).astype(query.dtype)
    return jnp.einsum("bqk,bkc->bqc", weights, value, precision=precision)


def _attend_by_blocks(query: jax.Array, key: jax.Array, value: jax.Array, precision: Any) -> jax.Array:
    """Computes `_attend` for QUERY_BLOCK queries at a time, so that memory grows with the positions, not their square.

    Every query meets all keys at once, so its formula is the same; only the order in which products are summed may
    differ. The backward pass computes each block again.
    """
    b, queries, c = query.shape
    blocks = -(-queries // QUERY_BLOCK)
    padded = jnp.pad(query, ((0, 0), (0, blocks * QUERY_BLOCK - queries), (0, 0)))
    attend = jax.checkpoint(lambda rows: _attend(rows, key, value, precision))
    attended = jax.lax.map(attend, padded.reshape(b, blocks, QUERY_BLOCK, c).swapaxes(0, 1))
    return attended.swapaxes(0, 1).reshape(b, -1, c)[:, :queries]


class Middle(nn.Module):
    """A residual block, attention and another block, at the lowest resolution."""

    computing: Computing

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = x.shape[-1]
        x = ResidualBlock(c, self.computing, name="first_block")(x)
        x = Attention(self.computing, name="attention")(x)
        return ResidualBlock(c, self.computing, name="second_block")(x)


class Level(nn.Module):
    """The residual blocks of one resolution, each followed by attention if `attend`."""

    features: int
    num_blocks: int
    attend: bool
    remat: str
    computing: Computing

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        block = nn.remat(ResidualBlock) if self.remat == "blocks" else ResidualBlock
        for i in range(self.num_blocks):
            x = block(self.features, self.computing, name=f"block_{i}")(x)
            if self.attend:
                x = Attention(self.computing, name=f"attention_{i}")(x)
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
        mesh: the devices that share a batch and the codebook's rows, None for one.
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
    mesh: Mesh | None = None

    @property
    def computing(self) -> Computing:
        return Computing(self.dtype, self.precision, self.mesh)

    def layout(self) -> dict:
        """Returns these fields by name."""
        names = {field.name for field in dataclasses.fields(Layout)} - {"parent", "name"}  # those two are Linen's own
        return {name: getattr(self, name) for name in names}


class Encoder(Layout):
    """Images float [B, H, W, 3] in [-1, 1] -> [B, h, w, Z].

    Losses that ask for the collection `SEEN` get "last_input", what the last convolution gets.
    """

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        conv = partial(Conv, computing=self.computing)
        x = conv(self.channels, name="conv_in")(images)
        for i, multiplier in enumerate(self.channel_multipliers):
            c = self.channels * multiplier
            attend = self.resolution // 2**i in self.attention_resolutions
            x = Level(c, self.num_res_blocks, attend, self.remat, self.computing, name=f"down_{i}")(x)
            if i < len(self.channel_multipliers) - 1:
                right_and_bottom = ((0, 1), (0, 1))
                x = conv(c, stride=2, padding=right_and_bottom, name=f"downsample_{i}")(x)
        x = Middle(self.computing, name="middle")(x)
        x = GroupNorm(True, self.computing, name="norm_out")(x)
        self.sow(SEEN, "last_input", x)
        return conv(self.z_channels, name="conv_out")(x)


class Decoder(Layout):
    """[B, h, w, Z] -> images float32 [B, H, W, 3], not clipped; mirrors the encoder, with one more block per level.

    Losses that ask for the collection `SEEN` get "lowest_map", the hidden map at the lowest resolution, and
    "last_input", what the last convolution gets.
    """

    @nn.compact
    def __call__(self, z: jax.Array) -> jax.Array:
        c = self.channels * self.channel_multipliers[-1]
        conv = partial(Conv, computing=self.computing)
        x = conv(c, name="conv_in")(z)
        x = Middle(self.computing, name="middle")(x)
        self.sow(SEEN, "lowest_map", x)
        for i in reversed(range(len(self.channel_multipliers))):
            c = self.channels * self.channel_multipliers[i]
            attend = self.resolution // 2**i in self.attention_resolutions
            x = Level(c, self.num_res_blocks + 1, attend, self.remat, self.computing, name=f"up_{i}")(x)
            if i > 0:
                x = conv(c, doubled=True, name=f"upsample_{i}")(x)
        x = GroupNorm(True, self.computing, name="norm_out")(x)
        self.sow(SEEN, "last_input", x)
        return conv(3, name="conv_out")(x).astype(jnp.float32)
