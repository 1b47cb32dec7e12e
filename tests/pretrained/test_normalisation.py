"""Normalisations of frozen networks, against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ibq_jax.pretrained import normalisation
from ibq_jax.pretrained.normalisation import unit_channels, weighted_channels

SHAPE = (2, 3, 5, 16)


@pytest.fixture
def features():
    found = np.random.default_rng(0).standard_normal(SHAPE)
    found[0, 1, 2] = 0.0  # a position where a network sees nothing
    return found


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 3e-7), ("bfloat16", 8e-3)])
def test_unit_channels_and_their_gradient(features, dtype, tolerance):
    x = jnp.asarray(features, dtype)
    exact, gradient = np.asarray(x, np.float64), np.random.default_rng(1).standard_normal(SHAPE)
    length = np.linalg.norm(exact, axis=-1, keepdims=True)
    unit = np.divide(exact, length, out=np.zeros(SHAPE), where=length > 0)
    across = gradient - unit * np.sum(unit * gradient, axis=-1, keepdims=True)
    wanted = np.divide(across, length, out=np.zeros(SHAPE), where=length > 0)
    found, pull_back = jax.vjp(unit_channels, x)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, unit, atol=tolerance)
    [pulled] = pull_back(jnp.asarray(gradient, jnp.float32))
    assert pulled.dtype == x.dtype
    np.testing.assert_allclose(np.asarray(pulled, np.float64), wanted, atol=tolerance * np.abs(wanted).max())


@pytest.mark.parametrize("form", ["weighted_channels", "_by_product", "_by_convolution"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_channels_are_summed_in_float32(features, form, dtype):
    x, weights = jnp.asarray(features, dtype), jnp.linspace(0.25, 4.0, 16, dtype=dtype)
    found = getattr(normalisation, form)(x, weights)
    assert found.dtype == jnp.float32
    wanted = np.asarray(x, np.float64) @ np.asarray(weights, np.float64)
    np.testing.assert_allclose(found, wanted, atol=1e-6 * np.abs(wanted).max())


def test_the_gradient_of_a_weighted_sum(features):
    x, weights = jnp.asarray(features, jnp.float32), jnp.linspace(0.25, 4.0, 16)
    gradient = jnp.asarray(np.random.default_rng(1).standard_normal(SHAPE[:3]), jnp.float32)
    [found] = jax.vjp(lambda x: weighted_channels(x, weights), x)[1](gradient)
    np.testing.assert_array_equal(found, gradient[..., None] * weights.reshape(1, 1, 1, -1))
