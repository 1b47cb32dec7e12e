"""ConvNeXt-Small (arXiv 2201.03545) in JAX: class logits and hidden maps, from torchvision's or timm's file.

Shapes: images float [B, H, W, 3] in [0, 1], sides multiples of 32; hidden maps [B, H/s, W/s, C] for s of 4, 8, 16, 32;
logits [B, 1000].
"""

from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from ibq_jax.base.errors import UsageError
from ibq_jax.base.precision import FULL
from ibq_jax.pretrained.normalisation import normalise_layer, standardised
from ibq_jax.pretrained.patches import convolve_patches
from ibq_jax.pretrained.tensor_files import read_tensors

SIDE, MULTIPLE, CLASSES = 224, 32, 1000
CHANNELS, DEPTHS = (96, 192, 384, 768), (3, 3, 27, 3)
EXPANSION, KERNEL, STEM = 4, 7, 4  # of a block's inner width; sides of the depthwise kernel and of the first patches
NHWC = ("NHWC", "HWIO", "NHWC")

# A layer's tensors by our name: (name in timm's file, name in torchvision's), without .weight and .bias.
STEM_NAMES = {"conv": ("stem.0", "features.0.0"), "norm": ("stem.1", "features.0.1")}
HEAD_NAMES = {"norm": ("head.norm", "classifier.0"), "classifier": ("head.fc", "classifier.2")}


def _downsampling_names(stage: int) -> dict[str, tuple[str, str]]:
    ours, theirs = f"stages.{stage}.downsample", f"features.{2 * stage}"
    return {"norm": (f"{ours}.0", f"{theirs}.0"), "conv": (f"{ours}.1", f"{theirs}.1")}


def _block_names(stage: int, block: int) -> dict[str, tuple[str, str]]:
    ours, theirs = f"stages.{stage}.blocks.{block}", f"features.{2 * stage + 1}.{block}"
    return {
        "depthwise": (f"{ours}.conv_dw", f"{theirs}.block.0"),
        "norm": (f"{ours}.norm", f"{theirs}.block.2"),
        "expand": (f"{ours}.mlp.fc1", f"{theirs}.block.3"),
        "project": (f"{ours}.mlp.fc2", f"{theirs}.block.5"),
        "scale": (f"{ours}.gamma", f"{theirs}.layer_scale"),
    }


