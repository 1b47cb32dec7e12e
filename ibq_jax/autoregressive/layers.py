"""Layers of the Llama-like generator (arXiv 2412.02692, section 3.3; sizes and initial values as released).

Shapes: B sequences of S positions, C channels, H query heads and G key-value heads (G divides H) of D channels each,
F hidden channels. Parameters are float32; `dtype` is what matrix products compute in, while norms, rotations, the
attention's softmax and the residual stream stay float32. Products of float32 keep every bit on every machine.
"""

import re
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.nn.initializers import normal, ones, zeros

from ibq_jax.base.precision import FULL

Kernel = Literal["xla", "cudnn"]  # of jax.nn.dot_product_attention
CUDNN_CAPABILITY, CUDNN_CHANNELS = 8, 128  # the least compute capability and the most channels a head
NORM_EPSILON = 1e-5
INITIAL_DEVIATION = 0.02
ROTARY_BASE = 10_000.0
HIDDEN_MULTIPLE = 256
KEPT = "kept"  # the name of arrays that the backward pass may keep
MODULATIONS = 6  # gamma1, gamma2, scale1, scale2, shift1, shift2


def cudnn_applies(device: Any, dtype: jnp.dtype | str, head_channels: int) -> bool:
    """Returns whether cuDNN has an attention kernel for heads of this type and number of channels on a jax.Device."""
    capability = getattr(device, "compute_capability", "") if device.platform == "gpu" else ""
    nvidia = re.fullmatch(r"(\d+)\.\d+", capability)  # AMD's are named, such as gfx942
    return (
        nvidia is not None
        and int(nvidia[1]) >= CUDNN_CAPABILITY
        and jnp.dtype(dtype) == jnp.bfloat16
        and head_channels % 8 == 0
        and head_channels <= CUDNN_CHANNELS
    )


def hidden_channels(width: int) -> int:
    """Returns F: two thirds of 4 C, rounded up to a multiple of 256."""
    return -(-(8 * width // 3) // HIDDEN_MULTIPLE) * HIDDEN_MULTIPLE


@jax.custom_vjp
def matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Returns x [..., I] times kernel [I, O], with a gradient that is fast on CPUs.

    The kernel's gradient contracts all rows of two arrays, and XLA:CPU first transposes one of them, column by column,
    together with the operations that produce it. Here that is always the narrower array, which made a training step 1.4
    times as fast on a CPU. Compilers that choose operands' layouts themselves see the same product.
    """
    return jnp.matmul(x, kernel, precision=FULL)


def _matmul_forward(x, kernel):
    return jnp.matmul(x, kernel, precision=FULL), (x, kernel)


def _matmul_backward(residuals, cotangent):
    x, kernel = residuals
    rows, cotangent_rows = (t.reshape(-1, t.shape[-1]) for t in (x, cotangent))
    over_rows = (((0,), (0,)), ((), ()))
    if rows.shape[1] <= cotangent_rows.shape[1]:
        kernel_gradient = jax.lax.dot_general(rows, cotangent_rows, over_rows, precision=FULL)
    else:
        kernel_gradient = jax.lax.dot_general(cotangent_rows, rows, over_rows, precision=FULL).T
    return jnp.matmul(cotangent, kernel.T, precision=FULL), kernel_gradient


matmul.defvjp(_matmul_forward, _matmul_backward)


def dense(
    features: int,
    axes: tuple[str, str],
    *,
    dtype: jnp.dtype,
    name: str | None = None,
    use_bias: bool = False,
    kernel_init: Callable[..., jax.Array] | None = None,
) -> nn.Dense:
    """Returns a dense layer whose kernel [in, features] has the logical `axes`.

    Kernels are initialised normal(0, 0.02) unless `kernel_init` is given, biases with 0.
    """
    return nn.Dense(
        features,
        use_bias=use_bias,
        dtype=dtype,
        kernel_init=nn.with_logical_partitioning(kernel_init or normal(INITIAL_DEVIATION), axes),
        bias_init=nn.with_logical_partitioning(zeros, (axes[1],)),
        name=name,
        dot_general=lambda x, kernel, *_, **__: matmul(x, kernel),
    )


def rms_norm(x: jax.Array, scale: jax.Array, axis: int = -1) -> jax.Array:
    """Returns x divided by its root mean square along `axis`, times `scale`, which broadcasts against x; float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=axis, keepdims=True) + NORM_EPSILON) * scale


