"""Layers of the Llama-like generator (arXiv 2412.02692, section 3.3; sizes and initial values as released).

Shapes: B sequences of S positions, C channels, H query heads and G key-value heads (G divides H) of D channels each,
F hidden channels. Parameters are float32; `dtype` is what matrix products compute in, while norms, rotations, the
attention's softmax and the residual stream stay float32. Products of float32 keep every bit on every machine.
"""

from collections.abc import Callable
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn.initializers import normal, ones, zeros

from ibq_jax.base.precision import FULL

Kernel = Literal["xla", "cudnn"]  # of jax.nn.dot_product_attention
NORM_EPSILON = 1e-5
INITIAL_DEVIATION = 0.02
ROTARY_BASE = 10_000.0
HIDDEN_MULTIPLE = 256
MODULATIONS = 6  # gamma1, gamma2, scale1, scale2, shift1, shift2


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
    x = x.astype(jnp.float32)
    even, odd = x[..., ::2], x[..., 1::2]
    rotated = jnp.stack((even * cos - odd * sin, odd * cos + even * sin), axis=-1)
    return rotated.reshape(x.shape)


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
    dropout: float
    kernel: Kernel  # jax.nn.dot_product_attention's implementation
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, angles: tuple[jax.Array, jax.Array], train: bool):
        b, s, c = x.shape
        d = c // self.num_heads
        width = (self.num_heads + 2 * self.num_kv_heads) * d
        qkv = dense(width, ("width", "heads"), dtype=self.dtype, name="wqkv")(x)
        query, key, value = jnp.split(
            qkv.reshape(b, s, -1, d), (self.num_heads, self.num_heads + self.num_kv_heads), axis=2
        )
        cos, sin = (table[None, :s, None] for table in angles)
        query, key = (rotate(t, cos, sin).astype(self.dtype) for t in (query, key))
        # It takes no precision. Its products take this one as they are traced, those of the backward pass with them. In
        # bfloat16, more than one pass would be spent on the float32 gradient of the logits only.
        with jax.default_matmul_precision("float32" if self.dtype == jnp.float32 else "bfloat16"):
            out = jax.nn.dot_product_attention(query, key, value, is_causal=True, implementation=self.kernel)
        out = dense(c, ("heads", "width"), dtype=self.dtype, name="wo")(out.reshape(b, s, c))
        return nn.Dropout(self.dropout)(out, deterministic=not train), (key, value)


def _swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    return nn.silu(gate) * up


class FeedForward(nn.Module):
    """SwiGLU, [B, S, C] -> [B, S, C]."""

    dropout: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        c = x.shape[-1]
        gate, up = (
            dense(hidden_channels(c), ("width", "hidden"), dtype=self.dtype, name=name)(x) for name in ("w1", "w3")
        )
        hidden = jax.checkpoint(_swiglu, prevent_cse=False)(gate, up)  # keeps the arguments, not the intermediates
        out = dense(c, ("hidden", "width"), dtype=self.dtype, name="w2")(hidden)
        return nn.Dropout(self.dropout)(out, deterministic=not train)


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
        attention = Attention(
            self.num_heads, self.num_kv_heads, self.dropout, self.kernel, self.dtype, name="attention"
        )
        y, keys_values = attention(RMSNorm(name="attention_norm")(x) * (1 + scale1) + shift1, angles, train)
        x = x + gamma1 * y
        y = FeedForward(self.dropout, self.dtype, name="feed_forward")(
            RMSNorm(name="ffn_norm")(x) * (1 + scale2) + shift2, train
        )
        return x + gamma2 * y, keys_values


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
