"""LPIPS (arXiv 1801.03924), version 0.1 on VGG16 or AlexNet: a perceptual distance between images.

Shapes: images [B, H, W, 3] in [-1, 1]; feature maps of tap t [B, h_t, w_t, C_t]. The five heads of each network, one
weight per channel, are part of this package under their own licence (lpips_heads.LICENSE). The convolutions are not:
they are read from the user's copy of torchvision's file.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ibq_jax.base.errors import UsageError
from ibq_jax.base.precision import FULL
from ibq_jax.pretrained.normalisation import unit_channels, weighted_channels
from ibq_jax.pretrained.tensor_files import read_tensors
from ibq_jax.pretrained.weight_files import WEIGHT_FILES


class Convolution(NamedTuple):
    """A convolution with a square kernel of `side` pixels; `padding` is in pixels on every side."""

    index: int  # in torchvision's `features`
    channels: int
    side: int = 3
    stride: int = 1
    padding: int = 1


@dataclass(frozen=True)
class Trunk:
    """A network's convolutions in stages; each stage's output is a tap."""

    stages: tuple[tuple[Convolution, ...], ...]
    pooled: tuple[int, ...]  # stages that start with a max-pool of `pool` pixels, stride 2
    pool: int
    min_side: int  # pixels; smaller images would leave nothing at the last tap
    heads: str  # file in this folder


TRUNKS = {
    "vgg16": Trunk(
        stages=(
            (Convolution(0, 64), Convolution(2, 64)),
            (Convolution(5, 128), Convolution(7, 128)),
            (Convolution(10, 256), Convolution(12, 256), Convolution(14, 256)),
            (Convolution(17, 512), Convolution(19, 512), Convolution(21, 512)),
            (Convolution(24, 512), Convolution(26, 512), Convolution(28, 512)),
        ),
        pooled=(1, 2, 3, 4),
        pool=2,
        min_side=16,
        heads="lpips_vgg_heads.npz",
    ),
    "alexnet": Trunk(
        stages=(
            (Convolution(0, 64, side=11, stride=4, padding=2),),
            (Convolution(3, 192, side=5, padding=2),),
            (Convolution(6, 384),),
            (Convolution(8, 256),),
            (Convolution(10, 256),),
        ),
        pooled=(1, 2),
        pool=3,
        min_side=31,
        heads="lpips_alex_heads.npz",
    ),
}
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)


def load_weights(path: str | Path, net: str = "vgg16") -> dict:
    """Reads {"stages": per stage, per convolution {"kernel" HWIO, "bias"}, "heads": per tap [C_t]}, all float32.

    `path` is torchvision's file of `net`, pickled or as .safetensors; its classifier is ignored. Raises UsageError
    naming the tensor that is missing or has another shape.
    """
    tensors = read_tensors(path)
    stages = [
        [
            {
                "kernel": _tensor(tensors, f"features.{c.index}.weight", shape, path, net).transpose(2, 3, 1, 0),
                "bias": _tensor(tensors, f"features.{c.index}.bias", shape[:1], path, net),
            }
            for c, shape in stage
        ]
        for stage in _shapes(net)
    ]
    with np.load(Path(__file__).with_name(TRUNKS[net].heads)) as heads:
        return {"stages": stages, "heads": [heads[f"lin{i}"] for i in range(len(stages))]}


def weight_shapes(net: str = "vgg16") -> dict:
    """Returns the shapes and types of the result of `load_weights`, without the user's file."""
    stages = [
        [
            {
                "kernel": jax.ShapeDtypeStruct((*shape[2:], *shape[1::-1]), jnp.float32),
                "bias": jax.ShapeDtypeStruct(shape[:1], jnp.float32),
            }
            for _, shape in stage
        ]
        for stage in _shapes(net)
    ]
    heads = [jax.ShapeDtypeStruct((stage[-1].channels,), jnp.float32) for stage in TRUNKS[net].stages]
    return {"stages": stages, "heads": heads}


