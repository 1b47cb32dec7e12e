"""Frozen networks that compile in a moment: one to stand in for EfficientNet, and a trunk for LPIPS' VGG16."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from ibq_jax.pretrained.frozen_nets import NETS, FrozenNet
from ibq_jax.pretrained.lpips import Convolution, Trunk

NHWC = ("NHWC", "HWIO", "NHWC")
SHAPES = (3, 3, 3, 4), (3, 3, 4, 5)
SMALL_TRUNK = Trunk(
    stages=((Convolution(0, 8), Convolution(2, 8)), (Convolution(5, 12),)), pooled=(1,), pool=2, min_side=4, heads=""
)


def maps(weights: dict, images: jax.Array, dtype: jnp.dtype = jnp.float32) -> list[jax.Array]:
    found = [images.astype(dtype)]
    for kernel in weights["kernels"]:
        layout = ("NHWC", "HWIO", "NHWC")
        found.append(
            jnp.tanh(jax.lax.conv_general_dilated(found[-1], kernel, (2, 2), "SAME", dimension_numbers=layout))
        )
    return found[1:]


def small_net() -> tuple[FrozenNet, dict]:
    """A network of two convolutions, whose outputs are its hidden maps, and its weights."""
    random = np.random.default_rng(0)
    weights = {"kernels": [jnp.asarray(random.normal(size=shape), jnp.float32) for shape in SHAPES]}
    net = dataclasses.replace(
        NETS["efficientnet"],
        maps=maps,
        weight_shapes=lambda: {"kernels": [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in SHAPES]},
        channels=(4, 5),
        side=8,
        stride=2,
        feature_channels=4,
        features=lambda *arguments: maps(*arguments)[0],
        logits=lambda *arguments: maps(*arguments)[-1].mean((1, 2)),
    )
    return net, weights
