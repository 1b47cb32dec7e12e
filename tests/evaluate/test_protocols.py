"""Protocols: how each converts images before they are measured."""

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from ibq_jax.base.errors import UsageError
from ibq_jax.evaluate.protocols import PROTOCOLS, find_protocol, for_inception
from ibq_jax.pretrained.inception import SIDE

IMAGES = np.random.default_rng(0).integers(0, 256, (2, 24, 36, 3), np.uint8)


def test_the_released_evaluation_truncates_originals_too():
    """In float32, on the way back from [-1, 1]; NumPy rounds as PyTorch does there."""
    levels = np.arange(256, dtype=np.uint8)
    floats = (levels / 127.5 - 1.0).astype(np.float32)
    expected = ((floats + 1) / 2 * 255.0).astype(np.uint8)
    truncated, _ = PROTOCOLS["seed_voken"].to_grey_levels(jnp.asarray(levels), jnp.asarray(floats))
    np.testing.assert_array_equal(truncated, expected)
    lost = levels[np.asarray(truncated) != levels]
    assert len(lost) and (np.asarray(truncated)[lost] == lost - 1).all()
    kept, _ = PROTOCOLS["clean"].to_grey_levels(jnp.asarray(levels), jnp.asarray(floats))
    np.testing.assert_array_equal(kept, levels)


def test_reconstructions_lose_their_fractions_or_are_rounded():
    reconstruction = jnp.asarray([-1.5, -1 + 1.6 / 127.5, 0.999, 2.0])
    originals = jnp.zeros(4, jnp.uint8)
    assert PROTOCOLS["seed_voken"].to_grey_levels(originals, reconstruction)[1].tolist() == [0, 1, 254, 255]
    assert PROTOCOLS["clean"].to_grey_levels(originals, reconstruction)[1].tolist() == [0, 2, 255, 255]


def test_bicubic_measures_reconstructions_without_rounding():
    """As GEAR: floats in [0, 1], clipped; here in grey levels."""
    reconstruction, originals = jnp.asarray([-1.5, -1 + 1.6 / 127.5, 2.0]), jnp.asarray([0, 7, 255], jnp.uint8)
    kept, levels = PROTOCOLS["bicubic"].to_grey_levels(originals, reconstruction)
    np.testing.assert_array_equal(kept, originals)
    np.testing.assert_allclose(levels, [0, 1.6, 255], atol=1e-5)


def test_llamagen_rounds_to_the_nearest_level():
    """It adds 128 to 127.5 x and truncates: that is nearest, except for exact halves, and leaves originals alone."""
    x = np.random.default_rng(0).uniform(-1.1, 1.1, 1000).astype(np.float32)
    theirs = np.clip(127.5 * x + 128, 0, 255).astype(np.uint8)
    np.testing.assert_array_equal(PROTOCOLS["llamagen"].to_grey_levels(x, jnp.asarray(x))[1], theirs)
    levels = np.arange(256)
    originals = np.clip(127.5 * (levels / 255 - 0.5) / 0.5 + 128, 0, 255).astype(np.uint8)
    np.testing.assert_array_equal(originals, levels)


def test_nets_get_floats_or_what_a_file_would_hold():
    reconstruction = jnp.asarray([-1.5, -1 + 1.6 / 127.5, 2.0])
    np.testing.assert_allclose(PROTOCOLS["seed_voken"].to_net_input(reconstruction), [0, 1.6 / 255, 1], atol=1e-6)
    np.testing.assert_allclose(PROTOCOLS["adm"].to_net_input(reconstruction), [0, 2 / 255, 1], atol=1e-6)
    np.testing.assert_allclose(
        PROTOCOLS["adm"].to_net_input(jnp.asarray([0, 7, 255], jnp.uint8)), [0, 7 / 255, 1], atol=1e-6
    )


def test_means_are_over_batches_of_the_protocols_size():
    values = np.array([1.0, 2.0, 3.0, 4.0, 100.0])
    assert PROTOCOLS["seed_voken"].mean(values) == pytest.approx((2.5 + 100) / 2)
    assert PROTOCOLS["clean"].mean(values) == pytest.approx(22.0)


def test_bicubic_is_pillows_on_floats():
    """As in clean-fid: channel by channel, antialiased, neither clipped nor rounded; then (g - 128) / 128."""
    for images in (IMAGES, np.random.default_rng(1).integers(0, 256, (1, 320, 400, 3), np.uint8)):
        found = np.asarray(for_inception(jnp.asarray(images, jnp.float32) / 255, "bicubic")) * 2 - 1
        for image, net_input in zip(images, found, strict=True):
            for channel in range(3):
                grey = Image.fromarray(image[..., channel].astype(np.float32))
                resized = np.asarray(grey.resize((SIDE, SIDE), Image.Resampling.BICUBIC))
                np.testing.assert_allclose(net_input[..., channel], (resized - 128) / 128, atol=2e-4)


def test_from_the_corner_is_tensorflow_ones_bilinear():
    found = np.asarray(for_inception(jnp.asarray(IMAGES, jnp.float32) / 255, "corner")) * 2 - 1
    height, width = IMAGES.shape[1:3]
    for row, column in ((0, 0), (13, 200), (298, 298), (150, 7)):
        y, x = row * height / SIDE, column * width / SIDE
        top, left = int(y), int(x)
        bottom, right, down, across = min(top + 1, height - 1), min(left + 1, width - 1), y - top, x - left
        grey = IMAGES[0].astype(np.float64)
        above = grey[top, left] * (1 - across) + grey[top, right] * across
        below = grey[bottom, left] * (1 - across) + grey[bottom, right] * across
        np.testing.assert_allclose(found[0, row, column], ((above * (1 - down) + below * down) - 128) / 128, atol=1e-5)


def test_a_caveat_says_what_differs_from_the_protocol():
    assert PROTOCOLS["adm"].caveats(50_000, 50_000, 256) == []
    assert PROTOCOLS["adm"].caveats(190, 190, 32) == [
        "not comparable: 190 images, the protocol has 50,000",
        "not comparable: images of 32 pixels, the protocol has 256",
    ]
    assert PROTOCOLS["clean"].caveats(190, 190, 32) == []
    assert PROTOCOLS["clean"].caveats(100, 190, 32) == ["not comparable: 100 images, the protocol has 190"]


def test_every_protocol_is_found_by_its_name_and_described():
    for name, protocol in PROTOCOLS.items():
        assert find_protocol(name) is protocol and protocol.name == name and "mean over" in protocol.describe()
    with pytest.raises(UsageError, match="'fid'; there are seed_voken, adm, clean, bicubic, llamagen"):
        find_protocol("fid")
