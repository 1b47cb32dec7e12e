"""The generator: a Llama-like, class-conditional decoder over a tokenizer's codes (arXiv 2412.02692, section 3.3).

Shapes: codes int32 [B, h, w], read row by row; labels int32 [B], where `num_classes` stands for "no class"; S = h w
positions: the class token and all codes but the last; C = embed_dim, V vocabulary, L layers, G key-value heads, D
channels per head.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn.initializers import normal, zeros
from jax.sharding import Mesh
from ml_collections import ConfigDict

from ibq_jax.autoregressive.layers import (
    INITIAL_DEVIATION,
    KEPT,
    Block,
    DropoutMasks,
    Kernel,
    Modulation,
    RMSNorm,
    cudnn_applies,
    dense,
    drop,
    rotary_angles,
)
from ibq_jax.base.errors import UsageError
from ibq_jax.base.precision import FULL
from ibq_jax.base.sharding import batch_sharding, platform
from ibq_jax.ops import embedding_lookup

REMAT = {
    "none": None,
    "dots": jax.checkpoint_policies.save_only_these_names(KEPT),
    "blocks": jax.checkpoint_policies.nothing_saveable,
}


class TokenEmbedding(nn.Module):
    """Token embeddings, codes [B, S] -> [B, S, C] float32: a learned table, or the tokenizer's codebook and two layers.

    The codebook is only an initial value and is trained further: the released code means to freeze it, but misspells
    the flag.
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
    """The generator's network.

    Attributes:
        vocab_size: V, the tokenizer's codebook size.
        grid: (h, w), rows and columns of an image's codes.
        num_classes: classes of the labels; 0 for data without classes.
        num_layers: L.
        num_heads: query heads; divides embed_dim, leaving a multiple of 4 channels per head.
        num_kv_heads: G, key-value heads; divides num_heads.
        embed_dim: C.
        gamma_init: factor on the initial weights that produce the residual gates.
        dropout: rate on embeddings, attention outputs and feed-forward outputs.
        no_class: gives the table of classes one more row, its last, for "no class".
        use_pretrained_codebook: makes token embeddings from the tokenizer's codebook, [vocab_size, codebook_dim].
        codebook_dim: dimensions of that codebook.
        attention: implementation of jax.nn.dot_product_attention, "xla" or (on GPUs, in bfloat16) "cudnn".
        remat: what the backward pass computes again, a key of `REMAT`.
        unroll: layers in one turn of the loop over layers. A loop copies what the backward pass needs of its layers
            into one array and out of it again, but compiles faster.
        dtype: type that matrix products compute in.
        mesh: the devices among which batch and vocabulary are split; None for no split.
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
    attention: Kernel = "xla"
    remat: str = "none"
    unroll: int = 1
    dtype: jnp.dtype = jnp.float32
    mesh: Mesh | None = None

    @property
    def positions(self) -> int:
        """S, which is also the number of codes per image."""
        return math.prod(self.grid)

    @property
    def head_channels(self) -> int:
        """D, the channels per head."""
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
            length=self.num_layers,
            unroll=self.unroll,
            metadata_params={nn.PARTITION_NAME: "layers"},
            variable_axes={"params": 0},
        )
        modulation = nn.scan(Modulation, split_rngs={"params": True}, **per_layer)
        self.modulation = modulation(self.gamma_init, self.dtype)
        block = Block
        if self.remat != "none":  # argument 4, counted from the module, is `train`
            # Without a loop, XLA would find that the layer was computed before, and keep all of it.
            together = self.unroll > 1
            block = nn.remat(Block, policy=REMAT[self.remat], prevent_cse=together, static_argnums=(4,))
        blocks = nn.scan(
            block, split_rngs={"params": True, "dropout": True}, in_axes=(0, nn.broadcast, nn.broadcast), **per_layer
        )
        self.blocks = blocks(self.num_heads, self.num_kv_heads, self.dropout, self.attention, self.dtype)
        self.token_dropout = DropoutMasks(self.dropout)
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
        """Returns logits float32 [B, S, V] of every code, given the class and the codes before it (teacher forced)."""
        return jnp.einsum(
            "bsc,vc->bsv", self.hidden(codes, labels).astype(self.dtype), self.head.astype(self.dtype),
            precision=FULL, preferred_element_type=jnp.float32,
        )  # fmt: skip

    def hidden(self, codes: jax.Array, labels: jax.Array, train: bool = False) -> jax.Array:
        """Returns the input of the head, float32 [B, S, C]; `train` applies dropout (rng "dropout")."""
        return self.hidden_after(self.tok_emb(codes.reshape(len(codes), -1)[:, :-1]), labels, train)

    def hidden_after(self, embeddings: jax.Array, labels: jax.Array, train: bool = False) -> jax.Array:
        """Returns what `hidden` does, given the token embeddings of all codes but the last, [B, S - 1, C]."""
        return self._forward(embeddings, labels, self.modulations(labels), train)[0]

    def states_after(self, embeddings: jax.Array, labels: jax.Array, train: bool = False) -> jax.Array:
        """Returns the last layer's outputs, without the norm before the head, float32 [B, S, C].

        Arguments are those of `hidden_after`.
        """
        return self._layers(embeddings, labels, self.modulations(labels)[0], train)[0]

    def prefill(self, prefix: jax.Array, labels: jax.Array, modulations: tuple[jax.Array, jax.Array]):
        """Runs the class token and the first codes [B, P]; `modulations` are those of the labels.

        Returns:
            (the head's input at the last of them [B, C], (keys, values), each [L, B, 1 + P, G, D]).
        """
        hidden, keys_values = self._forward(self.tok_emb(prefix), labels, modulations, train=False)
        return hidden[:, -1], keys_values

    def modulations(self, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns the classes' modulations, float32: of the layers [L, B, 6, C]; scale and shift before the head
        [B, 2, C]."""
        condition = nn.silu(self._class_rows(labels))
        _, per_layer = self.modulation(condition, None)
        head = self.head_modulation(condition).astype(jnp.float32)
        return per_layer, head.reshape(-1, 2, self.embed_dim)

    def embed(self, codes: jax.Array) -> jax.Array:
        """Returns the token embeddings of codes [B, T], float32 [B, T, C]."""
        return self.tok_emb(codes)

    def _forward(self, embeddings: jax.Array, labels: jax.Array, modulations: tuple[jax.Array, jax.Array], train: bool):
        per_layer, head = modulations
        x, keys_values = self._layers(embeddings, labels, per_layer, train)
        scale, shift = head[:, :1], head[:, 1:]
        return self._constrain_batch(self.head_norm(x) * (1 + scale) + shift), keys_values

    def _layers(self, embeddings: jax.Array, labels: jax.Array, per_layer: jax.Array, train: bool):
        x = jnp.concatenate((self._class_rows(labels)[:, None], embeddings), axis=1)
        x = self._constrain_batch(drop(x, self.token_dropout(x.shape, train)[0], self.dropout))
        return self.blocks(x, per_layer, rotary_angles(self.grid, self.head_channels), train)

    def _class_rows(self, labels: jax.Array) -> jax.Array:
        known = jnp.where(labels < 0, self.num_classes, labels)  # a data set without classes has label -1
        return self._constrain_batch(jnp.take(self.class_emb, known, axis=0, mode="clip"))

    def _constrain_batch(self, x: jax.Array) -> jax.Array:
        return x if self.mesh is None else jax.lax.with_sharding_constraint(x, batch_sharding(self.mesh))


def check_layout(embed_dim: int, num_heads: int, num_kv_heads: int) -> None:
    """Checks that num_heads divides embed_dim, and num_kv_heads num_heads. Raises UsageError if not."""
    if embed_dim % num_heads or embed_dim // num_heads % 4:
        raise UsageError(
            f"model.embed_dim={embed_dim} does not divide into model.num_heads={num_heads} of a multiple of 4 channels"
        )
    if num_heads % num_kv_heads:
        raise UsageError(f"model.num_heads={num_heads} is not a multiple of model.num_kv_heads={num_kv_heads}")


def build_model(config: ConfigDict, mesh: Mesh | None = None) -> GeneratorModel:
    """Returns the model of a config from configs/autoregressive.py whose model sizes are all known.

    A `mesh` splits the vocabulary's rows over its axis `codebook`. `model.attention` "auto" is cuDNN's kernel where it
    applies to the devices of `mesh`, or without one to JAX's first device; `model.unroll` 0 is all layers on GPUs.
    """
    no_class = config.loss.class_dropout > 0 or not config.model.num_classes
    sizes, dtype = dict(config.model), jnp.dtype(config.dtype)
    if sizes["attention"] == "auto":
        device = mesh.devices.flat[0] if mesh else jax.devices()[0]
        applies = cudnn_applies(device, dtype, sizes["embed_dim"] // sizes["num_heads"])
        sizes["attention"] = "cudnn" if applies else "xla"
    if sizes["unroll"] == 0:
        sizes["unroll"] = sizes["num_layers"] if platform(mesh) == "gpu" else 1
    return GeneratorModel(**sizes, no_class=no_class, dtype=dtype, mesh=mesh)
