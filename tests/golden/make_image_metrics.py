"""Makes image_metrics.npz: PSNR and SSIM of image pairs by scikit-image 0.26.0.

    pip install scikit-image==0.26.0

The committed pairs are light noise, a blur, a contrast change, and unrelated images.
"""

import sys
from pathlib import Path

import numpy as np
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

sys.path.insert(0, str(Path(__file__).parents[1]))
from support import golden_script


def make(committed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Converts the float images in [-1, 1] to uint8 by truncation, as the released evaluation does; measures them."""
    arrays = {name: committed[name] for name in ("orig", "recon")}
    for name in ("orig", "recon"):
        arrays[f"{name}_u8"] = ((arrays[name] + 1) / 2 * 255).astype(np.uint8)
    a, b = (arrays[f"{name}_u8"].astype(np.float32) / np.float32(255) for name in ("orig", "recon"))
    pairs = list(zip(a, b, strict=True))
    arrays["psnr"] = np.array([peak_signal_noise_ratio(x, y, data_range=1.0) for x, y in pairs], np.float64)
    arrays["ssim"] = np.array([ssim(x, y) for x, y in pairs], np.float64)
    arrays["ssim_f64"] = np.array([ssim(x.astype(np.float64), y.astype(np.float64)) for x, y in pairs])
    return arrays | {f"{name}_mean": arrays[name].mean() for name in ("psnr", "ssim")}


def ssim(x: np.ndarray, y: np.ndarray) -> float:
    return structural_similarity(x, y, data_range=1.0, channel_axis=-1)


if __name__ == "__main__":
    golden_script.main("image_metrics", make, __doc__)
