"""Group normalisation with SiLU, against NumPy in float64 and JAX's gradient of its formula."""

from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ibq_jax.base.sharding import batch_sharding, make_mesh
from ibq_jax.ops import group_norm as module
from ibq_jax.ops.group_norm import GroupNormForm, group_norm
from ibq_jax.ops.pixel_sums import add_bias, batch_sum_by_product, image_sums, sums_by_products

GROUPS, EPSILON = 4, 1e-6


def inputs(offset: float = 0.5) -> tuple[np.ndarray, ...]:
    random = np.random.default_rng(0)
    x = random.normal(size=(8, 6, 5, 12)) + offset
    return x, random.normal(size=12), random.normal(size=12), random.normal(size=x.shape)


def formula(x, scale, bias, silu: bool):
    """The definition, which `jax.vjp` can differentiate."""
    grouped = x.reshape(*x.shape[:3], GROUPS, -1)
    mean, variance = (f(grouped, (1, 2, 4), keepdims=True) for f in (jnp.mean, jnp.var))
    z = ((grouped - mean) / jnp.sqrt(variance + EPSILON)).reshape(x.shape) * scale.reshape(1, 1, 1, -1)
    z += bias.reshape(1, 1, 1, -1)
    return z * jax.nn.sigmoid(z) if silu else z


@pytest.fixture
def as_on(monkeypatch):
    """Lets the form for a platform be traced on this machine; "default" is the CPU's."""

    def trace_anew() -> None:
        """Lets no trace of one platform serve another."""
        for function in (module._forward, module._backward):
            function.clear_cache()

    def as_on(platform: str) -> None:
        def chosen(*arguments, default, **others):
            return others.get(platform, default)(*arguments)

        monkeypatch.setattr(module.lax, "platform_dependent", chosen)

    trace_anew()
    yield as_on
    trace_anew()


@pytest.mark.parametrize("platform", ["default", "cuda"])
@pytest.mark.parametrize("silu", [True, False])
def test_values_and_gradients_are_the_formulas_in_float64(silu, platform, as_on):
    as_on(platform)
    *arguments, dy = inputs()
    with jax.enable_x64(True):
        expected, plain = jax.vjp(lambda *arguments: formula(*arguments, silu), *arguments)
        expected_gradients = plain(jnp.asarray(dy))
    arguments = [np.float32(array) for array in arguments]
    form = GroupNormForm(GROUPS, EPSILON, silu)
    value, pull_back = jax.vjp(lambda *arguments: group_norm(*arguments, form), *arguments)
    gradients = pull_back(jnp.float32(dy))
    np.testing.assert_allclose(value, expected, rtol=0, atol=2e-6)
    for gradient, reference in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(gradient, reference, rtol=0, atol=3e-6 * np.abs(reference).max())


def test_flat_images_far_from_zero_are_normalised_to_the_bias():
    """A variance of mean squares would be rounding error times the mean squared."""
    x = jnp.full((2, 32, 32, 8), 1000.0)
    for dtype in (jnp.float32, jnp.bfloat16):
        y = group_norm(x.astype(dtype), jnp.ones(8), jnp.zeros(8), GroupNormForm(GROUPS, EPSILON, False))
        np.testing.assert_array_equal(y, 0.0)


@pytest.mark.parametrize(
    ("platform", "silu", "offset"), [*product(["tpu"], [True, False], [0.5, 30.0]), ("cuda", True, 30.0)]
)
def test_in_bfloat16_gradients_lose_no_more_than_their_types_digits(platform, silu, offset, as_on):
    as_on(platform)
    x, scale, bias, dy = inputs(offset)
    x, dy = (np.float64(jnp.asarray(array, jnp.bfloat16)) for array in (x, dy))
    with jax.enable_x64(True):
        expected, plain = jax.vjp(lambda *arguments: formula(*arguments, silu), x, scale, bias)
        expected_gradients = plain(jnp.asarray(dy))
    form = GroupNormForm(GROUPS, EPSILON, silu)
    narrow = (jnp.asarray(x, jnp.bfloat16), np.float32(scale), np.float32(bias))
    value, pull_back = jax.vjp(lambda *arguments: group_norm(*arguments, form), *narrow)
    digits = 2.0**-8  # half a unit in the last of bfloat16's places, relative to the largest
    np.testing.assert_allclose(np.float64(value), expected, rtol=0, atol=digits * np.abs(expected).max())
    for gradient, reference in zip(pull_back(jnp.asarray(dy, jnp.bfloat16)), expected_gradients, strict=True):
        np.testing.assert_allclose(np.float64(gradient), reference, rtol=0, atol=digits * np.abs(reference).max())


def test_sums_by_products_are_those_of_each_image_on_any_mesh():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(16, 4, 6, 5)), jnp.bfloat16)
    expected = np.asarray(x, np.float64).sum((1, 2))
    np.testing.assert_allclose(image_sums(x, None), expected, atol=1e-5)
    for mesh in (None, make_mesh({"data": 4, "codebook": 2})):
        placed = x if mesh is None else jax.device_put(x, batch_sharding(mesh))
        found = jax.jit(sums_by_products, static_argnums=1)(placed, mesh)
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(sums_by_products(x[:3], make_mesh({"data": 8})), expected[:3], atol=1e-5)
    np.testing.assert_allclose(batch_sum_by_product(x), expected.sum(0), atol=3e-5)


def test_a_bias_has_the_gradient_of_a_sum():
    random = np.random.default_rng(0)
    x, bias, dy = (np.float32(random.normal(size=shape)) for shape in ((4, 5, 6, 7), (7,), (4, 5, 6, 7)))
    for dtype, tolerance in ((jnp.float32, 1e-5), (jnp.bfloat16, 0.1)):
        value, pull_back = jax.vjp(add_bias, jnp.asarray(x, dtype), bias)
        dx, dbias = pull_back(jnp.asarray(dy, dtype))
        assert value.dtype == dx.dtype == dtype and dbias.dtype == jnp.float32
        np.testing.assert_allclose(np.float32(value), x + bias.reshape(1, 1, 1, 7), atol=tolerance / 2)
        np.testing.assert_allclose(dbias, dy.sum((0, 1, 2)), atol=tolerance)
