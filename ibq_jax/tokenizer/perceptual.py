"""LPIPS (arXiv 1801.03924), version 0.1 on VGG16, in JAX: how different two pictures look, learned from people.

Shapes: images [B, H, W, 3] in [-1, 1]; the feature maps of tap t [B, h_t, w_t, C_t]. The five heads, one number a
channel, come with this package under their own licence (lpips_vgg_heads.LICENSE). The 13 convolutions of torchvision's
VGG16 do not: they are read from the user's file.
"""

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from ibq_jax.base.errors import UsageError
from ibq_jax.base.tensor_files import read_tensors

HEADS_FILE = Path(__file__).with_name("lpips_vgg_heads.npz")
ENVIRONMENT = "IBQ_VGG16"
CACHED = ("vgg16-397923af.pth", "vgg16-397923af.safetensors")  # torchvision's own name for the file

# The convolutions of each stage as (index in torchvision's `features`, output channels). A stage ends in a tap; every
# stage but the first starts with a 2x2 max-pool.
STAGES = (
    ((0, 64), (2, 64)),
    ((5, 128), (7, 128)),
    ((10, 256), (12, 256), (14, 256)),
    ((17, 512), (19, 512), (21, 512)),
    ((24, 512), (26, 512), (28, 512)),
)
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)


def find_weights(configured: str) -> Path | None:
    """The user's VGG16 file: `configured` unless empty, else $IBQ_VGG16, else in ~/.cache/ibq_jax; None where absent.

    Raises UsageError when a file that was asked for by the config or the environment does not exist.
    """
    for origin, path in (("loss.perceptual_file", configured), (f"${ENVIRONMENT}", os.environ.get(ENVIRONMENT, ""))):
        if path:
            if not Path(path).expanduser().is_file():
                raise UsageError(f"{origin} is {path}, which does not exist; it names torchvision's VGG16 file")
            return Path(path).expanduser()
    cache = Path.home() / ".cache" / "ibq_jax"
    return next((cache / name for name in CACHED if (cache / name).is_file()), None)


def load_weights(path: str | Path) -> dict:
    """{"stages": per stage, per convolution {"kernel" HWIO, "bias"}, "heads": per tap [C_t]}, all float32.

    `path` is torchvision's VGG16, pickled or as .safetensors; its classifier is ignored. Raises UsageError naming the
    tensor that is missing or has another shape.
    """
    tensors = read_tensors(path)
    stages, in_channels = [], 3
    for stage in STAGES:
        convolutions = []
        for index, channels in stage:
            weight = _tensor(tensors, f"features.{index}.weight", (channels, in_channels, 3, 3), path)
            bias = _tensor(tensors, f"features.{index}.bias", (channels,), path)
            convolutions.append({"kernel": weight.transpose(2, 3, 1, 0), "bias": bias})
            in_channels = channels
        stages.append(convolutions)
    with np.load(HEADS_FILE) as heads:
        return {"stages": stages, "heads": [heads[f"lin{i}"] for i in range(len(STAGES))]}


def weight_shapes() -> dict:
    """Shapes and types of what `load_weights` returns, without the user's file."""
    stages, in_channels = [], 3
    for stage in STAGES:
        convolutions = []
        for _, channels in stage:
            kernel = jax.ShapeDtypeStruct((3, 3, in_channels, channels), jnp.float32)
            convolutions.append({"kernel": kernel, "bias": jax.ShapeDtypeStruct((channels,), jnp.float32)})
            in_channels = channels
        stages.append(convolutions)
    return {"stages": stages, "heads": [jax.ShapeDtypeStruct((stage[-1][1],), jnp.float32) for stage in STAGES]}


def _tensor(tensors: dict[str, np.ndarray], name: str, shape: tuple[int, ...], path: str | Path) -> np.ndarray:
    if name not in tensors:
        raise UsageError(f"{path}: not torchvision's VGG16, for it has no tensor {name}")
    if tensors[name].shape != shape:
        raise UsageError(
            f"{path}: not torchvision's VGG16, for {name} has shape {tensors[name].shape} instead of {shape}"
        )
    return tensors[name].astype(np.float32)


def lpips(weights: dict, x: jax.Array, y: jax.Array, dtype: jnp.dtype = jnp.float32) -> jax.Array:
    """Distances [B] float32 between images x and y [B, H, W, 3] in [-1, 1]; 0 up to rounding for equal ones.

    `weights` are load_weights's. Sides are 16 pixels or more. Convolutions compute in `dtype`, the rest in float32.
    """
    total = jnp.zeros(x.shape[0], jnp.float32)
    for head, tap_x, tap_y in zip(weights["heads"], _taps(weights, x, dtype), _taps(weights, y, dtype), strict=True):
        difference = (_unit(tap_x) - _unit(tap_y)) ** 2
        total += jnp.mean(jnp.einsum("bhwc,c->bhw", difference, head), axis=(1, 2))
    return total


def _taps(weights: dict, images: jax.Array, dtype: jnp.dtype) -> list[jax.Array]:
    shift, scale = (jnp.asarray(values).reshape(1, 1, 1, 3) for values in (SHIFT, SCALE))
    h = ((images - shift) / scale).astype(dtype)
    taps = []
    for i, stage in enumerate(weights["stages"]):
        if i > 0:
            h = jax.lax.reduce_window(h, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
        for convolution in stage:
            kernel, bias = (jnp.asarray(convolution[name], dtype) for name in ("kernel", "bias"))
            h = jax.lax.conv_general_dilated(h, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
            h = jax.nn.relu(h + bias.reshape(1, 1, 1, -1))
        taps.append(h.astype(jnp.float32))
    return taps


def _unit(features: jax.Array) -> jax.Array:
    """Each position's channels scaled to length 1; where all are 0 they stay 0, and so does the gradient."""
    squared = jnp.sum(features**2, axis=-1, keepdims=True)
    active = squared > 0
    length = jnp.sqrt(jnp.where(active, squared, 1.0))
    return jnp.where(active, features / (length + 1e-10), 0.0)
