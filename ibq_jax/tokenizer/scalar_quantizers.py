"""LFQ and FSQ, for comparison with IBQ: quantizers without a trained codebook that round each dimension by itself.

Shapes: latents [B, h, w, D], codes [B, h, w]; the codebook [K, D] consists of all combinations of the dimensions'
levels, and D follows from K. Everything here is float32. The rounding's gradient is the identity (straight-through).
"""

import math
from collections.abc import Sequence
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ibq_jax.base.errors import UsageError
from ibq_jax.ops.index_backprop import index_backprop
from ibq_jax.tokenizer.quantizer import Quantized, entropy_terms, lookup_form, straight_through

PAPER_LEVELS = ((8, 6, 5), (8, 5, 5, 5), (7, 5, 5, 5, 5), (8, 8, 8, 6, 5), (8, 8, 8, 5, 5, 5))  # arXiv 2309.15505
MOST_LEVELS = 256  # per dimension; with many more, EPSILON would add another level
EPSILON = 1e-3  # relative margin by which a dimension's range exceeds its outermost levels


class LookupFreeQuantizer(nn.Module):
    """LFQ (MAGVIT-v2, arXiv 2310.05737, section 3.1): the K = 2^D codes are the corners of {-1, 1}^D.

    The signs of a latent's dimensions are the bits of its code, the first dimension being the least significant bit.
    The entropies are exact, of softmax(2 z . c / entropy_temperature) over all corners c: the batch entropy does not
    factorise over dimensions. quant_loss is `beta` times the mean square between a latent and its corner.
    """

    codebook_size: int
    beta: float = 0.25
    entropy_temperature: float = 0.01
    entropy_group_tokens: int = 0
    sample_entropy_weight: float = 1.0
    batch_entropy_weight: float = 1.0
    precision: str = "float32"
    gradient_precision: str = "float32"
    block_size: int = 0
    implementation: Literal["streamed", "dense"] = "streamed"
    mesh: Mesh | None = None

    @property
    def latent_dim(self) -> int:
        """Returns D. Raises UsageError if K is not a power of two."""
        if self.codebook_size < 2 or self.codebook_size & (self.codebook_size - 1):
            near = 2 ** max(1, round(math.log2(max(self.codebook_size, 2))))
            raise UsageError(f"codebook.size={self.codebook_size}: quantizer lfq takes powers of two, such as {near}")
        return self.codebook_size.bit_length() - 1

    def __call__(self, z: jax.Array) -> Quantized:
        z = z.astype(jnp.float32)
        indices = self.nearest(z)
        corner = self.lookup(indices)
        out = index_backprop(
            2.0 * z.reshape(-1, self.latent_dim),
            self.lookup(jnp.arange(self.codebook_size)),
            **lookup_form(self),
        )
        return Quantized(
            z_q=straight_through(corner, z),
            indices=indices,
            quant_loss=self.beta * jnp.mean((corner - z) ** 2),
            **entropy_terms(self, out),
        )

    def nearest(self, z: jax.Array) -> jax.Array:
        """Latents [B, h, w, D] -> int32 [B, h, w]; a 0 counts as negative."""
        return jnp.sum((z > 0) * _last(2 ** np.arange(self.latent_dim), z.ndim), axis=-1, dtype=jnp.int32)

    def lookup(self, indices: jax.Array) -> jax.Array:
        """Codes [...], each in 0..K-1 -> their corners [..., D]."""
        bits = (indices[..., None] >> _last(np.arange(self.latent_dim), indices.ndim + 1)) & 1
        return (2 * bits - 1).astype(jnp.float32)