def load_weights(path: str | Path) -> dict:
    """Reads {"stem", "stages": per stage {"downsampling" (but the first), "blocks"}, "head"}, all float32.

    Raises UsageError if the file cannot be read, lacks a tensor, has an unknown one, or one of another shape.
    """
    tensors = read_tensors(path)
    torchvisions = "features.0.0.weight" in tensors

    def take(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name not in tensors:
            raise UsageError(f"{path}: not ConvNeXt-Small: it has no tensor {name}")
        if tensors[name].size != np.prod(shape) or tensors[name].ndim < len(shape):
            raise UsageError(f"{path}: not ConvNeXt-Small: {name} has shape {tensors[name].shape}, not {shape}")
        return tensors.pop(name).astype(np.float32).reshape(shape)

    def layer(names: tuple[str, str], like: Mapping | jax.ShapeDtypeStruct):
        name = names[torchvisions]
        if not isinstance(like, Mapping):
            return take(name, like.shape)
        bias = take(f"{name}.bias", like["bias"].shape)
        if "scale" in like:
            return {"scale": take(f"{name}.weight", like["scale"].shape), "bias": bias}
        *window, inputs, outputs = like["kernel"].shape
        kernel = take(f"{name}.weight", (outputs, inputs, *window))
        return {"kernel": kernel.transpose(*range(2, kernel.ndim), 1, 0), "bias": bias}

    weights = _map_layers(layer)
    if tensors:
        raise UsageError(f"{path}: not ConvNeXt-Small: it has a tensor {next(iter(tensors))}")
    return weights


def weight_shapes() -> dict:
    """Returns the shapes and types of the result of `load_weights`, without a file."""
    return _map_layers(lambda names, like: like)


def _map_layers(function) -> dict:
    """Returns the tree of weights, each layer of which is `function(names, shapes)`."""

    def array(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    def group(names: dict, **shapes: Mapping | jax.ShapeDtypeStruct) -> dict:
        return {name: function(names[name], shape) for name, shape in shapes.items()}

    def affine(*kernel: int) -> dict:
        return {"kernel": array(*kernel), "bias": array(kernel[-1])}

    def norm(width: int) -> dict:
        return {"scale": array(width), "bias": array(width)}

    def block(stage: int, number: int, width: int) -> dict:
        inner = EXPANSION * width
        return group(
            _block_names(stage, number),
            depthwise=affine(KERNEL, KERNEL, 1, width),
            norm=norm(width),
            expand=affine(width, inner),
            project=affine(inner, width),
            scale=array(width),
        )

    stages = []
    for stage, (width, depth) in enumerate(zip(CHANNELS, DEPTHS, strict=True)):
        layers = {}
        if stage:
            before = CHANNELS[stage - 1]
            names = _downsampling_names(stage)
            layers["downsampling"] = group(names, norm=norm(before), conv=affine(2, 2, before, width))
        stages.append(layers | {"blocks": [block(stage, number, width) for number in range(depth)]})
    stem = group(STEM_NAMES, conv=affine(STEM, STEM, 3, CHANNELS[0]), norm=norm(CHANNELS[0]))
    head = group(HEAD_NAMES, norm=norm(CHANNELS[-1]), classifier=affine(CHANNELS[-1], CLASSES))
    return {"stem": stem, "stages": stages, "head": head}


@jax.named_scope("convnext")
def maps(weights: dict, images: jax.Array, dtype: jnp.dtype = jnp.float32) -> list[jax.Array]:
    """Computes the output of every stage, [B, h, w, C] in `dtype`, for images in [0, 1]; norms are float32."""
    weights = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), weights)
    h = convolve_patches(weights["stem"]["conv"], standardised(images).astype(dtype))
    h = normalise_layer(weights["stem"]["norm"], h)
    found = []
    for stage in weights["stages"]:
        if "downsampling" in stage:
            h = convolve_patches(stage["downsampling"]["conv"], normalise_layer(stage["downsampling"]["norm"], h))
        for layers in stage["blocks"]:
            h = h + _block(layers, h)
        found.append(h)
    return found


def logits(weights: dict, images: jax.Array, dtype: jnp.dtype = jnp.float32) -> jax.Array:
    """Computes the class logits of images in [0, 1], float32 [B, 1000], in the usual order of ImageNet's classes."""
    head = weights["head"]
    pooled = jnp.mean(maps(weights, images, dtype)[-1].astype(jnp.float32), axis=(1, 2))
    return _dense(head["classifier"], normalise_layer(head["norm"], pooled))


def _block(layers: dict, h: jax.Array) -> jax.Array:
    depthwise, half = layers["depthwise"], KERNEL // 2
    y = jax.lax.conv_general_dilated(
        h,
        depthwise["kernel"],
        (1, 1),
        [(half, half)] * 2,
        dimension_numbers=NHWC,
        feature_group_count=h.shape[-1],
        precision=FULL,
    )
    y = normalise_layer(layers["norm"], y + depthwise["bias"].reshape(1, 1, 1, -1))
    y = _dense(layers["project"], jax.nn.gelu(_dense(layers["expand"], y), approximate=False))
    return y * layers["scale"].reshape(1, 1, 1, -1)


def _dense(layer: dict, x: jax.Array) -> jax.Array:
    bias = layer["bias"].reshape(*(1,) * (x.ndim - 1), -1)
    return jnp.einsum("...i,io->...o", x, layer["kernel"], precision=FULL) + bias
