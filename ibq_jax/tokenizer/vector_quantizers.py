"""Quantizers that take the nearest row of a codebook, to compare with IBQ: VQ and SimVQ.

Shapes: latents [B, h, w, D], codebook [K, D], codes [B, h, w]. Everything here is float32.
"""

from abc import abstractmethod

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn.initializers import Initializer, normal
from jax.sharding import Mesh

from ibq_jax.ops.index_backprop import nearest_codes
from ibq_jax.tokenizer.quantizer import Quantized, straight_through

LEAST_NORM = 1e-12  # that a vector is divided by


class NearestRowQuantizer(nn.Module):
    """What VQ and SimVQ share: each says what its `rows` are.

    With e the row nearest to a latent z, quant_loss = mean (sg(z) - e)^2 + beta mean (z - sg(e))^2 (arXiv 1711.00937,
    equation 3: beta scales the commitment). z_q is e, with its gradient copied to z as it is. No entropy term.
    """

    codebook_size: int
    dim: int
    beta: float = 0.25
    block_size: int = 0
    mesh: Mesh | None = None

    @property
    def latent_dim(self) -> int:
        return self.dim

    @abstractmethod
    def rows(self) -> jax.Array:
        """[K, D]."""

    def placed(self, z: jax.Array) -> jax.Array:
        """Latents where the rows are."""
        return z.astype(jnp.float32)

    def __call__(self, z: jax.Array) -> Quantized:
        z = self.placed(z)
        indices = nearest_rows(z, self.rows(), block_size=self.block_size, mesh=self.mesh)
        chosen = self.lookup(indices)
        codebook = jnp.mean((jax.lax.stop_gradient(z) - chosen) ** 2)
        commitment = jnp.mean((z - jax.lax.stop_gradient(chosen)) ** 2)
        return Quantized(
            z_q=straight_through(chosen, z),
            indices=indices,
            quant_loss=codebook + self.beta * commitment,
            entropy_loss=jnp.zeros(()),
        )

    def nearest(self, z: jax.Array) -> jax.Array:
        """Latents [B, h, w, D] -> int32 [B, h, w], the nearest row's number, the smallest on a tie."""
        return nearest_rows(self.placed(z), self.rows(), block_size=self.block_size, mesh=self.mesh)

    def lookup(self, indices: jax.Array) -> jax.Array:
        """Codes [...], each in 0..K-1 -> their rows [..., D]."""
        return jnp.take(self.rows(), indices, axis=0, mode="clip")


class VectorQuantizer(NearestRowQuantizer):
    """VQ-VAE's quantizer (arXiv 1711.00937) as VQGAN begins it: a codebook uniform within 1/K.

    `l2_normalize` divides latents and rows by their lengths first (ViT-VQGAN, arXiv 2110.04627, section 3.2).
    """

    l2_normalize: bool = False

    def setup(self):
        init = nn.with_logical_partitioning(uniform_within(1.0 / self.codebook_size), ("codes", "code_dim"))
        self.codebook = jnp.asarray(self.param("codebook", init, (self.codebook_size, self.dim), jnp.float32))

    def rows(self) -> jax.Array:
        return _unit(self.codebook) if self.l2_normalize else self.codebook

    def placed(self, z: jax.Array) -> jax.Array:
        return _unit(super().placed(z)) if self.l2_normalize else super().placed(z)


class SimVectorQuantizer(NearestRowQuantizer):
    """SimVQ (arXiv 2411.02038): the rows are what one trained linear layer makes of a random codebook that stays as it
    is, so that every step moves all of them. The layer has a bias and starts as in the authors' code."""

    def setup(self):
        init = nn.with_logical_partitioning(normal(self.dim**-0.5), ("codes", "code_dim"))
        self.codebook = jnp.asarray(self.param("codebook", init, (self.codebook_size, self.dim), jnp.float32))
        uniform = uniform_within(self.dim**-0.5)
        self.projection = nn.Dense(self.dim, kernel_init=uniform, bias_init=uniform)

    def rows(self) -> jax.Array:
        return self.projection(jax.lax.stop_gradient(self.codebook))


def nearest_rows(z: jax.Array, rows: jax.Array, *, block_size: int = 0, mesh: Mesh | None = None) -> jax.Array:
    """z [..., D], rows [K, D] -> int32 [...]: the row at the least L2 distance, the smallest index on a tie.

    Streamed and split over devices as `nearest_codes`: |z - e|^2 is least where z . e - |e|^2 / 2 is greatest, which is
    a dot product with one dimension more. Without |z|^2, which all rows share, no digits are lost where rows are small.
    """
    z, rows = jax.lax.stop_gradient((z, rows))
    flat = z.reshape(-1, z.shape[-1])
    flat = jnp.concatenate([flat, jnp.ones_like(flat[:, :1])], axis=1)
    rows = jnp.concatenate([rows, -0.5 * jnp.sum(rows**2, axis=1, keepdims=True)], axis=1)
    # Distances are small differences of products, which what accelerators multiply by default would drown.
    with jax.default_matmul_precision("float32"):
        return nearest_codes(flat, rows, block_size=block_size, mesh=mesh).reshape(z.shape[:-1])


def uniform_within(bound: float) -> Initializer:
    def init(key, shape, dtype):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def _unit(vectors: jax.Array) -> jax.Array:
    squares = jnp.sum(vectors**2, axis=-1, keepdims=True)
    return vectors * jax.lax.rsqrt(jnp.maximum(squares, LEAST_NORM**2))
