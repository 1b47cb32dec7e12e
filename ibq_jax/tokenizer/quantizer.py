"""IBQ's quantizer (arXiv 2412.02692): the codebook, its losses, latents to codes and back. The interface of all others.

Shapes: latents [B, h, w, D], codebook [K, D], codes [B, h, w]. Everything here is float32.
"""

from typing import Any, Literal, Protocol

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.nn.initializers import normal
from jax.sharding import Mesh

from ibq_jax.base.errors import UsageError
from ibq_jax.ops.index_backprop import IndexBackprop, SoftLookup, index_backprop, nearest_codes, soft_lookup, unit

BETA_ON = ("codebook", "commitment")
LOOKUP_FIELDS = (
    *("entropy_temperature", "entropy_group_tokens", "precision", "gradient_precision"),
    *("block_size", "implementation", "mesh"),
)


@flax.struct.dataclass
class Quantized:
    """The output of a quantizer for a batch of latents. All but the first two fields are scalars; None if it has none.

    quant_loss and entropy_loss enter the training loss, each with a weight of its own.
    """

    z_q: jax.Array  # [B, h, w, D], the chosen codes' vectors; differentiable in the latents, with IBQ in all rows too
    indices: jax.Array  # [B, h, w] int32
    quant_loss: jax.Array
    entropy_loss: jax.Array
    sample_entropy: jax.Array | None = None  # nats
    batch_entropy: jax.Array | None = None  # nats
    max_probability: jax.Array | None = None  # mean over tokens of the chosen code's probability; no gradient
    max_logit: jax.Array | None = None  # largest |z . e / logit_temperature|; no gradient


class Quantizer(Protocol):
    """The interface of every quantizer."""

    @property
    def latent_dim(self) -> int:
        """D, the dimensions of its latents."""
        ...

    def __call__(self, z: jax.Array) -> Quantized:
        """Quantizes latents [B, h, w, D], for training."""
        ...

    def nearest(self, z: jax.Array) -> jax.Array:
        """Latents [B, h, w, D] -> codes int32 [B, h, w]."""
        ...

    def lookup(self, indices: jax.Array) -> jax.Array:
        """Codes [...], each in 0..K-1 -> the vectors that they stand for, float32 [..., D]."""
        ...


def straight_through(value: jax.Array, z: jax.Array) -> jax.Array:
    """Returns `value` with its gradient copied unchanged to `z` (straight-through estimator)."""
    return jax.lax.stop_gradient(value) + (z - jax.lax.stop_gradient(z))


def lookup_form(quantizer: Any) -> dict[str, Any]:
    """Returns the arguments of `index_backprop` and `soft_lookup` that are fields of a quantizer."""
    return {name: getattr(quantizer, name) for name in LOOKUP_FIELDS}


def entropy_terms(quantizer: Any, found: IndexBackprop | SoftLookup) -> dict[str, jax.Array]:
    """Returns the fields of `Quantized` about entropies, with the quantizer's two weights in the loss."""
    sample_term = quantizer.sample_entropy_weight * found.sample_entropy
    return {
        "sample_entropy": found.sample_entropy,
        "batch_entropy": found.batch_entropy,
        "entropy_loss": sample_term - quantizer.batch_entropy_weight * found.batch_entropy,
    }


