"""The generator's layers against plain formulas and published sizes."""

import json
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from support import released

from ibq_jax.autoregressive.layers import RMSNorm, cudnn_applies, hidden_channels, rotary_angles, rotate

PUBLISHED = json.loads((released.GOLDEN / "published_generators.json").read_text())


@pytest.mark.parametrize(
    ("device", "dtype", "channels", "applies"),
    [
        ({"platform": "gpu", "compute_capability": "9.0"}, "bfloat16", 64, True),
        ({"platform": "gpu", "compute_capability": "10.0"}, "bfloat16", 128, True),
        ({"platform": "gpu", "compute_capability": "8.6"}, "bfloat16", 8, True),
        ({"platform": "gpu", "compute_capability": "7.5"}, "bfloat16", 64, False),
        ({"platform": "gpu", "compute_capability": "gfx942"}, "bfloat16", 64, False),
        ({"platform": "gpu", "compute_capability": "9.0"}, "float32", 64, False),
        ({"platform": "gpu", "compute_capability": "9.0"}, "bfloat16", 12, False),
        ({"platform": "gpu", "compute_capability": "9.0"}, "bfloat16", 136, False),
        ({"platform": "tpu"}, "bfloat16", 64, False),
        ({"platform": "cpu"}, "bfloat16", 64, False),
    ],
)
def test_cudnns_attention_is_for_some_gpus_types_and_channels(device, dtype, channels, applies):
    assert cudnn_applies(SimpleNamespace(**device), dtype, channels) is applies


@pytest.mark.parametrize(("grid", "channels"), [((4, 4), 16), ((2, 8), 8), ((16, 16), 64), ((3, 1), 4)])
def test_rotary_tables(grid, channels):
    cos, sin = rotary_angles(grid, channels)
    angles = np.zeros((grid[0] * grid[1], channels // 2))
    for row in range(grid[0]):
        for column in range(grid[1]):
            for pair in range(channels // 4):
                frequency = 10000 ** (-2 * pair / (channels // 2))
                angles[row * grid[1] + column, pair] = row * frequency
                angles[row * grid[1] + column, channels // 4 + pair] = column * frequency
    assert cos.shape == sin.shape == (1 + len(angles), channels // 2)
    assert not cos[0].any() and not sin[0].any()
    np.testing.assert_allclose(cos[1:], np.cos(angles), rtol=0, atol=2e-6)  # angles up to 15, rounded to 24 bits
    np.testing.assert_allclose(sin[1:], np.sin(angles), rtol=0, atol=2e-6)


def test_rotation_pairs_neighbouring_channels():
    x, angle = np.random.default_rng(0).normal(size=(5, 8)), np.random.default_rng(1).normal(size=(5, 4))
    rotated = (x[:, ::2] + 1j * x[:, 1::2]) * np.exp(1j * angle)
    expected = np.stack((rotated.real, rotated.imag), axis=-1).reshape(5, 8)
    actual = rotate(jnp.asarray(x), jnp.asarray(np.cos(angle)), jnp.asarray(np.sin(angle)))
    released.assert_close(actual, expected, 1e-6)


def test_norm():
    x, scale = np.random.default_rng(0).normal(size=(5, 8)), np.arange(8.0)
    expected = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-5) * scale
    released.assert_close(RMSNorm().apply({"params": {"scale": scale}}, jnp.asarray(x, jnp.float32)), expected, 1e-6)


@pytest.mark.parametrize(("size", "channels"), [("B", 2816), ("L", 3584), ("XL", 4096), ("XXL", 5120)])
def test_hidden_channels_are_the_published_ones(size, channels):
    published = PUBLISHED[f"IBQ-AR-{size}"]
    assert published["tensors"]["transformer.blocks.{}.feed_forward.w1.weight"][0] == channels
    assert hidden_channels(published["config"]["n_embd"]) == channels
