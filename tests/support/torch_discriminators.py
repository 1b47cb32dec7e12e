"""The discriminators written again in PyTorch, for float64 values and gradients; PyTorch's layout NCHW inside.

Parameters are trees as the package has them, with tensors in place of arrays; images are [B, H, W, 3].
"""

import jax
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


def tensors(tree, requires_grad: bool = False):
    """Returns a tree of arrays as float64 tensors; batch norms' counters stay out of gradients."""
    return jax.tree.map(lambda leaf: torch.tensor(np.asarray(leaf, np.float64), requires_grad=requires_grad), tree)


def gradients(tree):
    return jax.tree.map(lambda leaf: leaf.grad.numpy(), tree, is_leaf=lambda leaf: isinstance(leaf, Tensor))


def conv(x: Tensor, layer: dict, stride: int = 1, padding: int = 0) -> Tensor:
    return F.conv2d(x, layer["kernel"].permute(3, 2, 0, 1).contiguous(), layer.get("bias"), stride, padding)


def batch_norm(x: Tensor, layer: dict, group: int) -> Tensor:
    parts = [F.batch_norm(part, None, None, layer["scale"], layer["bias"], True) for part in x.split(group or len(x))]
    return torch.cat(parts)


def patch(params: dict, images: Tensor, group: int) -> Tensor:
    """PatchGAN with one layer that halves the resolution."""
    x = F.leaky_relu(conv(images.permute(0, 3, 1, 2), params["conv_0"], 2, 1), 0.2)
    x = F.leaky_relu(batch_norm(conv(x, params["conv_1"], 1, 1), params["norm_1"], group), 0.2)
    return conv(x, params["conv_2"], 1, 1).permute(0, 2, 3, 1)


def downsampled(x: Tensor, padding: int) -> Tensor:
    """The blur of StyleGAN2's upfirdn2d, by a depthwise convolution with the square filter."""
    line = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=x.dtype)
    square = torch.outer(line, line) / 64
    return F.conv2d(x, square.expand(x.shape[1], 1, 4, 4), padding=padding, groups=x.shape[1])


def stylegan(params: dict, images: Tensor, group: int) -> Tensor:
    x = F.leaky_relu(conv(images.permute(0, 3, 1, 2), params["conv_in"]), 0.2)
    for number in range(1, sum(name.startswith("halving") for name in params) + 1):
        block = params[f"halving_{number}"]
        y = F.leaky_relu(conv(x, block["conv1"], padding=1), 0.2)
        y = F.leaky_relu(conv(downsampled(y, 2), block["conv2"], 2), 0.2)
        x = (y + conv(downsampled(x, 1), block["shortcut"], 2)) / 2**0.5
    b, c, h, w = x.shape
    groups = x.reshape(-1, group or b, c, h, w)
    variance = ((groups - groups.mean(1, keepdim=True)) ** 2).mean(1)
    deviation = (variance + 1e-8).sqrt().mean((1, 2, 3)).repeat_interleave(group or b)
    x = torch.cat([x, deviation[:, None, None, None].expand(b, 1, h, w)], 1)
    x = F.leaky_relu(conv(x, params["conv_out"], padding=1), 0.2)
    x = F.leaky_relu(conv(x, params["whole"]), 0.2)
    return conv(x, params["logit"]).permute(0, 2, 3, 1)


def feature_heads(params: dict, maps: list[Tensor], group: int) -> Tensor:
    """Heads on hidden maps [B, h, w, C], of which the first is the finest."""
    logits = []
    for number, hidden in enumerate(maps):
        head, x = params[f"head_{number}"], hidden.permute(0, 3, 1, 2)
        x = F.leaky_relu(batch_norm(conv(x, head["conv_0"]), head["norm_0"], group), 0.2)
        x = (x + F.leaky_relu(batch_norm(conv(x, head["conv_1"], padding=1), head["norm_1"], group), 0.2)) / 2**0.5
        logits.append(F.interpolate(conv(x, head["conv_2"]), maps[0].shape[1:3], mode="nearest-exact"))
    return torch.cat(logits, 1).permute(0, 2, 3, 1)


