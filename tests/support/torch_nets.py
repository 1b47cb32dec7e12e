"""ConvNeXt and vision transformers written again in PyTorch, on state dicts under the published names, in float64."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def made_up(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Returns random float32 tensors whose products keep the size of what passes."""
    random = np.random.default_rng(0)
    return {
        name: (random.normal(size=shape) / np.sqrt(max(1, np.prod(shape[1:])))).astype(np.float32)
        for name, shape in shapes.items()
    }


def doubles(tensors: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    return {name: torch.tensor(array, dtype=torch.float64) for name, array in tensors.items()}


def standardised(images: Tensor) -> Tensor:
    """[B, H, W, 3] in [0, 1] -> [B, 3, H, W]."""
    mean, deviation = (torch.tensor(values, dtype=images.dtype) for values in (MEAN, DEVIATION))
    return ((images - mean) / deviation).permute(0, 3, 1, 2)


def layer_norm(x: Tensor, weights: Mapping[str, Tensor], name: str) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-6)


def linear(x: Tensor, weights: Mapping[str, Tensor], name: str) -> Tensor:
    return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])


def convnext(weights: Mapping[str, Tensor], images: Tensor) -> tuple[list[Tensor], Tensor]:
    """(The stages' outputs [B, h, w, C], class logits) of a network under torchvision's names."""

    def conv(x: Tensor, name: str, **options) -> Tensor:
        x = F.conv2d(x.permute(0, 3, 1, 2), weights[f"{name}.weight"], weights[f"{name}.bias"], **options)
        return x.permute(0, 2, 3, 1)

    x = conv(standardised(images).permute(0, 2, 3, 1), "features.0.0", stride=4)
    x, found = layer_norm(x, weights, "features.0.1"), []
    for stage in range(4):
        if stage:
            x = conv(layer_norm(x, weights, f"features.{2 * stage}.0"), f"features.{2 * stage}.1", stride=2)
        prefix = f"features.{2 * stage + 1}"
        for block in sorted({int(name.split(".")[2]) for name in weights if name.startswith(f"{prefix}.")}):
            name = f"{prefix}.{block}"
            y = conv(x, f"{name}.block.0", padding=3, groups=x.shape[-1])
            y = linear(layer_norm(y, weights, f"{name}.block.2"), weights, f"{name}.block.3")
            x = x + linear(F.gelu(y), weights, f"{name}.block.5") * weights[f"{name}.layer_scale"].flatten()
        found.append(x)
    return found, linear(layer_norm(x.mean((1, 2)), weights, "classifier.0"), weights, "classifier.2")


def vit(weights: Mapping[str, Tensor], images: Tensor, patch: int, heads: int) -> tuple[list[Tensor], Tensor]:
    """(All tokens [B, T, C] before and after each block, the patches' tokens [B, h, w, C] after the last norm)."""
    x = F.conv2d(
        standardised(images), weights["patch_embed.proj.weight"], weights["patch_embed.proj.bias"], stride=patch
    )
    grid = x.shape[2:]
    positions = weights["pos_embed"]
    side = int((positions.shape[1] - 1) ** 0.5)
    if grid != (side, side):
        square = positions[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
        square = F.interpolate(square, grid, mode="bicubic", antialias=True).flatten(2).transpose(1, 2)
        positions = torch.cat([positions[:, :1], square], 1)
    x = torch.cat([weights["cls_token"].expand(len(x), 1, -1), x.flatten(2).transpose(1, 2)], 1) + positions
    found = [x]
    for number in range(len({name.split(".")[1] for name in weights if name.startswith("blocks.")})):
        block = f"blocks.{number}"
        qkv = linear(layer_norm(x, weights, f"{block}.norm1"), weights, f"{block}.attn.qkv")
        query, key, value = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in qkv.chunk(3, -1))
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        attended = linear(attended, weights, f"{block}.attn.proj")
        x = x + attended * weights.get(f"{block}.ls1.gamma", torch.ones(()))
        y = F.gelu(linear(layer_norm(x, weights, f"{block}.norm2"), weights, f"{block}.mlp.fc1"))
        x = x + linear(y, weights, f"{block}.mlp.fc2") * weights.get(f"{block}.ls2.gamma", torch.ones(()))
        found.append(x)
    return found, layer_norm(x, weights, "norm")[:, 1:].unflatten(1, grid)
