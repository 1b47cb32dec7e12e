"""The public classes: a trained tokenizer, and a trained generator of its codes, in five lines.

from ibq_jax import Generator, Tokenizer
tokenizer, generator = Tokenizer.load("runs/tok"), Generator.load("runs/ar")
codes = tokenizer.encode(images)        # uint8 [B, H, W, 3] -> int32 [B, h, w]
codes = generator.sample(labels)        # int [B] -> int32 [B, h, w]
images = tokenizer.decode(codes)        # float [-1, 1] [B, H, W, 3]
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from ibq_jax.autoregressive.generate import LogitFilter
from ibq_jax.autoregressive.model import GeneratorModel
from ibq_jax.autoregressive.sample import Guidance, Sampler, check_codes
from ibq_jax.base.errors import UsageError
from ibq_jax.base.sharding import make_mesh
from ibq_jax.data.preprocess import to_float
from ibq_jax.interop import generator_names, tokenizer_names
from ibq_jax.interop.load import load_generator, load_tokenizer
from ibq_jax.tokenizer.model import TokenizerModel


@dataclass(frozen=True)
class Tokenizer:
    """Images to codes and back, with fixed weights. `params` is the generator's tree of arrays."""

    model: TokenizerModel
    params: Mapping

    @classmethod
    def load(cls, path: str | Path, use_ema: bool = True) -> "Tokenizer":
        """From a run's folder (its newest whole checkpoint), one step's folder under its `checkpoints/`, a file of
        weights (.ckpt, .pt, .safetensors) or the hub (hf://OWNER/NAME).

        Averaged weights where there are any, unless `use_ema` is False. Raises UsageError when there is no tokenizer.
        """
        return cls(*load_tokenizer(path, use_ema))

    @classmethod
    def from_torch(cls, state_dict: Mapping[str, np.ndarray], config: Mapping, use_ema: bool = False) -> "Tokenizer":
        """From tensors under the names of the published checkpoints, with a configuration as they have it.

        `config` needs "ddconfig", "n_embed" and "embed_dim". Strict: raises UsageError naming what is missing, unknown
        or misshapen, and loads nothing then.
        """
        params = tokenizer_names.tokenizer_from_torch(state_dict, config, use_ema)
        return cls(TokenizerModel(**tokenizer_names.model_fields(config)), jax.tree.map(jnp.asarray, params))

    def to_torch(self) -> dict[str, np.ndarray]:
        """The weights under their published names, in PyTorch's layouts. Raises UsageError for other quantizers."""
        tokenizer_names.check_quantizer(self.model.quantizer)
        return tokenizer_names.tokenizer_to_torch(self.params)

    @property
    def codebook_size(self) -> int:
        """K, the number of codes."""
        return self.model.codebook_size

    @property
    def num_codes(self) -> int:
        """The earlier name of `codebook_size`."""
        return self.codebook_size

    def encode(self, images: np.ndarray | jax.Array) -> jax.Array:
        """uint8 [B, H, W, 3], or float in [-1, 1] -> codes int32 [B, h, w].

        Raises UsageError for another shape or type, or sides that are no multiples of the downsampling.
        """
        images = jnp.asarray(images)
        if images.ndim != 4 or images.shape[-1] != 3:
            raise UsageError(f"encode takes images [B, H, W, 3], not an array of shape {images.shape}")
        if images.dtype != jnp.uint8 and not jnp.issubdtype(images.dtype, jnp.floating):
            raise UsageError(f"encode takes uint8 images, or floats in [-1, 1], not {images.dtype}")
        return _encode(self.model, self.params, images)

    def decode(self, codes: np.ndarray | jax.Array) -> jax.Array:
        """Codes int [B, h, w] -> images float32 [B, H, W, 3] in [-1, 1], but for the network's overshoot: clip to show.

        Raises UsageError for another shape or type, or a code outside 0..K-1.
        """
        codes = np.asarray(codes)
        if codes.ndim != 3 or not np.issubdtype(codes.dtype, np.integer):
            raise UsageError(f"decode takes integer codes [B, h, w], not {codes.dtype} of shape {codes.shape}")
        if codes.size and not 0 <= codes.min() <= codes.max() < self.codebook_size:
            raise UsageError(
                f"codes lie in 0..{self.codebook_size - 1}; these reach from {codes.min()} to {codes.max()}"
            )
        return _decode(self.model, self.params, jnp.asarray(codes, jnp.int32))


