"""The FID Inception-v3: the classifier of 2015-12-05 whose features define FID.

It differs from torchvision's Inception-v3 as pytorch-fid found in the TensorFlow graph: mean pooling excludes padding,
the last block uses max pooling, and there are 1008 classes. Inference only, in float32. The weights are not part of
this package: they are read from the user's copy of pytorch-fid's file; batch norms are folded into the convolutions.

Shapes: images [B, H, W, 3] in [0, 1]; features are [B, C], activations [B, h, w, C].
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from ibq_jax.base.errors import UsageError
from ibq_jax.base.precision import FULL
from ibq_jax.pretrained.tensor_files import TensorFile, open_tensors

SIDE = 299  # pixels of the network's input
CLASSES = 1008
SPATIAL_CHANNELS = 7  # of Mixed_6d: at 17x17 positions they are 2023 numbers, about as many as the pool features
BATCH_NORM_EPSILON = 1e-3


class Conv(NamedTuple):
    """A convolution with its batch norm and a ReLU; `kernel` is (height, width)."""

    channels: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    padding: str = "SAME"


# A step is a Conv, a pool, a dict of steps in sequence, or a list of parallel steps whose outputs are concatenated by
# channel. The keys that lead to a Conv, concatenated, are its name in the user's file.
Step = Conv | Callable[[jax.Array], jax.Array] | dict | list

max_pool = partial(nn.max_pool, window_shape=(3, 3), padding="SAME")
mean_pool = partial(nn.avg_pool, window_shape=(3, 3), padding="SAME", count_include_pad=False)
shrink = partial(nn.max_pool, window_shape=(3, 3), strides=(2, 2))


def _mixed_35(pool_channels: int) -> Step:
    """Returns a block on 35x35 positions."""
    return [
        {".branch1x1": Conv(64)},
        {".branch5x5_1": Conv(48), ".branch5x5_2": Conv(64, (5, 5))},
        {".branch3x3dbl_1": Conv(64), ".branch3x3dbl_2": Conv(96, (3, 3)), ".branch3x3dbl_3": Conv(96, (3, 3))},
        {".pool": mean_pool, ".branch_pool": Conv(pool_channels)},
    ]


def _mixed_17(channels: int) -> Step:
    """Returns a block on 17x17 positions."""
    return [
        {".branch1x1": Conv(192)},
        {
            ".branch7x7_1": Conv(channels),
            ".branch7x7_2": Conv(channels, (1, 7)),
            ".branch7x7_3": Conv(192, (7, 1)),
        },
        {
            ".branch7x7dbl_1": Conv(channels),
            ".branch7x7dbl_2": Conv(channels, (7, 1)),
            ".branch7x7dbl_3": Conv(channels, (1, 7)),
            ".branch7x7dbl_4": Conv(channels, (7, 1)),
            ".branch7x7dbl_5": Conv(192, (1, 7)),
        },
        {".pool": mean_pool, ".branch_pool": Conv(192)},
    ]


def _mixed_8(pool: Callable[[jax.Array], jax.Array]) -> Step:
    """Returns a block on 8x8 positions."""
    cross = [{"a": Conv(384, (1, 3))}, {"b": Conv(384, (3, 1))}]
    return [
        {".branch1x1": Conv(320)},
        {".branch3x3_1": Conv(384), ".branch3x3_2": cross},
        {".branch3x3dbl_1": Conv(448), ".branch3x3dbl_2": Conv(384, (3, 3)), ".branch3x3dbl_3": cross},
        {".pool": pool, ".branch_pool": Conv(192)},
    ]


NETWORK = {
    "Conv2d_1a_3x3": Conv(32, (3, 3), 2, "VALID"),
    "Conv2d_2a_3x3": Conv(32, (3, 3), 1, "VALID"),
    "Conv2d_2b_3x3": Conv(64, (3, 3)),
    "maxpool1": shrink,
    "Conv2d_3b_1x1": Conv(80),
    "Conv2d_4a_3x3": Conv(192, (3, 3), 1, "VALID"),
    "maxpool2": shrink,
    "Mixed_5b": _mixed_35(32),
    "Mixed_5c": _mixed_35(64),
    "Mixed_5d": _mixed_35(64),
    "Mixed_6a": [
        {".branch3x3": Conv(384, (3, 3), 2, "VALID")},
        {
            ".branch3x3dbl_1": Conv(64),
            ".branch3x3dbl_2": Conv(96, (3, 3)),
            ".branch3x3dbl_3": Conv(96, (3, 3), 2, "VALID"),
        },
        shrink,
    ],
    "Mixed_6b": _mixed_17(128),
    "Mixed_6c": _mixed_17(160),
    "Mixed_6d": _mixed_17(160),
    "Mixed_6e": _mixed_17(192),
    "Mixed_7a": [
        {".branch3x3_1": Conv(192), ".branch3x3_2": Conv(320, (3, 3), 2, "VALID")},
        {
            ".branch7x7x3_1": Conv(192),
            ".branch7x7x3_2": Conv(192, (1, 7)),
            ".branch7x7x3_3": Conv(192, (7, 1)),
            ".branch7x7x3_4": Conv(192, (3, 3), 2, "VALID"),
        },
        shrink,
    ],
    "Mixed_7b": _mixed_8(mean_pool),
    "Mixed_7c": _mixed_8(max_pool),
}


class Features(NamedTuple):
    """The features that metrics use, float32."""

    pool: jax.Array  # [B, 2048], for FID, precision and recall
    spatial: jax.Array  # [B, 2023], for sFID: 7 channels at 17x17 positions, in HWC order
    logits: jax.Array  # [B, 1008], for the Inception Score; without the classifier's bias, as in the ADM suite


class Inception(nn.Module):
    """The network: [B, 299, 299, 3] in [-1, 1] -> Features. Every step of NETWORK sows its output as after_NAME."""

    @nn.compact
    def __call__(self, x: jax.Array) -> Features:
        for name, step in NETWORK.items():
            x = _apply(step, x, name)
            self.sow("intermediates", f"after_{name}", x)
            if name == "Mixed_6d":
                spatial = x[..., :SPATIAL_CHANNELS].reshape(len(x), -1)
        pool = jnp.mean(x, axis=(1, 2))
        classifier = nn.Dense(CLASSES, use_bias=False, precision=FULL, name="fc")
        return Features(pool, spatial, classifier(pool))


def _apply(step: Step, x: jax.Array, name: str) -> jax.Array:
    """Applies a step, whose convolutions' names begin with `name`."""
    if isinstance(step, Conv):
        convolution = nn.Conv(step.channels, step.kernel, step.stride, step.padding, precision=FULL, name=name)
        return nn.relu(convolution(x))
    if isinstance(step, list):
        return jnp.concatenate([_apply(branch, x, name) for branch in step], axis=-1)
    if isinstance(step, dict):
        for key, inner in step.items():
            x = _apply(inner, x, name + key)
        return x
    return step(x)


