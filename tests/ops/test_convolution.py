"""Convolutions against XLA's own, and their gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ibq_jax.base.sharding import make_mesh
from ibq_jax.ops import convolution as module
from ibq_jax.ops.convolution import LEAST_CHANNELS, convolve, convolve_doubled, kernel_gradient, plain_convolution

FULL = jax.lax.Precision.HIGHEST
FORMS = [  # kernel size, stride, padding
    (3, 1, ((1, 1), (1, 1))),
    (3, 2, ((0, 1), (0, 1))),
    (1, 1, ((0, 0), (0, 0))),
    (4, 2, ((1, 1), (1, 1))),
    (4, 1, ((1, 1), (2, 0))),
]


def inputs(size: int, form: tuple, dtype=np.float32) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    x = random.normal(size=(3, 10, 13, 6)).astype(dtype)
    kernel = random.normal(size=(size, size, 6, 5)).astype(dtype)
    dy = random.normal(size=jax.eval_shape(lambda: plain_convolution(x, kernel, *form)).shape).astype(dtype)
    return x, kernel, dy


@pytest.fixture
def traced_anew():
    """Lets no trace made with other constants of the module serve a test, nor the test's own a later one."""
    module._backward.clear_cache()
    yield
    module._backward.clear_cache()


@pytest.mark.usefixtures("traced_anew")
@pytest.mark.parametrize("pixels_at_once", [None, 2000, 80])  # None: XLA's own gradient
@pytest.mark.parametrize(("size", "stride", "padding"), FORMS)
def test_values_and_gradients_are_those_of_xla(size, stride, padding, pixels_at_once, monkeypatch):
    if pixels_at_once:
        monkeypatch.setattr(module, "LEAST_CHANNELS", 1)
        monkeypatch.setattr(module, "PIXELS_AT_ONCE", pixels_at_once)
    form = (stride, padding, FULL)
    x, kernel, dy = inputs(size, form)
    expected, plain = jax.vjp(lambda x, kernel: plain_convolution(x, kernel, *form), x, kernel)
    value, pull_back = jax.vjp(lambda x, kernel: convolve(x, kernel, *form), x, kernel)
    np.testing.assert_array_equal(value, expected)
    for gradient, of_plain in zip(pull_back(dy), plain(dy), strict=True):
        np.testing.assert_allclose(gradient, of_plain, rtol=0, atol=1e-6 * np.abs(of_plain).max())


@pytest.mark.parametrize("in_blocks", [False, True])
@pytest.mark.parametrize(("size", "stride", "padding"), FORMS)
def test_a_kernel_gradient_is_its_definition(size, stride, padding, in_blocks):
    x, kernel, dy = inputs(size, (stride, padding, FULL), np.float64)
    padded = np.pad(x, ((0, 0), *padding, (0, 0)))
    expected = np.zeros_like(kernel)
    for row in range(dy.shape[1]):
        for column in range(dy.shape[2]):
            window = padded[:, row * stride : row * stride + size, column * stride : column * stride + size]
            expected += np.einsum("bijc,bo->ijco", window, dy[:, row, column])
    x, dy = np.float32(x), np.float32(dy)
    rows = dy.shape[1] // min(n for n in range(2, 10) if dy.shape[1] % n == 0) if in_blocks else dy.shape[1]
    np.testing.assert_allclose(
        kernel_gradient(x, dy, (size, size), stride, padding, FULL, rows),
        expected,
        rtol=0,
        atol=1e-6 * np.abs(expected).max(),
    )


def test_several_devices_add_up_their_gradients_once():
    """One device takes the images in a loop; with several, a loop would communicate in every turn."""
    x, kernel = jnp.zeros((8, 32, 32, LEAST_CHANNELS)), jnp.zeros((3, 3, LEAST_CHANNELS, LEAST_CHANNELS))

    def loops(devices: int) -> int:
        mesh = make_mesh({"data": devices}, jax.devices()[:devices])
        form = (1, ((1, 1), (1, 1)), FULL, mesh)
        gradient = jax.jit(jax.grad(lambda kernel: convolve(x, kernel, *form).sum()))
        return gradient.trace(kernel).lower().as_text().count("stablehlo.while")

    assert (loops(1), loops(8)) == (1, 0)


def test_a_convolution_of_doubled_images_is_that_of_repeated_pixels():
    """In the form of TPUs, with zeros between pixels, and in that of all others."""
    random = np.random.default_rng(0)
    x, kernel = (np.float32(random.normal(size=shape)) for shape in ((2, 5, 7, 6), (3, 3, 6, 4)))
    dy = np.float32(random.normal(size=(2, 10, 14, 4)))

    def plain(x, kernel):
        return plain_convolution(x.repeat(2, axis=1).repeat(2, axis=2), kernel, 1, ((1, 1), (1, 1)), FULL)

    expected = jax.vjp(plain, x, kernel)
    value, pull_back = jax.vjp(lambda x, kernel: convolve_doubled(x, kernel, FULL), x, kernel)
    on_tpus = module._spread(x, kernel, FULL), module._spread_backward(x, kernel, dy, FULL)
    for found, gradients in ((value, pull_back(dy)), on_tpus):
        np.testing.assert_allclose(found, expected[0], rtol=0, atol=1e-6 * np.abs(expected[0]).max())
        for gradient, of_plain in zip(gradients, expected[1](dy), strict=True):
            np.testing.assert_allclose(gradient, of_plain, rtol=0, atol=1e-6 * np.abs(of_plain).max())


def test_only_cpus_are_given_products():
    """XLA's own gradient is what TPUs and GPUs run, instruction for instruction."""
    form = (1, ((1, 1), (1, 1)), FULL)

    def text(function, platform: str, channels: int = LEAST_CHANNELS) -> str:
        x, kernel = jnp.zeros((2, 8, 8, channels)), jnp.zeros((3, 3, channels, channels))
        gradient = jax.jit(jax.grad(lambda x, kernel: function(x, kernel, *form).sum(), argnums=(0, 1)))
        return gradient.trace(x, kernel).lower(lowering_platforms=(platform,)).as_text()

    for platform in ("tpu", "cuda"):
        ours, plain = text(convolve, platform), text(plain_convolution, platform)
        assert ours.count("stablehlo.convolution") == plain.count("stablehlo.convolution")
        assert "dot_general" not in ours
    assert text(convolve, "cpu").count("stablehlo.dot_general") == 9
    assert "dot_general" not in text(convolve, "cpu", channels=64)
