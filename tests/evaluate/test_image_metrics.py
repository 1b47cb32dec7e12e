"""PSNR and SSIM against scikit-image's values, for light noise, a blur, a contrast change and unrelated images."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ibq_jax.evaluate.image_metrics import psnr, ssim, truncate_to_uint8

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "image_metrics.npz")
A, B = (jnp.asarray(GOLDEN[name], jnp.float32) / 255 for name in ("orig_u8", "recon_u8"))


def test_psnr_agrees_with_scikit_image():
    np.testing.assert_allclose(jax.jit(psnr)(A, B), GOLDEN["psnr"], atol=1e-4)


def test_ssim_agrees_with_scikit_image():
    values = jax.jit(ssim)(A, B)
    np.testing.assert_allclose(values, GOLDEN["ssim"], atol=1e-5)
    np.testing.assert_allclose(values, GOLDEN["ssim_f64"], atol=1e-6)


def test_equal_images():
    assert np.isposinf(psnr(A, A)).all()
    np.testing.assert_allclose(ssim(A, A), 1.0, atol=1e-6)


def test_flat_images_keep_their_digits():
    """The worst case for float32: no variance, and means at the end of the range."""
    white = jnp.full((1, 48, 48, 3), 1.0)
    darker = jnp.full((1, 48, 48, 3), 254 / 255)
    expected = (2 * 254 / 255 + 1e-4) / (1 + (254 / 255) ** 2 + 1e-4)
    np.testing.assert_allclose(ssim(white, darker), expected, atol=1e-6)


def test_ssim_needs_a_whole_window():
    with pytest.raises(ValueError, match="at least 7x7 pixels, not 6x9"):
        ssim(jnp.zeros((1, 6, 9, 3)), jnp.zeros((1, 6, 9, 3)))


@pytest.mark.parametrize("name", ["orig", "recon"])
def test_truncation_gives_the_released_uint8(name):
    converted = truncate_to_uint8(jnp.asarray(GOLDEN[name]))
    assert converted.dtype == jnp.uint8
    np.testing.assert_array_equal(converted, GOLDEN[f"{name}_u8"])


def test_truncation_clips_first():
    assert truncate_to_uint8(jnp.array([-1.5, -1.0, 0.0, 0.999, 1.0, 7.0])).tolist() == [0, 0, 127, 254, 255, 255]
