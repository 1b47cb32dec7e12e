"""Quantizers that choose the nearest row of a codebook, for comparison with IBQ: VQ and SimVQ.

Shapes: latents [B, h, w, D], codebook [K, D], codes [B, h, w]. Everything here is float32.
"""

import dataclasses
from abc import abstractmethod
from collections.abc import Callable
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn.initializers import normal
from jax.sharding import Mesh

from ibq_jax.base.precision import FULL
from ibq_jax.ops.index_backprop import SoftLookup, nearest_codes, soft_lookup, unit
from ibq_jax.tokenizer.quantizer import Quantized, entropy_terms, lookup_form, straight_through


class NearestRowQuantizer(nn.Module):
    """The base class of VQ and SimVQ, which define `code_vectors`.

    With e the code vector nearest to a latent z and sg the stop-gradient, quant_loss = mean (sg(z) - e)^2 + beta mean
    (z - sg(e))^2 (arXiv 1711.00937, equation 3: beta scales the commitment term). z_q is e, and its gradient is copied
    unchanged to z.

    `entropy_logits` adds IBQ's entropy loss, the same function of logits [N, K], whose gradient reaches every code:
        "own"       none: VQ and SimVQ have no such loss of their own
        "dot"       of IBQ's logits z . e, for comparisons in which only the quantizer differs. These quantizers choose
                    the nearest code, not the largest product. So a short code near the latents may be chosen and have
                    hardly any probability, and the term evens out another assignment than the one in use
        "distance"  of z . e - |e|^2 / 2, which is -|z - e|^2 / 2 but for what all codes share. The largest belongs to
                    the chosen code, as the largest z . e does with IBQ, so this is the term that means for these
                    quantizers what "dot" means for IBQ. Both are the same if all codes are of one length
    The fields after it are those of `IndexBackpropQuantizer`.
    """

    codebook_size: int
    dim: int
    beta: float = 0.25
    entropy_logits: str = "own"
    entropy_temperature: float = 0.01
    entropy_group_tokens: int = 0
    sample_entropy_weight: float = 1.0
    batch_entropy_weight: float = 1.0
    precision: str = "float32"
    gradient_precision: str = "float32"
    search_precision: str = "float32"
    block_size: int = 0
    implementation: Literal["streamed", "dense"] = "streamed"
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
        quantized = Quantized(
            z_q=straight_through(chosen, z),
            indices=indices,
            quant_loss=codebook + self.beta * commitment,
            entropy_loss=jnp.zeros(()),
        )
        if self.entropy_logits == "own":
            return quantized
        return dataclasses.replace(quantized, **entropy_terms(self, self._entropies(z)))

    def _entropies(self, z: jax.Array) -> SoftLookup:
        z, keys = z.reshape(-1, self.dim), self.code_vectors()
        if self.entropy_logits == "distance":
            z, keys = as_products(z, keys)
        return soft_lookup(
            z,
            keys,
            jnp.zeros_like(keys[:, :1]),  # the values are not used: as narrow as can be
            **lookup_form(self),
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
    """VQ-VAE's quantizer (arXiv 1711.00937).

    The codebook starts as normal(0, init_scale), where 0 stands for VQGAN's start, uniform in +-1/K.
    `l2_normalize` first divides latents and codes by their lengths (ViT-VQGAN, arXiv 2110.04627, section 3.2).
    """

    init_scale: float = 0.0
    l2_normalize: bool = False

    def setup(self):
        initial = normal(self.init_scale) if self.init_scale else uniform_within(1.0 / self.codebook_size)
        init = nn.with_logical_partitioning(initial, ("codes", "code_dim"))
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

    On a tie the smallest index wins. The distance is smallest where the product of `as_products` is largest, so
    `nearest_codes` streams it and splits it over devices.
    """
    z, rows = jax.lax.stop_gradient((z, rows))
    flat, keys = as_products(z.reshape(-1, z.shape[-1]), rows)
    return nearest_codes(flat, keys, precision=precision, block_size=block_size, mesh=mesh).reshape(z.shape[:-1])


def as_products(z: jax.Array, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns z [N, D + 1] and rows [K, D + 1] whose dot products are z . e - |e|^2 / 2 of z [N, D] and rows [K, D].

    That is -|z - e|^2 / 2 without |z|^2 / 2, which all rows share; leaving it out loses no digits when rows are small.
    """
    z = jnp.concatenate([z, jnp.ones_like(z[:, :1])], axis=1)
    return z, jnp.concatenate([rows, -0.5 * jnp.sum(rows**2, axis=1, keepdims=True)], axis=1)


def uniform_within(bound: float) -> Callable[..., jax.Array]:
    """Returns an initialiser that is uniform in +-bound."""

    def init(key, shape, dtype):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init
