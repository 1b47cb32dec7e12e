"""IBQ's quantizer as a module: the codebook, its losses, and the way from latents to codes and back (arXiv 2412.02692).

Shapes: latents [B, h, w, D], codebook [K, D], codes [B, h, w]. Everything here is float32. What it does for the model
the other quantizers do too, see `ibq_jax.tokenizer.quantizers`.
"""

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.nn.initializers import normal
from jax.sharding import Mesh

from ibq_jax.base.errors import UsageError
from ibq_jax.ops.index_backprop import index_backprop, nearest_codes

BETA_ON = ("codebook", "commitment")


@flax.struct.dataclass
class Quantized:
    """What a quantizer makes of a batch of latents; all but the first two are scalars. None: it has no such thing."""

    z_q: jax.Array  # [B, h, w, D], the chosen rows; differentiable in the latents, IBQ's in every row too
    indices: jax.Array  # [B, h, w] int32
    quant_loss: jax.Array
    entropy_loss: jax.Array
    sample_entropy: jax.Array | None = None  # nats
    avg_entropy: jax.Array | None = None  # nats
    max_probability: jax.Array | None = None  # mean over tokens of the chosen code's probability; no gradient
    max_logit: jax.Array | None = None  # largest |z . e|; no gradient


def straight_through(value: jax.Array, z: jax.Array) -> jax.Array:
    """`value` to the last bit, with its gradient copied to `z` as it is."""
    return jax.lax.stop_gradient(value) + (z - jax.lax.stop_gradient(z))


class IndexBackpropQuantizer(nn.Module):
    """Index Backpropagation Quantization with a codebook of `codebook_size` x `dim` that starts normal, with
    the standard deviation `init_scale`.

    quant_loss is three mean squares: of z_q - z, of the chosen row from the latent's side (commitment) and from the
    row's side (codebook). `beta` scales the codebook term as the released code does, or with beta_on="commitment" the
    commitment term as the paper writes. Without `double_loss` the first, whose gradient reaches every row, is left out,
    and VQ's loss remains. entropy_loss = sample_entropy_weight * sample_entropy - batch_entropy_weight * avg_entropy.
    The other fields are those of `ibq_jax.ops.index_backprop`.
    """

    codebook_size: int
    dim: int
    beta: float = 0.25
    beta_on: str = "codebook"
    double_loss: bool = True
    init_scale: float = 1.0
    entropy_temperature: float = 0.01
    entropy_group_tokens: int = 0
    sample_entropy_weight: float = 1.0
    batch_entropy_weight: float = 1.0
    block_size: int = 0
    implementation: str = "streamed"
    mesh: Mesh | None = None

    def setup(self):
        if self.beta_on not in BETA_ON:
            raise UsageError(f"quantizer.beta_on is {self.beta_on!r}; it must be one of {', '.join(BETA_ON)}")
        codebook_init = nn.with_logical_partitioning(normal(self.init_scale), ("codes", "code_dim"))
        self.codebook = jnp.asarray(self.param("codebook", codebook_init, (self.codebook_size, self.dim), jnp.float32))

    @property
    def latent_dim(self) -> int:
        return self.dim

    def __call__(self, z: jax.Array) -> Quantized:
        z = z.astype(jnp.float32)
        out = index_backprop(
            z.reshape(-1, self.dim),
            self.codebook,
            entropy_temperature=self.entropy_temperature,
            entropy_group_tokens=self.entropy_group_tokens,
            block_size=self.block_size,
            implementation=self.implementation,
            mesh=self.mesh,
        )
        z_q = out.z_q.reshape(z.shape)
        indices = out.indices.reshape(z.shape[:-1])
        return Quantized(
            z_q=z_q,
            indices=indices,
            quant_loss=self._quant_loss(z, z_q, indices),
            sample_entropy=out.sample_entropy,
            avg_entropy=out.avg_entropy,
            entropy_loss=self.sample_entropy_weight * out.sample_entropy - self.batch_entropy_weight * out.avg_entropy,
            max_probability=out.max_probability,
            max_logit=out.max_logit,
        )

    def _quant_loss(self, z: jax.Array, z_q: jax.Array, indices: jax.Array) -> jax.Array:
        # The paper's "double" loss is taken to be the sum as released, its "single" one what VQ has: the authors' code
        # has no switch, and their ablation no formula.
        both = jnp.mean((z_q - z) ** 2) if self.double_loss else 0.0
        commitment = jnp.mean((jax.lax.stop_gradient(z_q) - z) ** 2)
        codebook = jnp.mean((self.lookup(indices) - jax.lax.stop_gradient(z)) ** 2)
        if self.beta_on == "codebook":
            return both + commitment + self.beta * codebook
        return both + self.beta * commitment + codebook

    def nearest(self, z: jax.Array) -> jax.Array:
        """Latents [B, h, w, D] -> int32 [B, h, w], the code of the largest dot product, the smallest index on a tie."""
        flat = z.astype(jnp.float32).reshape(-1, self.dim)
        return nearest_codes(flat, self.codebook, block_size=self.block_size, mesh=self.mesh).reshape(z.shape[:-1])

    def lookup(self, indices: jax.Array) -> jax.Array:
        """Codes [B, h, w], each in 0..K-1 -> their rows [B, h, w, D]."""
        return jnp.take(self.codebook, indices, axis=0, mode="clip")
