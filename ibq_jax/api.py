"""The public classes: a trained tokenizer in five lines.

from ibq_jax import Tokenizer
tokenizer = Tokenizer.load("runs/tok")
codes = tokenizer.encode(images)        # uint8 [B, H, W, 3] -> int32 [B, h, w]
images = tokenizer.decode(codes)        # float [-1, 1] [B, H, W, 3]
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from ibq_jax.base.errors import UsageError
from ibq_jax.interop import names
from ibq_jax.tokenizer.model import TokenizerModel
from ibq_jax.tokenizer.run import restore_run
from ibq_jax.tokenizer.train import to_float


@dataclass(frozen=True)
class Tokenizer:
    """Images to codes and back, with fixed weights. `params` is the generator's tree of arrays."""

    model: TokenizerModel
    params: Mapping

    @classmethod
    def load(cls, path: str | Path, use_ema: bool = True) -> "Tokenizer":
        """From a run's folder (its newest whole checkpoint) or one step's folder under its `checkpoints/`.

        Averaged weights, unless `use_ema` is False. Raises UsageError when there is none.
        """
        trainer, restored = restore_run(Path(path))
        return cls(trainer.model, restored.state.ema if use_ema else restored.state.params)

    @classmethod
    def from_torch(cls, state_dict: Mapping[str, np.ndarray], config: Mapping, use_ema: bool = False) -> "Tokenizer":
        """From tensors under the names of the published checkpoints, with a configuration as they have it.

        `config` needs "ddconfig", "n_embed" and "embed_dim". Strict: raises UsageError naming what is missing, unknown
        or misshapen, and loads nothing then.
        """
        params = names.tokenizer_from_torch(state_dict, config, use_ema)
        return cls(TokenizerModel(**names.model_fields(config)), jax.tree.map(jnp.asarray, params))

    def to_torch(self) -> dict[str, np.ndarray]:
        """The weights under their published names, in PyTorch's layouts."""
        return names.tokenizer_to_torch(self.params)

    @property
    def num_codes(self) -> int:
        return self.model.num_codes

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
        if codes.size and not 0 <= codes.min() <= codes.max() < self.num_codes:
            raise UsageError(f"codes lie in 0..{self.num_codes - 1}; these reach from {codes.min()} to {codes.max()}")
        return _decode(self.model, self.params, jnp.asarray(codes, jnp.int32))


@partial(jax.jit, static_argnums=0)
def _encode(model: TokenizerModel, params: Mapping, images: jax.Array) -> jax.Array:
    return model.apply({"params": params}, to_float(images), method="encode")


@partial(jax.jit, static_argnums=0)
def _decode(model: TokenizerModel, params: Mapping, codes: jax.Array) -> jax.Array:
    return model.apply({"params": params}, codes, method="decode")
