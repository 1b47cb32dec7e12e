"""PSNR and SSIM, image by image, as scikit-image computes them with data_range=1.

Shapes: images [B, H, W, 3], float in [0, 1]; metrics [B]. All functions are pure and can be jitted.
"""

import jax
import jax.numpy as jnp

WINDOW = 7  # pixels; SSIM's uniform window
C1, C2 = 0.01**2, 0.03**2


def psnr(a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns the peak signal-to-noise ratio of each pair in dB, [B]; infinite for equal images."""
    return -10.0 * jnp.log10(jnp.mean(jnp.square(a - b), axis=(1, 2, 3)))


def ssim(a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns the structural similarity of each pair, [B] (Wang et al. 2004).

    The mean over all complete 7x7 windows of every channel. Pixels of a window have equal weights; (co)variances are
    sample (co)variances, divided by 48.

    Raises:
        ValueError: an image is smaller than the window.
    """
    if min(a.shape[1:3]) < WINDOW:
        raise ValueError(f"SSIM needs images of at least {WINDOW}x{WINDOW} pixels, not {a.shape[1]}x{a.shape[2]}")
    # With d = a - b, 2ab = a^2 + b^2 - d^2 in both factors of SSIM, and likewise for covariances: fewer digits cancel.
    difference, mean_a, mean_b = a - b, _window_mean(a), _window_mean(b)
    mean_difference, mean_squares = _window_mean(difference), mean_a**2 + mean_b**2
    sample = WINDOW**2 / (WINDOW**2 - 1)
    variances = sample * (_window_mean(a**2 + b**2) - mean_squares)
    variance_of_difference = sample * (_window_mean(difference**2) - mean_difference**2)
    luminance = 1 - mean_difference**2 / (mean_squares + C1)
    structure = 1 - variance_of_difference / (variances + C2)
    return jnp.mean(luminance * structure, axis=(1, 2, 3))


def _window_mean(images: jax.Array) -> jax.Array:
    rows = jax.lax.reduce_window(images, 0.0, jax.lax.add, (1, WINDOW, 1, 1), (1, 1, 1, 1), "valid")
    return jax.lax.reduce_window(rows, 0.0, jax.lax.add, (1, 1, WINDOW, 1), (1, 1, 1, 1), "valid") / WINDOW**2


def truncate_to_uint8(images: jax.Array) -> jax.Array:
    """Converts float [-1, 1] to uint8 by truncation, as the released evaluation does; rounding shifts PSNR 0.01 dB."""
    return ((jnp.clip(images, -1.0, 1.0) + 1.0) / 2.0 * 255.0).astype(jnp.uint8)
