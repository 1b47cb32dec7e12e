"""Numbers that the released PyTorch code printed (tests/golden/*.npz), and how close is close enough."""

import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

GOLDEN = Path(__file__).parents[1] / "golden"


def load(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        return dict(arrays)


def tokenizer() -> tuple[dict[str, np.ndarray], dict, dict[str, np.ndarray]]:
    """A small tokenizer: its state dict, its published configuration, and what it makes of one batch."""
    arrays = load("tokenizer")
    state_dict = {name.removeprefix("sd/"): array for name, array in arrays.items() if name.startswith("sd/")}
    return state_dict, json.loads(str(arrays["config"])), arrays


def nhwc(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array.transpose(0, 2, 3, 1))


def assert_close(actual, expected: np.ndarray, tolerance: float = 1e-4) -> None:
    """Equal to within `tolerance` of the expected tensor's largest magnitude."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    error = np.abs(actual - expected).max() / np.abs(expected).max()
    assert error <= tolerance, f"relative error {error:.1e}"


def vgg16() -> Mapping[str, np.ndarray]:
    """The deterministic stand-in for torchvision's VGG16 that the released code's LPIPS ran with."""
    layers = ((0, 64), (2, 64), (5, 128), (7, 128), (10, 256), (12, 256), (14, 256))
    layers += ((17, 512), (19, 512), (21, 512), (24, 512), (26, 512), (28, 512))
    tensors, in_channels = {}, 3
    for i, (index, channels) in enumerate(layers):
        random = np.random.RandomState(1000 + i)
        weight = random.standard_normal((channels, in_channels, 3, 3)).astype(np.float32)
        tensors[f"features.{index}.weight"] = weight * np.float32(np.sqrt(2 / (9 * in_channels)))
        tensors[f"features.{index}.bias"] = (random.standard_normal(channels) * 0.05).astype(np.float32)
        in_channels = channels
    return tensors


def stand_ins(listing: np.ndarray) -> dict[str, np.ndarray]:
    """The tensors that a public network had when it made golden values, each drawn by a seed from its name; `listing`
    is JSON, [[name, shape, type], ...]."""
    return {name: _stand_in(name, shape) for name, shape, _ in json.loads(str(listing))}


def stand_ins_like(tensors: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Makes such tensors with the names and shapes of those given, whose values are not read."""
    return {name: _stand_in(name, tuple(tensor.shape)) for name, tensor in tensors.items()}


def _stand_in(name: str, shape: Sequence[int]) -> np.ndarray:
    if name.endswith("num_batches_tracked"):
        return np.zeros(shape, np.int64)
    normal = np.random.RandomState(zlib.crc32(name.encode()) & 0x7FFFFFFF).standard_normal(shape)
    if name.endswith("running_var"):
        return (1.0 + 0.1 * np.abs(normal)).astype(np.float32)
    if name.endswith(("running_mean", "bias")):
        return (0.05 * normal).astype(np.float32)
    if len(shape) == 1:
        return (1.0 + 0.1 * normal).astype(np.float32)
    return normal.astype(np.float32) * np.float32(np.sqrt(2.0 / np.prod(shape[1:])))