def _shapes(net: str) -> Iterator[list[tuple[Convolution, tuple[int, int, int, int]]]]:
    """Yields the convolutions of every stage, each with its weight's shape in PyTorch's layout OIHW."""
    inputs = 3
    for stage in TRUNKS[net].stages:
        shapes = []
        for convolution in stage:
            shapes.append((convolution, (convolution.channels, inputs, convolution.side, convolution.side)))
            inputs = convolution.channels
        yield shapes


def _tensor(tensors: dict, name: str, shape: tuple[int, ...], path: str | Path, net: str) -> np.ndarray:
    expected = WEIGHT_FILES[net].origin
    if name not in tensors:
        raise UsageError(f"{path}: not {expected}: it has no tensor {name}")
    if tensors[name].shape != shape:
        raise UsageError(f"{path}: not {expected}: {name} has shape {tensors[name].shape} instead of {shape}")
    return tensors[name].astype(np.float32)


@jax.named_scope("lpips")
def lpips(weights: dict, x: jax.Array, y: jax.Array, dtype: jnp.dtype = jnp.float32, net: str = "vgg16") -> jax.Array:
    """Computes the LPIPS distances between images, float32 [B]; 0 up to rounding for equal images.

    Args:
        weights: from `load_weights` for the same `net`.
        x: images [B, H, W, 3] in [-1, 1].
        y: images of the same shape.
        dtype: type of the activations and of what is summed; sums are float32. "float32" keeps every bit everywhere.
        net: "vgg16" or "alexnet"; static under jit.

    Raises:
        UsageError: a side is shorter than the network's `min_side`.
    """
    return sum(_terms(weights, x, y, dtype, net), jnp.zeros(x.shape[0], jnp.float32))


def _terms(weights: dict, x: jax.Array, y: jax.Array, dtype: jnp.dtype, net: str) -> Iterator[jax.Array]:
    """Yields each tap's contribution to the distances, [B]."""
    (height, width), min_side = x.shape[1:3], TRUNKS[net].min_side
    if min(height, width) < min_side:
        name = WEIGHT_FILES[net].net
        raise UsageError(f"LPIPS on {name} needs images of at least {min_side}x{min_side} pixels, not {height}x{width}")
    taps = (_taps(weights, images, dtype, net) for images in (x, y))
    for head, tap_x, tap_y in zip(weights["heads"], *taps, strict=True):
        difference = (unit_channels(tap_x) - unit_channels(tap_y)) ** 2
        yield jnp.mean(weighted_channels(difference.astype(dtype), head), axis=(1, 2))


def _taps(weights: dict, images: jax.Array, dtype: jnp.dtype, net: str) -> list[jax.Array]:
    """Returns the output of every stage, [B, h_t, w_t, C_t] in `dtype`."""
    shift, scale = (jnp.asarray(values).reshape(1, 1, 1, 3) for values in (SHIFT, SCALE))
    h = ((images - shift) / scale).astype(dtype)
    trunk, taps = TRUNKS[net], []
    for i, (stage, arrays) in enumerate(zip(trunk.stages, weights["stages"], strict=True)):
        if i in trunk.pooled:
            window = (1, trunk.pool, trunk.pool, 1)
            h = jax.lax.reduce_window(h, -jnp.inf, jax.lax.max, window, (1, 2, 2, 1), "VALID")
        for convolution, tensors in zip(stage, arrays, strict=True):
            kernel, bias = (jnp.asarray(tensors[name], dtype) for name in ("kernel", "bias"))
            stride, padding = (convolution.stride,) * 2, [(convolution.padding, convolution.padding)] * 2
            h = jax.lax.conv_general_dilated(
                h, kernel, stride, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"), precision=FULL
            )
            h = jax.nn.relu(h + bias.reshape(1, 1, 1, -1))
        taps.append(h)
    return taps