class TokenHead(torch.nn.Module):
    """StyleGAN-T's head on the tokens of a vision transformer, [B, C, L] -> [B, 1, L], of PyTorch's own layers.

    `params` and `vectors` are those of one of the package's heads. Biases, which that lacks, are random.
    """

    def __init__(self, params: dict, vectors: dict, group: int):
        super().__init__()
        self.group, layers = group, []
        for number, length in enumerate((1, 9, 1)):
            kernel = tensors(params[f"conv_{number}"]["kernel"])[0].permute(2, 1, 0).contiguous()
            layer = torch.nn.Conv1d(*kernel.shape[1::-1], length, padding=length // 2, padding_mode="circular").double()
            layer = torch.nn.utils.spectral_norm(layer, eps=1e-12)
            with torch.no_grad():
                layer.weight_orig.copy_(kernel)
                layer.weight_u.copy_(tensors(vectors[f"conv_{number}"]["kernel"]))
                if number == 2:
                    layer.bias.copy_(tensors(params["conv_2"]["bias"]))
            layers.append(layer)
        self.convs = torch.nn.ModuleList(layers)
        norms = tensors([params[f"norm_{number}"] for number in range(2)], requires_grad=True)
        self.scales, self.biases = ([norm[name] for norm in norms] for name in ("scale", "bias"))

    def block(self, x: Tensor, number: int) -> Tensor:
        grouped = self.convs[number](x).unflatten(0, (-1, self.group))
        mean, variance = grouped.mean((1, 3), keepdim=True), grouped.var((1, 3), keepdim=True, unbiased=False)
        normed = ((grouped - mean) / (variance + 1e-5).sqrt()).flatten(0, 1)
        return F.leaky_relu(normed * self.scales[number][:, None] + self.biases[number][:, None], 0.2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(x, 0)
        return self.convs[2]((x + self.block(x, 1)) / 2**0.5)

    def gradients(self) -> dict:
        """Returns the gradients as a tree of the package's head."""
        found = {
            f"conv_{number}": {"kernel": conv.weight_orig.grad.permute(2, 1, 0)[None].numpy()}
            for number, conv in enumerate(self.convs)
        }
        found["conv_2"]["bias"] = self.convs[2].bias.grad.numpy()
        for number in range(2):
            layer = {"scale": self.scales[number], "bias": self.biases[number]}
            found[f"norm_{number}"] = {name: leaf.grad.numpy() for name, leaf in layer.items()}
        return found


def discriminator_loss(name: str, real: Tensor, fake: Tensor) -> Tensor:
    one, zero = torch.ones_like(real), torch.zeros_like(fake)
    return {
        "hinge": lambda: (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2,
        "non_saturating": lambda: (
            (F.binary_cross_entropy_with_logits(real, one) + F.binary_cross_entropy_with_logits(fake, zero)) / 2
        ),
        "lsgan": lambda: (F.mse_loss(real, one) + F.mse_loss(fake, zero)) / 2,
    }[name]()


def adversarial_loss(name: str, fake: Tensor) -> Tensor:
    return {
        "hinge": lambda: -fake.mean(),
        "non_saturating": lambda: F.binary_cross_entropy_with_logits(
            fake.mean((1, 2, 3)), torch.ones(len(fake), dtype=fake.dtype)
        ),
        "lsgan": lambda: F.mse_loss(fake, torch.ones_like(fake)) / 2,
    }[name]()


def r1(logits: Tensor, images: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(logits.mean((1, 2, 3)).sum(), images, create_graph=True)
    return gradient.square().sum((1, 2, 3)).mean()


def augmented(images: Tensor, draws: dict[str, np.ndarray]) -> Tensor:
    """DiffAugment's three policies as its authors write them, by shifts and loops over images."""
    results = []
    for number, image in enumerate(images):
        at = {name: float(values[number]) for name, values in draws.items()}
        height, width = image.shape[:2]
        x = image + (at["brightness"] - 0.5)
        gray = x.mean(2, keepdim=True)
        x = (x - gray) * (at["saturation"] * 2) + gray
        x = (x - x.mean()) * (at["contrast"] + 0.5) + x.mean()
        moved = torch.zeros_like(x)
        down, across = (
            int(np.floor(at[name] * (2 * most + 1))) - most
            for name, most in (("down", int(height / 8 + 0.5)), ("across", int(width / 8 + 0.5)))
        )
        for row in range(height):
            for column in range(width):
                if 0 <= row + down < height and 0 <= column + across < width:
                    moved[row, column] = x[row + down, column + across]
        mask = torch.ones(height, width, 1, dtype=x.dtype)
        sides = [int(side / 2 + 0.5) for side in (height, width)]
        first = [
            int(np.floor(at[name] * (side + 1 - length % 2))) - length // 2
            for name, side, length in zip(("row", "column"), (height, width), sides, strict=True)
        ]
        mask[max(0, first[0]) : first[0] + sides[0], max(0, first[1]) : first[1] + sides[1]] = 0
        results.append(moved * mask)
    return torch.stack(results)