class IndexBackpropQuantizer(nn.Module):
    """Index Backpropagation Quantization with a codebook [codebook_size, dim].

    With e the chosen row and sg the stop-gradient, quant_loss is the sum of three mean squares: (z_q - z)^2, whose
    gradient reaches every row; the commitment term (sg(e) - z)^2; and the codebook term (e - sg(z))^2. `beta` scales
    the codebook term, as in the released code, or with beta_on="commitment" the commitment term, as in the paper.
    Without `double_loss` the first term is left out, and VQ's loss remains. The codebook starts as
    normal(0, init_scale), where 0 stands for 1, as released.

    `l2_normalize` divides latents and rows by their lengths before anything else, as in Emu3.5's quantizer: logits,
    losses, z_q and what `lookup` returns are of vectors of length one, |z . e| / `logit_temperature` stays within
    1 / `logit_temperature`, and rows start at length one, whatever init_scale is.

    entropy_loss = sample_entropy_weight * sample entropy - batch_entropy_weight * batch entropy. The remaining fields
    are those of `ibq_jax.ops.index_backprop`. `precision` is that of the logits in training,
    `gradient_precision` that of the products from which only gradients come, `search_precision` that of `nearest`.
    """

    codebook_size: int
    dim: int
    beta: float = 0.25
    beta_on: str = "codebook"
    double_loss: bool = True
    init_scale: float = 0.0
    l2_normalize: bool = False
    logit_temperature: float = 1.0
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

    def setup(self):
        if self.beta_on not in BETA_ON:
            raise UsageError(f"quantizer.beta_on is {self.beta_on!r}; it must be one of {', '.join(BETA_ON)}")
        initial = normal(self.init_scale or 1.0)

        def initial_directions(key, shape, dtype):
            return unit(initial(key, shape, dtype))

        codebook_init = nn.with_logical_partitioning(
            initial_directions if self.l2_normalize else initial, ("codes", "code_dim")
        )
        self.codebook = jnp.asarray(self.param("codebook", codebook_init, (self.codebook_size, self.dim), jnp.float32))

    @property
    def latent_dim(self) -> int:
        return self.dim

    def code_vectors(self) -> jax.Array:
        """Returns the vectors that the codes stand for, [K, D]."""
        return unit(self.codebook) if self.l2_normalize else self.codebook

    def project_latents(self, z: jax.Array) -> jax.Array:
        """Returns latents as they are compared with those vectors, float32 of the same shape."""
        z = z.astype(jnp.float32)
        return unit(z) if self.l2_normalize else z

    def __call__(self, z: jax.Array) -> Quantized:
        z = self.project_latents(z)
        out = index_backprop(
            z.reshape(-1, self.dim), self.code_vectors(), logit_temperature=self.logit_temperature, **lookup_form(self)
        )
        z_q = out.z_q.reshape(z.shape)
        indices = out.indices.reshape(z.shape[:-1])
        return Quantized(
            z_q=z_q,
            indices=indices,
            quant_loss=self._quant_loss(z, z_q, indices),
            **entropy_terms(self, out),
            max_probability=out.max_probability,
            max_logit=out.max_logit,
        )

    def look_up(self, z: jax.Array, values: jax.Array, temperature: float = 1.0) -> jax.Array:
        """Latents [B, h, w, D] and values [K, W] -> the values of the latents' codes, float32 [B, h, w, W].

        Differentiable in all three, as z_q is in latents and codebook (`ibq_jax.ops.soft_lookup`). `temperature`
        divides the logits besides `logit_temperature`, for the gradient.
        """
        flat, temperature = self.project_latents(z).reshape(-1, self.dim), self.logit_temperature * temperature
        out = soft_lookup(flat, self.code_vectors(), values, temperature=temperature, **lookup_form(self))
        return out.value.reshape(*z.shape[:-1], -1)

    def _quant_loss(self, z: jax.Array, z_q: jax.Array, indices: jax.Array) -> jax.Array:
        # The released code has no switch between the paper's "double" and "single" loss, and the ablation gives no
        # formula: here "double" is the sum as released, and "single" is VQ's loss.
        all_rows = jnp.mean((z_q - z) ** 2) if self.double_loss else 0.0
        commitment = jnp.mean((jax.lax.stop_gradient(z_q) - z) ** 2)
        codebook = jnp.mean((self.lookup(indices) - jax.lax.stop_gradient(z)) ** 2)
        if self.beta_on == "codebook":
            return all_rows + commitment + self.beta * codebook
        return all_rows + self.beta * commitment + codebook

    def nearest(self, z: jax.Array) -> jax.Array:
        """Latents [B, h, w, D] -> codes int32 [B, h, w] by the largest dot product; on a tie the smallest index."""
        flat = self.project_latents(z).reshape(-1, self.dim)
        codes = nearest_codes(
            flat, self.code_vectors(), precision=self.search_precision, block_size=self.block_size, mesh=self.mesh
        )
        return codes.reshape(z.shape[:-1])

    def lookup(self, indices: jax.Array) -> jax.Array:
        """Codes [B, h, w], each in 0..K-1 -> the rows of the codebook that they stand for [B, h, w, D]."""
        rows = jnp.take(self.codebook, indices, axis=0, mode="clip")
        return unit(rows) if self.l2_normalize else rows
