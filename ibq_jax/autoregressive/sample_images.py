"""Draws samples, that is images: a generator draws their codes (`sample_codes.py`), and its tokenizer decodes them.

Shapes: N samples [H, W, 3], P codes of a given prefix.
"""

import functools
from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import Mesh

from ibq_jax.autoregressive.model import GeneratorModel
from ibq_jax.autoregressive.restore import TokenizerWeights
from ibq_jax.autoregressive.sample_codes import Sampler, pad_batch
from ibq_jax.base.sharding import batch_sharding, replicated, to_host
from ibq_jax.data.preprocess import to_float, to_uint8
from ibq_jax.tokenizer.model import TokenizerModel


class ImageSampler:
    """Draws images on the devices of `mesh`.

    An image is the same bit for bit however many are drawn with it, as its codes are.

    Args:
        model: the generator.
        params: its parameters.
        tokenizer: the tokenizer of its codes.
        mesh: the devices.
        settings: arguments of `Sampler.__call__` that all samples share.
        per_device_batch: as in `Sampler`.
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
        self._decode = jax.jit(_decode, static_argnums=0, out_shardings=batch_sharding(mesh))

    def __call__(self, labels: np.ndarray, sample_ids: np.ndarray | None = None, prefix: np.ndarray | None = None):
        """Labels [N], sample_ids [N] and the first codes of every sample [N, P] -> images uint8 [N, H, W, 3].

        Raises UsageError if one is out of range.
        """
        codes = self._sampler(labels, sample_ids=sample_ids, prefix=prefix, **self._settings)
        size = self._sampler.batch_size
        batches = [codes[start : start + size] for start in range(0, len(codes), size)]
        images = [
            to_host(self._decode(self._tokenizer, self._weights, pad_batch(batch, size, self._mesh)))
            for batch in batches
        ]
        return np.concatenate(images)[: len(codes)]

    def encode(self, image: np.ndarray) -> np.ndarray:
        """An image uint8 [H, W, 3] -> its codes int32 [h, w]."""
        return np.asarray(_encode(self._tokenizer, self._weights, image[None]))[0]


def _decode(tokenizer: TokenizerModel, weights: Mapping, codes: jax.Array) -> jax.Array:
    return to_uint8(tokenizer.apply({"params": weights}, codes, method="decode"))


@functools.partial(jax.jit, static_argnums=0)
def _encode(tokenizer: TokenizerModel, weights: Mapping, images: jax.Array) -> jax.Array:
    return tokenizer.apply({"params": weights}, to_float(images), method="encode")
