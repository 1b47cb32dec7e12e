"""Small generators with random weights, and the logits that their samples must follow."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from ibq_jax import Generator
from ibq_jax.autoregressive.generate import LogitFilter
from ibq_jax.autoregressive.model import GeneratorModel
from ibq_jax.autoregressive.sample_codes import Guidance, Sampler
from ibq_jax.base.sharding import make_mesh
from ibq_jax.interop.generator_names import abstract_params

SMALL = dict(
    vocab_size=64, grid=(4, 4), num_classes=5, num_layers=2, num_heads=2, num_kv_heads=2, embed_dim=32, gamma_init=1e-3
)
LARGE = SMALL | dict(vocab_size=1024, num_heads=4, num_kv_heads=2, embed_dim=128)


@functools.cache
def generator(**changes) -> Generator:
    """Returns a generator whose random weights make every layer, gate and code count, which initial ones do not."""
    model = GeneratorModel(**SMALL | changes)
    random = np.random.default_rng(0)

    def weight(path, leaf):
        kind = path[-1].key
        fan_in = leaf.shape[{"kernel": -2, "head": -1}[kind]] if kind in ("kernel", "head") else 1
        return jnp.asarray(random.normal(size=leaf.shape) / math.sqrt(fan_in), jnp.float32)

    return Generator(model, jax.tree_util.tree_map_with_path(weight, abstract_params(model)))


@functools.cache
def sampler(devices: int, **changes) -> Sampler:
    drawn = generator(**changes)
    return Sampler(drawn.model, drawn.params, make_mesh({"data": devices}, jax.devices()[:devices]))


def draw(devices: int, labels, seed: int = 0, **changes) -> np.ndarray:
    settings = dict(guidance=Guidance(1.5), logit_filter=LogitFilter(), temperature=1.0, seed=seed)
    return sampler(devices, **changes)(np.asarray(labels), **settings)


def guided_logits(drawn: Generator, codes, labels, scale: float) -> np.ndarray:
    with_class = np.asarray(drawn.logits(codes, labels))
    without = np.asarray(drawn.logits(codes, np.full_like(labels, drawn.model.num_classes)))
    return without + (with_class - without) * np.float32(scale)


def softmax(x: np.ndarray) -> np.ndarray:
    p = np.exp(np.asarray(x, np.float64) - np.max(x, axis=-1, keepdims=True))
    return p / p.sum(axis=-1, keepdims=True)
