"""Spectral normalisation (arXiv 1802.05957): kernels divided by their largest singular value.

Shapes: kernels [h, w, C, O], as matrices [O, h * w * C]; for each a left singular vector [O], found by power iteration.
"""

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from ibq_jax.base.precision import FULL

EPSILON = 1e-12


def initial_vectors(key: jax.Array, params: dict) -> dict:
    """Returns random unit vectors [O] for all kernels of `params`, as a tree with the same names."""
    flat = flatten_dict(params)
    kernels = [path for path in flat if path[-1] == "kernel"]
    keys = dict(zip(kernels, jax.random.split(key, len(kernels)), strict=True))
    return unflatten_dict({path: _unit(jax.random.normal(keys[path], flat[path].shape[-1:])) for path in kernels})


def normalise(params: dict, vectors: dict) -> tuple[dict, dict]:
    """Divides all kernels by an estimate of their largest singular value, after one step of power iteration.

    No gradient flows through the vectors.

    Args:
        params: parameters, kernels and others.
        vectors: from `initial_vectors` or the last call.

    Returns:
        (parameters in their own types, the vectors after the step).
    """
    flat, vectors = flatten_dict(params), flatten_dict(vectors)
    for path, vector in vectors.items():
        kernel = flat[path].astype(jnp.float32)
        matrix = kernel.reshape(-1, kernel.shape[-1]).T
        fixed = jax.lax.stop_gradient(matrix)
        right = _unit(jnp.dot(fixed.T, vector, precision=FULL))
        vectors[path] = left = _unit(jnp.dot(fixed, right, precision=FULL))
        largest = jnp.dot(left, jnp.dot(matrix, right, precision=FULL), precision=FULL)
        flat[path] = (kernel / largest).astype(flat[path].dtype)
    return unflatten_dict(flat), unflatten_dict(vectors)


def _unit(vector: jax.Array) -> jax.Array:
    return vector / jnp.maximum(jnp.sqrt(jnp.sum(vector**2)), EPSILON)