def rotary_angles(grid: tuple[int, int], head_channels: int) -> tuple[jax.Array, jax.Array]:
    """Returns cos and sin [1 + h w, D / 2] of the two-dimensional rotary embedding: a class token, then an h x w grid.

    The first half of the D / 2 pairs of channels rotates with the row, the second with the column. The class token's
    cos and sin are both zero, as released, so its query and key vanish.
    """
    pairs = head_channels // 4
    frequencies = ROTARY_BASE ** (-jnp.arange(pairs, dtype=jnp.float32) / pairs)
    rows, columns = (jnp.arange(side, dtype=jnp.float32)[:, None] * frequencies[None] for side in grid)
    shape = (*grid, pairs)
    halves = jnp.broadcast_to(rows[:, None], shape), jnp.broadcast_to(columns[None], shape)
    angles = jnp.concatenate(halves, axis=-1).reshape(-1, 2 * pairs)
    cos, sin = (jnp.pad(function(angles), ((1, 0), (0, 0))) for function in (jnp.cos, jnp.sin))
    return cos, sin


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates pairs of neighbouring channels (2j, 2j + 1) of x [..., D] by angles that broadcast to [..., D / 2]."""
    turned = np.kron(np.eye(x.shape[-1] // 2), [[0, 1], [-1, 0]])  # (a, b) -> (-b, a)
    other = jnp.einsum("...i,ij->...j", x, jnp.asarray(turned, x.dtype), precision=FULL)
    cos, sin = (jnp.repeat(table, 2, axis=-1) for table in (cos, sin))
    return x.astype(jnp.float32) * cos + other.astype(jnp.float32) * sin


def kept(x: jax.Array) -> jax.Array:
    """Returns x, which the backward pass keeps, and does not compute again, if the model's remat is "dots"."""
    return checkpoint_name(x, KEPT)


class DropoutMasks(nn.Module):
    """Draws which elements two dropouts of the same shape keep; their rates are `rate`, to a multiple of 2^-16.

    One random number of 32 bits decides about an element of both, which halves the time that an accelerator spends on
    random numbers, and both decisions are kept in one byte.
    """

    rate: float

    @nn.compact
    def __call__(self, shape: tuple[int, ...], train: bool) -> tuple[jax.Array | None, jax.Array | None]:
        """Returns bool arrays of the shape, True where an element stays; None where all do."""
        threshold = _threshold(self.rate)
        if not train or not threshold:
            return None, None
        key = self.make_rng("dropout")  # pyright: ignore[reportAttributeAccessIssue]: nn.Module has it
        bits = jax.random.bits(key, shape, jnp.uint32)
        stay = [part >= threshold for part in (bits & 0xFFFF, bits >> 16)]
        both = kept(stay[0].astype(jnp.uint8) + 2 * stay[1].astype(jnp.uint8))
        return both & 1 == 1, both >= 2


def _threshold(rate: float) -> int:
    return round(rate * 2**16)


def drop(x: jax.Array, stay: jax.Array | None, rate: float) -> jax.Array:
    """Returns x with 0 where an element does not stay, and the others divided by their share; x if `stay` is None."""
    if stay is None:
        return x
    return jnp.where(stay, x / (1 - _threshold(rate) / 2**16), jnp.zeros((), x.dtype))


