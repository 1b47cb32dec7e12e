"""Quantizers that choose the nearest row of a codebook, for comparison with IBQ: VQ and SimVQ.

Shapes: latents [B, h, w, D], codebook [K, D], codes [B, h, w]. Everything here is float32.
"""

from abc import abstractmethod
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn.initializers import normal
from jax.sharding import Mesh

from ibq_jax.base.precision import FULL
from ibq_jax.ops.index_backprop import nearest_codes, unit
from ibq_jax.tokenizer.quantizer import Quantized, straight_through


class NearestRowQuantizer(nn.Module):
    """The base class of VQ and SimVQ, which define `code_vectors`.

    With e the code vector nearest to a latent z and sg the stop-gradient, quant_loss = mean (sg(z) - e)^2 + beta mean
    (z - sg(e))^2 (arXiv 1711.00937, equation 3: beta scales the commitment term). z_q is e, and its gradient is copied
    unchanged to z. There is no entropy term.
    """

    codebook_size: int
    dim: int
    beta: float = 0.25
    search_precision: str = "float32"
    block_size: int = 0
    mesh: Mesh | None = None

    @property
    def latent_dim(self) -> int:
        return self.dim

    @abstractmethod
    def code_vectors(self) -> jax.Array:
        """Returns the vectors that the codes stand for, [K, D]."""

    def project_latents(self, z: jax.Array) -> jax.Array:
        """Returns latents as they are compared with the code vectors, float32 of the same shape."""
        return z.astype(jnp.float32)

    def __call__(self, z: jax.Array) -> Quantized:
        z = self.project_latents(z)
        indices = self._nearest_rows(z)
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
        """Latents [B, h, w, D] -> codes int32 [B, h, w] of the nearest vectors; on a tie the smallest index."""
        return self._nearest_rows(self.project_latents(z))

    def _nearest_rows(self, z: jax.Array) -> jax.Array:
        return nearest_rows(
            z, self.code_vectors(), precision=self.search_precision, block_size=self.block_size, mesh=self.mesh
        )

    def lookup(self, indices: jax.Array) -> jax.Array:
        """Codes [...], each in 0..K-1 -> their vectors [..., D]."""
        return jnp.take(self.code_vectors(), indices, axis=0, mode="clip")


class VectorQuantizer(NearestRowQuantizer):
    """VQ-VAE's quantizer (arXiv 1711.00937), its codebook initialised uniformly in +-1/K as in VQGAN.

    `l2_normalize` first divides latents and codes by their lengths (ViT-VQGAN, arXiv 2110.04627, section 3.2).
    """

    l2_normalize: bool = False

    def setup(self):
        init = nn.with_logical_partitioning(uniform_within(1.0 / self.codebook_size), ("codes", "code_dim"))
        self.codebook = jnp.asarray(self.param("codebook", init, (self.codebook_size, self.dim), jnp.float32))

    def code_vectors(self) -> jax.Array:
        return unit(self.codebook) if self.l2_normalize else self.codebook

    def project_latents(self, z: jax.Array) -> jax.Array:
        return unit(super().project_latents(z)) if self.l2_normalize else super().project_latents(z)


class SimVectorQuantizer(NearestRowQuantizer):
    """SimVQ (arXiv 2411.02038): a trained linear layer projects a fixed random codebook, so every step moves all codes.

    The layer has a bias and is initialised as in the authors' code.
    """

    def setup(self):
        init = nn.with_logical_partitioning(normal(self.dim**-0.5), ("codes", "code_dim"))
        self.codebook = jnp.asarray(self.param("codebook", init, (self.codebook_size, self.dim), jnp.float32))
        uniform = uniform_within(self.dim**-0.5)
        self.projection = nn.Dense(self.dim, kernel_init=uniform, bias_init=uniform, precision=FULL)

    def code_vectors(self) -> jax.Array:
        return self.projection(jax.lax.stop_gradient(self.codebook))


def nearest_rows(
    z: jax.Array, rows: jax.Array, *, precision: str = "float32", block_size: int = 0, mesh: Mesh | None = None
) -> jax.Array:
    """Returns the index of the row at the smallest L2 distance: z [..., D], rows [K, D] -> int32 [...].

    On a tie the smallest index wins. |z - e|^2 is smallest where z . e - |e|^2 / 2 is largest, which is a dot product
    with one more dimension, so `nearest_codes` streams it and splits it over devices. Leaving out |z|^2, which all rows
    share, loses no digits when the rows are small.
    """
    z, rows = jax.lax.stop_gradient((z, rows))
    flat = z.reshape(-1, z.shape[-1])
    flat = jnp.concatenate([flat, jnp.ones_like(flat[:, :1])], axis=1)
    rows = jnp.concatenate([rows, -0.5 * jnp.sum(rows**2, axis=1, keepdims=True)], axis=1)
    return nearest_codes(flat, rows, precision=precision, block_size=block_size, mesh=mesh).reshape(z.shape[:-1])


def uniform_within(bound: float) -> Callable[..., jax.Array]:
    """Returns an initialiser that is uniform in +-bound."""

    def init(key, shape, dtype):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init