@dataclass(frozen=True)
class Generator:
    """Classes to codes, with fixed weights. `params` is the model's tree of arrays."""

    model: GeneratorModel
    params: Mapping
    prefix: str = generator_names.PREFIX  # of the published names, in `to_torch`

    @classmethod
    def load(cls, path: str | Path, use_ema: bool = True) -> "Generator":
        """From a run's folder, a checkpoint, a file or the hub, as `Tokenizer.load`.

        Averaged weights where there are any, unless `use_ema` is False. Raises UsageError when there is no generator.
        """
        return cls(*load_generator(path, use_ema))

    @classmethod
    def from_torch(cls, state_dict: Mapping[str, np.ndarray], config: Mapping) -> "Generator":
        """From tensors under the names of the published checkpoints, with a configuration as they have it.

        `config` needs "vocab_size", "block_size", "n_layer", "n_head" and "n_embd". Names may do without "transformer."
        in front. Strict: raises UsageError naming what is missing, unknown or misshapen, and loads nothing then.
        """
        no_class = generator_names.has_no_class(state_dict, generator_names.model_fields(config)["num_classes"])
        model = generator_names.build(config, no_class)
        params = generator_names.generator_from_torch(state_dict, model)
        return cls(model, jax.tree.map(jnp.asarray, params), generator_names.name_prefix(state_dict))

    def to_torch(self) -> dict[str, np.ndarray]:
        """The weights under their published names, in PyTorch's layouts."""
        return generator_names.generator_to_torch(self.params, self.prefix)

    @cached_property
    def _sampler(self) -> Sampler:
        return Sampler(self.model, self.params, make_mesh({"data": 1}, jax.local_devices()[:1]))

    def sample(
        self,
        labels: np.ndarray,
        cfg_scale: float = 2.25,
        temperature: float = 1.1,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        *,
        cfg_schedule: str = "constant",
        cfg_power: float = 1.0,
        cfg_interval: tuple[float, float] = (0.0, 1.0),
        prefix: np.ndarray | None = None,
        first: int = 0,
    ) -> jax.Array:
        """Codes int32 [B, h, w] of pictures with `labels` [B], on one device.

        Picture i is number `first` + i of `seed`, and the same however many are drawn with it.

        Args:
            labels: classes, one a picture.
            cfg_scale: of classifier-free guidance; 1 is none, at half the work.
            temperature: divides the guided logits; 0 takes the likeliest code.
            top_k: draw from the likeliest codes only; 0 or None: from all.
            top_p: draw from the likeliest codes that together reach this probability; in (0, 1].
            seed: of the drawing, 0..2**32 - 1.
            cfg_schedule, cfg_power, cfg_interval: as in `ibq_jax.autoregressive.sample.Guidance`.
            prefix: codes that are given, the first P of a picture row by row [B, P], or whole rows of it [B, rows, w].
            first: number of the first picture.

        Raises UsageError for settings, labels or codes out of range.
        """
        if prefix is not None and np.ndim(prefix) == 3:
            prefix = np.reshape(prefix, (len(prefix), -1))
        codes = self._sampler(
            labels,
            guidance=Guidance(cfg_scale, cfg_schedule, cfg_power, tuple(cfg_interval)),
            logit_filter=LogitFilter(top_k or 0, top_p),
            temperature=temperature,
            seed=seed,
            sample_ids=first + np.arange(np.size(labels)),
            prefix=prefix,
        )
        return jnp.asarray(codes)

    def logits(self, codes: np.ndarray, labels: np.ndarray) -> jax.Array:
        """Teacher forced: codes [B, h, w] or [B, h w], labels [B] -> float32 [B, h w, vocabulary].

        A label may be num_classes, "no class". Raises UsageError for other shapes or types, or values out of range.
        """
        codes, labels = check_codes(self.model, codes, labels)
        return _logits(self.model, self.params, codes, labels)


@partial(jax.jit, static_argnums=0)
def _logits(model: GeneratorModel, params: Mapping, codes: jax.Array, labels: jax.Array) -> jax.Array:
    return model.apply({"params": params}, codes, labels)


@partial(jax.jit, static_argnums=0)
def _encode(model: TokenizerModel, params: Mapping, images: jax.Array) -> jax.Array:
    return model.apply({"params": params}, to_float(images), method="encode")


@partial(jax.jit, static_argnums=0)
def _decode(model: TokenizerModel, params: Mapping, codes: jax.Array) -> jax.Array:
    return model.apply({"params": params}, codes, method="decode")
