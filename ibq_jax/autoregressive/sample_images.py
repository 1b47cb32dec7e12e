"""From classes to pictures: a generator draws codes, its tokenizer decodes them, in rounds on all devices.

Shapes: N pictures, P codes of a given prefix, [H, W, 3] a picture.
"""

from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import Mesh

from ibq_jax.autoregressive.model import GeneratorModel
from ibq_jax.autoregressive.restore import TokenizerWeights
from ibq_jax.autoregressive.sample import Sampler, pad_batch
from ibq_jax.base.sharding import batch_sharding, replicated, to_host
from ibq_jax.data.preprocess import to_float, to_uint8


class ImageSampler:
    """Draws pictures on the devices of `mesh`; `settings` are those of `Sampler.__call__`, the same for all pictures.

    A picture is the same to the last bit however many are drawn with it, as its codes are.
    """

    def __init__(
        self,
        model: GeneratorModel,
        params: Mapping,
        tokenizer: TokenizerWeights,
        mesh: Mesh,
        settings: Mapping,
        per_device_batch: int = 0,
    ):
        self._sampler, self._settings = Sampler(model, params, mesh, per_device_batch), settings
        self._mesh, (tokenizer_model, weights) = mesh, tokenizer
        self._tokenizer = tokenizer_model.clone(mesh=None)
        self._weights = jax.device_put(jax.device_get(weights), replicated(mesh))

        def decode(weights, codes):
            return to_uint8(self._tokenizer.apply({"params": weights}, codes, method="decode"))

        def encode(weights, images):
            return self._tokenizer.apply({"params": weights}, to_float(images), method="encode")

        self._decode, self._encode = jax.jit(decode, out_shardings=batch_sharding(mesh)), jax.jit(encode)

    def __call__(self, labels: np.ndarray, sample_ids: np.ndarray | None = None, prefix: np.ndarray | None = None):
        """Labels [N], the pictures' sample_ids [N] and first codes [N, P] -> uint8 [N, H, W, 3].

        Raises UsageError for what is out of range.
        """
        codes = self._sampler(labels, sample_ids=sample_ids, prefix=prefix, **self._settings)
        size = self._sampler.round_size
        rounds = [codes[start : start + size] for start in range(0, len(codes), size)]
        pictures = [to_host(self._decode(self._weights, pad_batch(part, size, self._mesh))) for part in rounds]
        return np.concatenate(pictures)[: len(codes)]

    def codes_of(self, image: np.ndarray) -> np.ndarray:
        """uint8 [H, W, 3] -> its codes int32 [h, w]."""
        return np.asarray(self._encode(self._weights, image[None]))[0]