def features(weights: dict, images: jax.Array) -> Features:
    """Computes the features of images [B, H, W, 3] in [0, 1]; pure, can be jitted. `weights` are from `load_weights`.

    Images are resized to 299 pixels as pytorch-fid does. The TensorFlow graph, which the ADM suite uses, aligns pixels
    differently when it resizes, and maps grey level 128 to 0: for that, give 299x299 images divided by 256.
    """
    return Inception().apply(weights, 2.0 * resize_bilinear(images, SIDE) - 1.0)


def resize_bilinear(images: jax.Array, side: int) -> jax.Array:
    """Resizes [B, H, W, C] to [B, side, side, C] as PyTorch's interpolate does with align_corners=False.

    Pixel centres are at half-integers; each output mixes its four neighbours, also when the image shrinks.
    """
    shape = (images.shape[0], side, side, images.shape[3])
    return jax.image.resize(images, shape, "bilinear", antialias=False)


def load_weights(path: str | Path) -> dict:
    """Reads the variables: float32 {"params": {name: {"kernel" HWIO, "bias"}, "fc": {"kernel" [2048, 1008]}}}.

    `path` is pytorch-fid's file, pickled or as .safetensors. The classifier's bias is not used. Raises UsageError
    naming the tensor that is missing or has another shape.
    """
    file = open_tensors(path)
    shapes = jax.eval_shape(Inception().init, jax.random.key(0), jax.ShapeDtypeStruct((1, SIDE, SIDE, 3), jnp.float32))
    params = {}
    for name, layer in shapes["params"].items():
        if name == "fc":
            params[name] = {"kernel": _tensor(file, "fc.weight", layer["kernel"].shape[::-1], path).T}
        else:
            params[name] = _folded(file, name, layer["kernel"].shape, path)
    return {"params": jax.tree.map(lambda x: np.ascontiguousarray(x, np.float32), params)}


def _folded(file: TensorFile, name: str, shape: tuple[int, ...], path: str | Path) -> dict[str, np.ndarray]:
    """Folds a batch norm of the file into its convolution (kernel HWIO `shape`), in float64."""
    height, width, inputs, outputs = shape
    kernel = _tensor(file, f"{name}.conv.weight", (outputs, inputs, height, width), path).transpose(2, 3, 1, 0)
    scale, shift, mean, variance = (
        _tensor(file, f"{name}.bn.{part}", (outputs,), path)
        for part in ("weight", "bias", "running_mean", "running_var")
    )
    scale = scale / np.sqrt(variance + BATCH_NORM_EPSILON)
    return {"kernel": kernel * scale, "bias": shift - mean * scale}


def _tensor(file: TensorFile, name: str, shape: tuple[int, ...], path: str | Path) -> np.ndarray:
    if name not in file.shapes:
        raise UsageError(f"{path}: not the FID Inception-v3: it has no tensor {name}")
    if file.shapes[name] != shape:
        raise UsageError(f"{path}: not the FID Inception-v3: {name} has shape {file.shapes[name]} instead of {shape}")
    return file.read(name).astype(np.float64)
