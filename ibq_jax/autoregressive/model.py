"""The generator: a Llama-like decoder over a tokenizer's codes, one class at a time (arXiv 2412.02692, section 3.3).

Shapes: codes int32 [B, h, w], read row by row; labels int32 [B], of which `num_classes` itself is "no class"; S = h w
positions, the class token and all codes but the last; C width, V vocabulary, L layers, G key-value heads, D channels of
a head.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn.initializers import normal, zeros
from jax.sharding import Mesh
from ml_collections import ConfigDict

from ibq_jax.autoregressive.layers import INITIAL_DEVIATION, Block, Modulation, RMSNorm, dense, rotary_angles
from ibq_jax.base.errors import UsageError
from ibq_jax.base.sharding import batch_sharding
from ibq_jax.ops import embedding_lookup

REMAT = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "blocks": jax.checkpoint_policies.nothing_saveable,
}


class TokenEmbedding(nn.Module):
    """Codes [B, S] -> [B, S, C] float32: a learned table, or rows of the tokenizer's codebook and two layers on top.

    The codebook is trained on from where it starts: the released code means to freeze it, but misspells the flag.
    """

    vocab_size: int
    embed_dim: int
    codebook_dim: int  # 0: a learned table
    dtype: jnp.dtype
    mesh: Mesh | None

    @nn.compact
    def __call__(self, codes: jax.Array) -> jax.Array:
        init = nn.with_logical_partitioning(normal(INITIAL_DEVIATION), (("vocabulary", "width")))
        shape = (self.vocab_size, self.codebook_dim or self.embed_dim)
        rows = embedding_lookup(self.param("embedding", init, shape, jnp.float32), codes, mesh=self.mesh)
        if not self.codebook_dim:
            return rows
        hidden = dense(self.embed_dim, ("code_dim", "width"), dtype=self.dtype, name="fc1", use_bias=True)(rows)
        out = dense(self.embed_dim, ("hidden", "width"), dtype=self.dtype, name="fc2", use_bias=True)(nn.gelu(hidden))
        return out.astype(jnp.float32)


class GeneratorModel(nn.Module):
    """`num_heads` divides `embed_dim` into channels that are a multiple of 4; `num_kv_heads` divides `num_heads`.

    `use_pretrained_codebook`: token embeddings are made from the tokenizer's codebook, rows of `codebook_dim`.
    `no_class`: whether the class table has a row, its last, for pictures without a class.
    `attention`: an implementation of jax.nn.dot_product_attention, "xla" or (on GPUs, in bfloat16) "cudnn".
    """

    vocab_size: int
    grid: tuple[int, int]
    num_classes: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    embed_dim: int
    gamma_init: float
    dropout: float = 0.0
    no_class: bool = True
    use_pretrained_codebook: bool = False
    codebook_dim: int = 256
    attention: str = "xla"
    remat: str = "none"
    dtype: jnp.dtype = jnp.float32
    mesh: Mesh | None = None

    @property
    def positions(self) -> int:
        """S, which is also the number of codes of a picture."""
        return math.prod(self.grid)

    @property
    def head_channels(self) -> int:
        """D."""
        return self.embed_dim // self.num_heads

    def setup(self):
        check_layout(self.embed_dim, self.num_heads, self.num_kv_heads)
        codebook_dim = self.codebook_dim if self.use_pretrained_codebook else 0
        self.tok_emb = TokenEmbedding(self.vocab_size, self.embed_dim, codebook_dim, self.dtype, self.mesh)
        class_init = nn.with_logical_partitioning(normal(INITIAL_DEVIATION), ("classes", "width"))
        self.class_emb = self.param(
            "class_emb", class_init, (self.num_classes + self.no_class, self.embed_dim), jnp.float32
        )
        per_layer = dict(
            length=self.num_layers, metadata_params={nn.PARTITION_NAME: "layers"}, variable_axes={"params": 0}
        )
        modulation = nn.scan(Modulation, split_rngs={"params": True}, **per_layer)
        self.modulation = modulation(self.gamma_init, self.dtype)
        block = Block
        if self.remat != "none":  # argument 4, counted from the module, is `train`
            block = nn.remat(Block, policy=REMAT[self.remat], prevent_cse=False, static_argnums=(4,))
        blocks = nn.scan(
            block, split_rngs={"params": True, "dropout": True}, in_axes=(0, nn.broadcast, nn.broadcast), **per_layer
        )
        self.blocks = blocks(self.num_heads, self.num_kv_heads, self.dropout, self.attention, self.dtype)
        self.token_dropout = nn.Dropout(self.dropout)
        self.head_norm = RMSNorm()
        self.head_modulation = dense(
            2 * self.embed_dim,
            ("width", "modulation"),
            dtype=self.dtype,
            use_bias=True,
            kernel_init=normal(INITIAL_DEVIATION / 2),
        )
        head_init = nn.with_logical_partitioning(zeros, (("vocabulary", "width")))
        self.head = self.param("head", head_init, (self.vocab_size, self.embed_dim), jnp.float32)

    def __call__(self, codes: jax.Array, labels: jax.Array) -> jax.Array:
        """Logits float32 [B, S, V] of every code given its class and the codes before it (teacher forced)."""
        return jnp.einsum(
            "bsc,vc->bsv", self.hidden(codes, labels).astype(self.dtype), self.head.astype(self.dtype),
            preferred_element_type=jnp.float32,
        )  # fmt: skip

    def hidden(self, codes: jax.Array, labels: jax.Array, train: bool = False) -> jax.Array:
        """What the head is applied to, float32 [B, S, C]; `train` drops out (rng "dropout")."""
        known = codes.reshape(len(codes), -1)[:, :-1]
        return self._forward(known, labels, self.modulations(labels), train)[0]

    def prefill(self, prefix: jax.Array, labels: jax.Array, modulations: tuple[jax.Array, jax.Array]):
        """Codes [B, P] behind the class token -> (what the head is applied to after the last of them, [B, C]; keys and
        values, two arrays [L, B, 1 + P, G, D]). `modulations` are those of the labels."""
        hidden, keys_values = self._forward(prefix, labels, modulations, train=False)
        return hidden[:, -1], keys_values

    def modulations(self, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
        """All that a class does to the network but being its first token: float32 [L, B, 6, C], and scale and shift
        before the head, [B, 2, C]."""
        condition = nn.silu(self._class_rows(labels))
        _, per_layer = self.modulation(condition, None)
        head = self.head_modulation(condition).astype(jnp.float32)
        return per_layer, head.reshape(-1, 2, self.embed_dim)

    def embed(self, codes: jax.Array) -> jax.Array:
        """Codes [B, T] -> [B, T, C] float32."""
        return self.tok_emb(codes)

    def _forward(self, codes: jax.Array, labels: jax.Array, modulations: tuple[jax.Array, jax.Array], train: bool):
        per_layer, head = modulations
        x = jnp.concatenate((self._class_rows(labels)[:, None], self.tok_emb(codes)), axis=1)
        x = self._on_the_batch(self.token_dropout(x, deterministic=not train))
        x, keys_values = self.blocks(x, per_layer, rotary_angles(self.grid, self.head_channels), train)
        scale, shift = head[:, :1], head[:, 1:]
        return self._on_the_batch(self.head_norm(x) * (1 + scale) + shift), keys_values

    def _class_rows(self, labels: jax.Array) -> jax.Array:
        known = jnp.where(labels < 0, self.num_classes, labels)  # below 0: of a data set without classes
        return self._on_the_batch(jnp.take(self.class_emb, known, axis=0, mode="clip"))

    def _on_the_batch(self, x: jax.Array) -> jax.Array:
        return x if self.mesh is None else jax.lax.with_sharding_constraint(x, batch_sharding(self.mesh))


def check_layout(embed_dim: int, num_heads: int, num_kv_heads: int) -> None:
    """Raises UsageError for heads that do not divide what they must."""
    if embed_dim % num_heads or embed_dim // num_heads % 4:
        raise UsageError(
            f"model.embed_dim={embed_dim} does not divide into model.num_heads={num_heads} of a multiple of 4 channels"
        )
    if num_heads % num_kv_heads:
        raise UsageError(f"model.num_heads={num_heads} is not a multiple of model.num_kv_heads={num_kv_heads}")


def build_model(config: ConfigDict, mesh: Mesh | None = None) -> GeneratorModel:
    """The model of a config from configs/autoregressive.py; on a `mesh`, vocabulary rows lie on its axis `codebook`."""
    no_class = config.loss.class_dropout > 0 or not config.model.num_classes
    return GeneratorModel(**config.model, no_class=no_class, dtype=jnp.dtype(config.dtype), mesh=mesh)
