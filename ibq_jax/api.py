"""The public classes: a trained tokenizer, and a trained generator of its codes.

from ibq_jax import Generator, Tokenizer
tokenizer, generator = Tokenizer.load("runs/tok"), Generator.load("runs/ar")
codes = tokenizer.encode(images)        # uint8 [B, H, W, 3] -> int32 [B, h, w]
codes = generator.sample(labels)        # int [B] -> int32 [B, h, w]
images = tokenizer.decode(codes)        # float [-1, 1] [B, H, W, 3]
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from ibq_jax.autoregressive.generate import LogitFilter
from ibq_jax.autoregressive.model import GeneratorModel
from ibq_jax.autoregressive.sample_codes import Guidance, Sampler, check_codes
from ibq_jax.base.errors import UsageError
from ibq_jax.base.sharding import make_mesh
from ibq_jax.data.any_size import MAX_PIXELS, MIN_PIXELS, read_upright, resize_within
from ibq_jax.data.preprocess import to_float
from ibq_jax.interop import generator_names, tokenizer_names
from ibq_jax.interop.load import load_generator, load_tokenizer
from ibq_jax.tokenizer.model import TokenizerModel
from ibq_jax.tokenizer.parts import ALL, DECIDING, DECODING


@dataclass(frozen=True)
class Tokenizer:
    """A trained tokenizer: turns images into codes and codes into images.

    Attributes:
        model: the network (a Flax module without state).
        params: its weights, a nested dictionary of arrays.
        parts: those that `params` has, of "encoder", "codebook" and "decoder".
    """

    model: TokenizerModel
    params: Mapping
    parts: tuple[str, ...] = ALL

    @classmethod
    def load(
        cls, path: str | Path, use_ema: bool = True, precision: str = "float32", parts: tuple[str, ...] = ALL
    ) -> "Tokenizer":
        """Loads a tokenizer from wherever it is stored.

        Args:
            path: a run's folder (its newest intact checkpoint is read), one step's folder under its `checkpoints/`, a
                file of weights (.ckpt, .pt, .pth, .safetensors), a folder with model.safetensors or model.ckpt, or
                hf://OWNER/NAME on the Hugging Face hub.
            use_ema: load the averaged (EMA) weights, if there are any, instead of the raw ones.
            precision: of every product between images and codes. "float32" gives the same codes on CPUs, TPUs and GPUs;
                "bfloat16_3x", "tf32" and "bfloat16" are faster on some of them and change some codes
                (docs/precision.md).
            parts: those to keep in memory, of "encoder", "codebook" and "decoder". Encoding needs the first two,
                decoding the last two.

        Raises:
            UsageError: `path` holds no tokenizer, and the message says what it holds instead; or there is no such
                precision or part.
        """
        return cls(*load_tokenizer(path, use_ema, precision, parts), parts)

    @classmethod
    def from_torch(
        cls,
        state_dict: Mapping[str, np.ndarray],
        config: Mapping,
        use_ema: bool = False,
        precision: str = "float32",
    ) -> "Tokenizer":
        """Builds a tokenizer from tensors under the names of the published checkpoints.

        Args:
            state_dict: {published name: array in PyTorch's layout}.
            config: the configuration as published, with "ddconfig", "n_embed" and "embed_dim".
            use_ema: take the averages stored under `model_ema.` instead of the raw weights.
            precision: as for `load`.

        Raises:
            UsageError: a tensor is missing, unknown or of the wrong shape (all of them are named); nothing is loaded.
        """
        model = TokenizerModel(**tokenizer_names.model_fields(config)).for_encoding(precision)
        params = tokenizer_names.tokenizer_from_torch(state_dict, config, use_ema)
        return cls(model, jax.tree.map(jnp.asarray, params))

    def to_torch(self) -> dict[str, np.ndarray]:
        """Returns the weights under their published names, in PyTorch's layouts.

        Raises UsageError for a quantizer other than IBQ's, for which no published names exist, or if parts are absent.
        """
        self._check_loaded(ALL, "to_torch")
        tokenizer_names.check_quantizer(self.model.quantizer)
        return tokenizer_names.tokenizer_to_torch(self.params)

    @property
    def codebook_size(self) -> int:
        """The number of codes, K."""
        return self.model.codebook_size

    @property
    def num_codes(self) -> int:
        """An earlier name of `codebook_size`."""
        return self.codebook_size

    def encode(self, images: np.ndarray | jax.Array) -> jax.Array:
        """Returns the codes int32 [B, h, w] of images [B, H, W, 3], either uint8 or float in [-1, 1].

        Raises UsageError for another shape or type, if H or W is not a multiple of the downsampling factor, or if the
        encoder or the codebook was not loaded.
        """
        self._check_loaded(DECIDING, "encode")
        images = jnp.asarray(images)
        if images.ndim != 4 or images.shape[-1] != 3:
            raise UsageError(f"encode takes images [B, H, W, 3], not an array of shape {images.shape}")
        if images.dtype != jnp.uint8 and not jnp.issubdtype(images.dtype, jnp.floating):
            raise UsageError(f"encode takes uint8 images, or floats in [-1, 1], not {images.dtype}")
        return _encode(self.model, self.params, images)

    def encode_image(
        self, image: Image.Image | str | os.PathLike, min_pixels: int = MIN_PIXELS, max_pixels: int = MAX_PIXELS
    ) -> jax.Array:
        """Returns the codes int32 [h, w] of an image of any size and aspect ratio.

        The image is resized bicubically to sides that are multiples of the downsampling factor, as Emu3.5's processor
        does for an area: its own, or the nearer one of the bounds. `decode(codes[None])` gives an image of that size.
        Each new size compiles a program of its own.

        Args:
            image: a Pillow image, or the path of a JPEG, PNG, WebP or BMP file. It is turned as its EXIF orientation
                says, transparent pixels become white, and of an animation the first frame is taken.
            min_pixels: the smallest area, up to half a factor a side.
            max_pixels: the largest area, likewise.

        Raises:
            UsageError: the image cannot be read, is over 100 times as long one way as the other, or has 32-bit pixels;
                or the bounds leave no image.
        """
        factor = self.model.downsampling
        pixels = resize_within(read_upright(image), factor, min_pixels, max_pixels)
        return self.encode(pixels[None])[0]

    def decode(self, codes: np.ndarray | jax.Array) -> jax.Array:
        """Returns the images float32 [B, H, W, 3] of codes int [B, h, w], any h and w.

        Values may slightly exceed [-1, 1]; clip them before display. Raises UsageError for another shape or type, a
        code outside 0..K-1, or if the codebook or the decoder was not loaded.
        """
        self._check_loaded(DECODING, "decode")
        codes = np.asarray(codes)
        if codes.ndim != 3 or not np.issubdtype(codes.dtype, np.integer):
            raise UsageError(f"decode takes integer codes [B, h, w], not {codes.dtype} of shape {codes.shape}")
        if codes.size and not 0 <= codes.min() <= codes.max() < self.codebook_size:
            raise UsageError(
                f"codes lie in 0..{self.codebook_size - 1}; these reach from {codes.min()} to {codes.max()}"
            )
        return _decode(self.model, self.params, jnp.asarray(codes, jnp.int32))

    def _check_loaded(self, needed: tuple[str, ...], method: str) -> None:
        """Raises UsageError if one of the `needed` parts was not loaded."""
        absent = [part for part in needed if part not in self.parts]
        if absent:
            raise UsageError(
                f"{method} needs the {' and the '.join(absent)}, which Tokenizer.load(parts={self.parts}) left out"
            )


@dataclass(frozen=True)
class Generator:
    """A trained generator: draws the codes of images of given classes.

    Attributes:
        model: the network (a Flax module without state).
        params: its weights, a nested dictionary of arrays.
        prefix: the prefix of the tensor names that `to_torch` gives.
    """

    model: GeneratorModel
    params: Mapping
    prefix: str = generator_names.PREFIX

    @classmethod
    def load(cls, path: str | Path, use_ema: bool = True) -> "Generator":
        """Loads a generator from a run, a checkpoint, a file or the hub; the arguments are those of `Tokenizer.load`.

        Raises UsageError if `path` holds no generator.
        """
        return cls(*load_generator(path, use_ema))

    @classmethod
    def from_torch(cls, state_dict: Mapping[str, np.ndarray], config: Mapping) -> "Generator":
        """Builds a generator from tensors under the names of the published checkpoints.

        Args:
            state_dict: {published name, with or without the prefix "transformer.": array in PyTorch's layout}.
            config: the configuration as published, with "vocab_size", "block_size", "n_layer", "n_head" and "n_embd".

        Raises:
            UsageError: a tensor is missing, unknown or of the wrong shape (all of them are named); nothing is loaded.
        """
        no_class = generator_names.has_no_class(state_dict, generator_names.model_fields(config)["num_classes"])
        model = generator_names.build(config, no_class)
        params = generator_names.generator_from_torch(state_dict, model)
        return cls(model, jax.tree.map(jnp.asarray, params), generator_names.name_prefix(state_dict))

    def to_torch(self) -> dict[str, np.ndarray]:
        """Returns the weights under their published names, in PyTorch's layouts."""
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
        """Returns the codes int32 [B, h, w] of new samples, one for each label, computed on one device.

        A sample depends only on its label, the settings, `seed` and its number, `first` + its position in `labels`. It
        is the same however many others are drawn in the same call.

        Args:
            labels: classes int [B], one per sample.
            cfg_scale: scale of classifier-free guidance; 1 turns it off, which halves the work.
            temperature: divisor of the guided logits; 0 takes the most likely code each time.
            top_k: draw from the `top_k` most likely codes only; 0 or None draws from all.
            top_p: draw from the smallest set of most likely codes that reaches this probability, in (0, 1].
            seed: seed of the draws, 0..2**32 - 1.
            cfg_schedule, cfg_power, cfg_interval: as in `ibq_jax.autoregressive.sample_codes.Guidance`.
            prefix: known codes at the beginning: the first P of each sample in row order [B, P], or whole rows
                [B, rows, w].
            first: number of the first sample.

        Raises:
            UsageError: a setting, a label or a code is out of range.
        """
        if prefix is not None and np.ndim(prefix) == 3:
            prefix = np.reshape(prefix, (len(prefix), -1))
        codes = self._sampler(
            labels,
            guidance=Guidance(cfg_scale, cfg_schedule, cfg_power, cfg_interval),
            logit_filter=LogitFilter(top_k or 0, top_p),
            temperature=temperature,
            seed=seed,
            sample_ids=first + np.arange(np.size(labels)),
            prefix=prefix,
        )
        return jnp.asarray(codes)

    def logits(self, codes: np.ndarray, labels: np.ndarray) -> jax.Array:
        """Returns the logits float32 [B, h w, vocabulary] of every code given its class and the codes before it.

        Args:
            codes: int [B, h, w] or [B, h w].
            labels: classes int [B]; num_classes stands for "no class".

        Raises:
            UsageError: another shape or type, or a value out of range.
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