class FiniteScalarQuantizer(nn.Module):
    """FSQ (arXiv 2309.15505, section 3.1): dimension i is bounded by a tanh and rounded to one of L_i values.

    The values are spread evenly over [-1, 1]; the first dimension is the least significant digit of a code. There is no
    loss and no entropy. The L_i are `levels`, whose product is K. If `levels` is empty, they are those of the paper's
    table 1 or, for K = 2^n, n // 3 eights of which n % 3 are doubled.
    """

    codebook_size: int
    levels: Sequence[int] = ()

    @property
    def latent_dim(self) -> int:
        """Returns D. Raises UsageError if the levels do not make K codes, or if none are known for K."""
        return len(self._levels)

    @property
    def _levels(self) -> np.ndarray:
        """The levels of every dimension, int32 [D]. Raises UsageError as `latent_dim` does."""
        levels = tuple(self.levels) or _usual_levels(self.codebook_size)
        if not all(isinstance(level, int) and 2 <= level <= MOST_LEVELS for level in levels):
            raise UsageError(f"quantizer.levels={levels}: each must be an integer from 2 to {MOST_LEVELS}")
        if math.prod(levels) != self.codebook_size:
            raise UsageError(
                f"quantizer.levels={levels} make {math.prod(levels)} codes, codebook.size is {self.codebook_size}; "
                f"set codebook.size={math.prod(levels)}, or other levels"
            )
        return np.array(levels, np.int32)

    def __call__(self, z: jax.Array) -> Quantized:
        bounded = self._bounded(z.astype(jnp.float32))
        rounded = jnp.round(bounded)
        return Quantized(
            z_q=straight_through(rounded, bounded) / self._half_widths(z.ndim),
            indices=self._index(rounded),
            quant_loss=jnp.zeros(()),
            entropy_loss=jnp.zeros(()),
        )

    def nearest(self, z: jax.Array) -> jax.Array:
        """Latents [B, h, w, D] -> int32 [B, h, w]."""
        return self._index(jnp.round(self._bounded(z.astype(jnp.float32))))

    def lookup(self, indices: jax.Array) -> jax.Array:
        """Codes [...], each in 0..K-1 -> their values [..., D] in [-1, 1]."""
        ndim = indices.ndim + 1
        digits = indices[..., None] // _last(self._place_values(), ndim) % _last(self._levels, ndim)
        return (digits - _last(self._levels // 2, ndim)) / self._half_widths(ndim)

    def _bounded(self, z: jax.Array) -> jax.Array:
        """Returns bounded latents whose rounded values are the integers from -(L // 2) to (L - 1) // 2.

        The paper's listing has (1 - eps) and tan in place of (1 + eps) and arctanh. With these, a latent of 0 stays 0,
        and every level can be reached.
        """
        half = (self._levels - 1) * (1 + EPSILON) / 2
        offset = np.where(self._levels % 2, 0.0, 0.5)
        shift = np.arctanh(offset / half)
        half, offset, shift = (_last(array.astype(np.float32), z.ndim) for array in (half, offset, shift))
        return jnp.tanh(z + shift) * half - offset

    def _half_widths(self, ndim: int) -> np.ndarray:
        return _last((self._levels // 2).astype(np.float32), ndim)

    def _place_values(self) -> np.ndarray:
        """Returns by how much a code grows with one level of each dimension, int32 [D]."""
        return np.cumprod((1, *self._levels[:-1]), dtype=np.int32)

    def _index(self, rounded: jax.Array) -> jax.Array:
        digits = rounded.astype(jnp.int32) + _last(self._levels // 2, rounded.ndim)
        return jnp.sum(digits * _last(self._place_values(), rounded.ndim), axis=-1, dtype=jnp.int32)


def _usual_levels(codebook_size: int) -> tuple[int, ...]:
    """Returns the default levels for K codes, all at least 5 as the paper advises. Raises UsageError if none exist."""
    for levels in PAPER_LEVELS:
        if math.prod(levels) == codebook_size:
            return levels
    power = codebook_size.bit_length() - 1
    eights, doubled = divmod(power, 3)
    if codebook_size != 2**power or doubled > eights or not eights:
        known = ", ".join(f"{math.prod(levels)}" for levels in PAPER_LEVELS)
        raise UsageError(
            f"codebook.size={codebook_size}: quantizer fsq knows no levels for it; set quantizer.levels to numbers of "
            f"that product, or take {known}, or a power of two from 64 on"
        )
    return (16,) * doubled + (8,) * (eights - doubled)


def _last(values: np.ndarray, ndim: int) -> np.ndarray:
    """Returns values [D] as [1, ..., 1, D], with `ndim` axes."""
    return values.reshape((1,) * (ndim - 1) + (-1,))
