"""Residual blocks in bands of rows: the plain block's values and gradients, in less memory, on CPUs only."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.made_up_weights import made_up_params

from ibq_jax.ops import row_bands
from ibq_jax.tokenizer import autoencoder
from ibq_jax.tokenizer.autoencoder import Computing, Conv, Encoder, ResidualBlock


@pytest.fixture(autouse=True)
def small_bands(monkeypatch):
    """All images count as large; a band has 256 pixels."""
    monkeypatch.setattr(autoencoder, "MOST_PIXELS", 0)
    monkeypatch.setattr(row_bands, "PIXELS_AT_ONCE", 256)


def block_and_params(channels: int, features: int, dtype=jnp.float32):
    block = ResidualBlock(features, Computing(dtype))
    shapes = jax.eval_shape(block.init, jax.random.key(0), jnp.zeros((1, 4, 4, channels)))
    return block, made_up_params(nn.meta.unbox(shapes), np.random.default_rng(0))


def on_whole_images(block: ResidualBlock) -> ResidualBlock:
    return block.clone(may_band=False)


@pytest.mark.parametrize(
    ("shape", "features"),
    [((2, 32, 16, 32), 32), ((1, 37, 24, 32), 64), ((1, 2, 300, 32), 32), ((1, 3, 5, 64), 32), ((1, 1, 400, 32), 32)],
)
def test_bands_give_the_plain_blocks_values(shape, features):
    """Even bands, a shorter last one, one row each, with a shortcut, one row alone; 2e-7 of the largest was seen."""
    block, params = block_and_params(shape[-1], features)
    x = jax.random.normal(jax.random.key(1), shape)
    expected = jax.jit(on_whole_images(block).apply)(params, x)
    found = jax.jit(block.apply)(params, x)
    assert found.dtype == expected.dtype
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


def test_bands_of_bfloat16_are_the_plain_blocks():
    block, params = block_and_params(32, 64, jnp.bfloat16)
    x = jax.random.normal(jax.random.key(1), (1, 37, 24, 32), jnp.bfloat16)
    expected = np.asarray(jax.jit(on_whole_images(block).apply)(params, x), np.float32)
    found = np.asarray(jax.jit(block.apply)(params, x), np.float32)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2**-7 * np.abs(expected).max())


@pytest.mark.parametrize("remat", ["none", "blocks"])
def test_the_gradient_is_the_plain_blocks(remat, monkeypatch):
    layout = dict(channels=32, channel_multipliers=(1,), num_res_blocks=1, attention_resolutions=(), z_channels=8)
    encoder = Encoder(**layout, resolution=32, remat=remat)
    x = jax.random.normal(jax.random.key(1), (1, 24, 16, 3))
    params = made_up_params(nn.meta.unbox(jax.eval_shape(encoder.init, jax.random.key(0), x)), np.random.default_rng(0))

    def gradients(most_pixels):
        monkeypatch.setattr(autoencoder, "MOST_PIXELS", most_pixels)
        return jax.jit(jax.grad(lambda params: jnp.sum(encoder.apply(params, x) ** 2)))(params)

    found, expected = gradients(0), gradients(10**9)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * largest), found, expected)


def test_the_memory_is_that_of_two_images_instead_of_three(monkeypatch):
    side, channels = 256, 64
    monkeypatch.setattr(row_bands, "PIXELS_AT_ONCE", 1024)
    blocks = [ResidualBlock(channels, Computing()) for _ in range(2)]
    network = nn.Sequential([Conv(channels), *blocks, Conv(3, stride=2)])
    images = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    params = nn.meta.unbox(jax.eval_shape(network.init, jax.random.key(0), images))

    def held(most_pixels) -> float:
        monkeypatch.setattr(autoencoder, "MOST_PIXELS", most_pixels)
        compiled = jax.jit(network.apply).lower(params, images).compile()
        return compiled.memory_analysis().temp_size_in_bytes / (side * side * channels * 4)

    assert held(side * side) > 2.9 and held(0) < 2.2


def test_other_machines_and_images_up_to_1024_pixels_have_the_plain_program(monkeypatch):
    block, params = block_and_params(32, 32)

    def lowered(side: int, platform: str) -> str:
        x = jax.ShapeDtypeStruct((1, side, side, 32), jnp.float32)
        return jax.jit(block.apply).trace(params, x).lower(lowering_platforms=(platform,)).as_text()

    monkeypatch.undo()
    assert "while" not in lowered(1024, "cpu") and "while" in lowered(1025, "cpu")
    assert "while" not in lowered(2048, "tpu") and "while" not in lowered(2048, "cuda")