class RMSNorm(nn.Module):
    """Root-mean-square normalisation over the last axis, with a learned scale [C] initialised to 1."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.with_logical_partitioning(ones, ("norm",))
        return rms_norm(x, jnp.broadcast_to(self.param("scale", init, x.shape[-1:], jnp.float32), x.shape))


class Attention(nn.Module):
    """Causal self-attention with rotary embedding, [B, S, C] -> ([B, S, C], keys and values [B, S, G, D])."""

    num_heads: int
    num_kv_heads: int
    kernel: Kernel  # jax.nn.dot_product_attention's implementation
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, angles: tuple[jax.Array, jax.Array]):
        b, s, c = x.shape
        d = c // self.num_heads
        width = (self.num_heads + 2 * self.num_kv_heads) * d
        qkv = dense(width, ("width", "heads"), dtype=self.dtype, name="wqkv")(x)
        ends = self.num_heads * d, (self.num_heads + self.num_kv_heads) * d
        query, key, value = (part.reshape(b, s, -1, d) for part in jnp.split(qkv, ends, axis=2))
        cos, sin = (table[None, :s, None] for table in angles)
        query, key = (kept(rotate(t, cos, sin).astype(self.dtype)) for t in (query, key))
        value = kept(value)
        # It takes no precision. Its products take this one as they are traced, those of the backward pass with them. In
        # bfloat16, more than one pass would be spent on the float32 gradient of the logits only.
        with jax.default_matmul_precision("float32" if self.dtype == jnp.float32 else "bfloat16"):
            out = jax.nn.dot_product_attention(query, key, value, is_causal=True, implementation=self.kernel)
        return kept(dense(c, ("heads", "width"), dtype=self.dtype, name="wo")(out.reshape(b, s, c))), (key, value)


def _gated(gate, up):
    return nn.silu(gate) * up


@jax.custom_vjp
def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """Returns silu(gate) * up; keeps the arguments for the backward pass, and nothing in between."""
    return _gated(gate, up)


def _swiglu_forward(gate, up):
    return _gated(gate, up), (gate, up)


def _swiglu_backward(arguments, cotangent):
    # Without the barrier, compilers for TPUs compute the gradients again for every tile of the products that read them.
    return jax.lax.optimization_barrier(jax.vjp(_gated, *arguments)[1](cotangent))


swiglu.defvjp(_swiglu_forward, _swiglu_backward)


class FeedForward(nn.Module):
    """SwiGLU, [B, S, C] -> [B, S, C]."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = x.shape[-1]
        gate, up = (
            kept(dense(hidden_channels(c), ("width", "hidden"), dtype=self.dtype, name=name)(x))
            for name in ("w1", "w3")
        )
        return kept(dense(c, ("hidden", "width"), dtype=self.dtype, name="w2")(swiglu(gate, up)))


class Block(nn.Module):
    """One transformer layer modulated by its class (adaLN), [B, S, C] float32 -> (the same, its keys and values)."""

    num_heads: int
    num_kv_heads: int
    dropout: float
    kernel: Kernel
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, modulation: jax.Array, angles: tuple[jax.Array, jax.Array], train: bool):
        """Applies the layer; `modulation` is [B, 6, C]."""
        gamma1, gamma2, scale1, scale2, shift1, shift2 = jnp.split(modulation, MODULATIONS, axis=1)
        stay1, stay2 = DropoutMasks(self.dropout, name="dropout")(x.shape, train)
        attention = Attention(self.num_heads, self.num_kv_heads, self.kernel, self.dtype, name="attention")
        y, keys_values = attention(RMSNorm(name="attention_norm")(x) * (1 + scale1) + shift1, angles)
        x = x + gamma1 * drop(y, stay1, self.dropout)
        y = FeedForward(self.dtype, name="feed_forward")(RMSNorm(name="ffn_norm")(x) * (1 + scale2) + shift2)
        return x + gamma2 * drop(y, stay2, self.dropout), keys_values


class Modulation(nn.Module):
    """One layer's modulation: SiLU(class embedding) [B, C] -> (the same, for a scan; modulation [B, 6, C] float32)."""

    gamma_init: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, condition: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        c = condition.shape[-1]

        def init(key, shape, dtype):
            scale = jnp.where(jnp.arange(shape[-1]) < 2 * c, self.gamma_init, 0.5)
            return normal(INITIAL_DEVIATION)(key, shape, dtype) * jnp.broadcast_to(scale, shape)

        layer = dense(
            MODULATIONS * c, ("width", "modulation"), dtype=self.dtype, name="ada_lin", use_bias=True, kernel_init=init
        )
        return condition, layer(condition).astype(jnp.float32).reshape(-1, MODULATIONS, c)
