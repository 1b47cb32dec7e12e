"""The tokenizer: encoder, quantizer and decoder in one module (arXiv 2412.02692, figure 2).

Shapes: images float [B, H, W, 3] in [-1, 1], latents [B, h, w, D], codes int32 [B, h, w]; H = h * downsampling.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.core import FrozenDict
from jax.sharding import Mesh
from ml_collections import ConfigDict

from ibq_jax.base.errors import UsageError
from ibq_jax.base.precision import check_precision, compute_dtype
from ibq_jax.base.sharding import platform
from ibq_jax.tokenizer.autoencoder import SEEN, Conv, Decoder, Encoder, Layout
from ibq_jax.tokenizer.quantizer import Quantized
from ibq_jax.tokenizer.quantizers import build_quantizer

# A module of the parameters next to the model's own, which a loss trains (`net_losses.py`); it is never exported.
PROJECTION = "alignment"


class TokenizerModel(Layout, kw_only=True):
    """An image tokenizer: the autoencoder's fields (`Layout`) and the quantizer's.

    Attributes:
        codebook_size: K, the number of codes.
        code_dim: D, except for quantizers whose number of codes fixes D (lfq, fsq).
        quantizer: the quantizer's name, one of `ibq_jax.tokenizer.quantizers.QUANTIZERS`.
        quantizer_settings: settings of any quantizers by name; the chosen one picks those it declares.
    """

    codebook_size: int
    code_dim: int
    quantizer: str = "ibq"
    quantizer_settings: Mapping = FrozenDict()

    def setup(self):
        self.encoder = Encoder(**self.layout())
        self.decoder = Decoder(**self.layout())
        settings = {**self.quantizer_settings, "search_precision": self.precision}
        self.quantize = build_quantizer(
            self.quantizer, settings, codebook_size=self.codebook_size, dim=self.code_dim, mesh=self.mesh
        )
        # Latents are full float32 on both sides of the quantizer, whatever the rest computes in.
        self.quant_conv = Conv(self.quantize.latent_dim, 1)
        self.post_quant_conv = Conv(self.z_channels, 1)

    @property
    def downsampling(self) -> int:
        """The pixels per code along one side of an image."""
        return 2 ** (len(self.channel_multipliers) - 1)

    def for_encoding(self, precision: str) -> "TokenizerModel":
        """Returns this model with all products between images and codes, both ways, at a precision from `PRECISIONS`.

        Training may compute in bfloat16; whoever is given codes gets those of "float32" unless they ask otherwise.
        Raises UsageError for an unknown precision, or one that the mesh's devices lack.
        """
        check_precision(precision, "encode.precision", platform(self.mesh))
        return self.clone(dtype=compute_dtype(precision), precision=precision)

    def __call__(self, images: jax.Array) -> tuple[jax.Array, Quantized]:
        """Images -> (reconstructions float32 [B, H, W, 3], the quantizer's output)."""
        return self.from_latents(self.latent(images))

    def from_latents(self, latent: jax.Array) -> tuple[jax.Array, Quantized]:
        """Latents [B, h, w, D] -> what a call returns for the images that they are of."""
        self.sow(SEEN, "latent", latent)
        quantized = self.quantize(latent)
        return self.decode_vectors(quantized.z_q), quantized

    def initialize(self, images: jax.Array) -> jax.Array:
        """Runs every layer without quantizing, so that `init(..., method="initialize")` needs just one image."""
        return self.decode(jnp.zeros(self.latent(images).shape[:-1], jnp.int32))

    def latent(self, images: jax.Array) -> jax.Array:
        """Images -> latents float32 [B, h, w, D]. Raises UsageError if the downsampling does not divide H and W."""
        height, width = images.shape[1:3]
        factor = self.downsampling
        if height % factor or width % factor:
            raise UsageError(
                f"images are {height}x{width} pixels; this tokenizer takes sides that are multiples of {factor}"
            )
        return self.quant_conv(self.encoder(images))

    def encode(self, images: jax.Array) -> jax.Array:
        """Images -> codes int32 [B, h, w]."""
        return self.quantize.nearest(self.latent(images))

    def decode(self, indices: jax.Array) -> jax.Array:
        """Codes [B, h, w] -> images float32 [B, H, W, 3], not clipped."""
        return self.decode_vectors(self.quantize.lookup(indices))

    def code_rows(self) -> jax.Array:
        """Returns the vector that the decoder gets for each code, [K, D]."""
        return self.quantize.lookup(jnp.arange(self.codebook_size))

    def look_up(self, latents: jax.Array, values: jax.Array, temperature: float = 1.0) -> jax.Array:
        """Returns the rows of `values` [K, W] that the latents' codes choose, see `IndexBackpropQuantizer.look_up`."""
        quantize: Any = self.quantize
        return quantize.look_up(latents, values, temperature)

    def code_vectors(self) -> jax.Array:
        """Returns what `code_rows` does, of a quantizer with trained rows, without copying them."""
        quantize: Any = self.quantize
        return quantize.code_vectors()

    def decode_vectors(self, z_q: jax.Array) -> jax.Array:
        """The vectors of codes [B, h, w, D] -> images float32 [B, H, W, 3], not clipped."""
        return self.decoder(self.post_quant_conv(z_q))


def used_in_model_type(path: tuple[str, ...]) -> bool:
    """Returns whether the parameter at a path is used in the model's `dtype` only, unlike the quantizer's."""
    return path[-1] == "kernel" and not set(path) & {"quant_conv", "post_quant_conv", "quantize", PROJECTION}


def downsampling(config: ConfigDict) -> int:
    """Returns the pixels per code along one side of an image."""
    return 2 ** (len(config.model.channel_multipliers) - 1)


def latent_dim(config: ConfigDict) -> int:
    """Returns D, the dimensions of a code. Raises UsageError for a codebook size that the quantizer cannot have."""
    size = dict(codebook_size=config.codebook.size, dim=config.codebook.dim)
    return build_quantizer(config.quantizer.name, quantizer_settings(config), **size).latent_dim


def build_model(config: ConfigDict, mesh: Mesh | None = None) -> TokenizerModel:
    """Returns the model of a config from configs/tokenizer.py; a `mesh` splits the codebook's rows over `codebook`."""
    return TokenizerModel(
        **config.model,
        codebook_size=config.codebook.size,
        code_dim=config.codebook.dim,
        quantizer=config.quantizer.name,
        quantizer_settings=quantizer_settings(config),
        dtype=jnp.dtype(config.dtype),
        mesh=mesh,
    )


def quantizer_settings(config: ConfigDict) -> FrozenDict:
    """Returns the settings of all quantizers, of which `build_quantizer` picks those that its class declares."""
    codebook_settings = {name: config.codebook[name] for name in ("init_scale", "block_size", "implementation")}
    return FrozenDict({**config.quantizer, **codebook_settings}).pop("name")[0]
