"""Evaluation protocols as data: everything that two measurements must share before their numbers can be compared.

`seed_voken`  what TencentARC/SEED-Voken's evaluation_image.py does; published tokenizers are measured this way
`adm`         what OpenAI's guided-diffusion does with samples; published generators are measured this way
`clean`       antialiased resizing and rounding to nearest (arXiv 2104.11222); the default for your own runs
`bicubic`     what GEAR (arXiv 2606.32039) does with IBQ's and others' tokenizers: bicubic resizing, no rounding
`llamagen`    what LlamaGen's reconstruction_vq_ddp.py does with its own: halving, then bicubic resizing
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from ibq_jax.base.errors import UsageError
from ibq_jax.data.preprocess import Resize, to_float, to_uint8
from ibq_jax.evaluate.image_metrics import truncate_to_uint8
from ibq_jax.pretrained.inception import SIDE

# Grey level -> grey level: the released evaluation scales originals to [-1, 1] and back in float32, then truncates.
TRUNCATED = np.asarray(((np.arange(256) / 127.5 - 1.0).astype(np.float32) + 1) / 2 * np.float32(255.0)).astype(np.uint8)


@dataclass(frozen=True)
class Protocol:
    """How images become numbers. A field that a measurement does not use has no effect on it."""

    name: str
    resize: Resize  # of the data set's images, before the centre crop: see `resize_shorter_side`
    rounding: Literal["truncate", "nearest", "none"]  # to uint8, before PSNR and SSIM
    net_input: Literal["float", "uint8"]  # the type of reconstructions before they go to a feature net
    resizing: Literal["bilinear", "corner", "bicubic"]  # to Inception's 299 pixels: see `for_inception`
    mean_batch: int  # PSNR and SSIM are averaged over batches of so many images, then over batches
    score_group: int  # images per group for the Inception Score, which is averaged over groups; 0: one group
    num_images: int  # 0: the whole split
    image_size: int  # pixels of a side; 0: any
    reference: str  # what samples or reconstructions are compared with, in words

    def describe(self) -> str:
        """Returns the protocol in one line of words, which is printed and stored with every number."""
        return ", ".join(
            (
                f"{RESIZES[self.resize]} resize and centre crop",
                ROUNDINGS[self.rounding],
                "mean over images" if self.mean_batch == 1 else f"mean over batches of {self.mean_batch}",
                f"feature nets get {self.net_input} images, resized {RESIZINGS[self.resizing]}",
                f"against {self.reference}",
            )
        )

    def to_grey_levels(self, originals: jax.Array, reconstructions: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Converts originals (uint8 [B, H, W, 3]) and reconstructions (float [-1, 1]) to 0..255 for PSNR and SSIM.

        Both are uint8 afterwards; without rounding, reconstructions stay float.
        """
        if self.rounding == "none":
            return originals, (jnp.clip(reconstructions, -1.0, 1.0) + 1.0) * 127.5
        if self.rounding == "truncate":
            return jnp.asarray(TRUNCATED)[originals], truncate_to_uint8(reconstructions)
        return originals, to_uint8(reconstructions)

    def to_net_input(self, images: jax.Array) -> jax.Array:
        """Converts images (uint8, or float in [-1, 1]) to float32 in [0, 1] for a feature net."""
        if self.net_input == "uint8" and images.dtype != jnp.uint8:
            images = to_uint8(images)
        return (jnp.clip(to_float(images), -1.0, 1.0) + 1.0) / 2.0

    def mean(self, values: np.ndarray) -> float:
        """Averages one number per image, [N] in the split's order: over batches of `mean_batch`, then over batches."""
        starts = np.arange(0, len(values), self.mean_batch)
        sizes = np.minimum(self.mean_batch, len(values) - starts)
        return float(np.mean(np.add.reduceat(np.asarray(values, np.float64), starts) / sizes))

    def caveats(self, num_images: int, available: int, image_size: int) -> list[str]:
        """Returns the reasons why a measurement does not follow this protocol; empty if it does.

        Args:
            num_images: how many images were measured.
            available: how many the split has.
            image_size: pixels of a side.
        """
        expected, caveats = self.num_images or available, []
        if num_images != expected:
            caveats.append(f"not comparable: {num_images:,} images, the protocol has {expected:,}")
        if self.image_size not in (0, image_size):
            caveats.append(f"not comparable: images of {image_size} pixels, the protocol has {self.image_size}")
        return caveats


RESIZES = {
    "plain": "plain bilinear",
    "bilinear": "antialiased",
    "bicubic": "antialiased bicubic",
    "box_bicubic": "halving by averages, then bicubic",
}
ROUNDINGS = {
    "truncate": "fractions of grey levels truncated",
    "nearest": "rounded to uint8",
    "none": "not rounded to uint8",
}
RESIZINGS = {
    "bilinear": "to 299 bilinearly, aligned at pixel centres (pytorch-fid)",
    "corner": "to 299 bilinearly, aligned at the corner (TensorFlow's graph of 2015)",
    "bicubic": "to 299 bicubically, antialiased (clean-fid)",
}

PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            "seed_voken",
            resize="plain",
            rounding="truncate",
            net_input="float",
            resizing="bilinear",
            mean_batch=4,
            score_group=0,
            num_images=50_000,
            image_size=256,
            reference="the originals",
        ),
        Protocol(
            "adm",
            resize="bilinear",
            rounding="nearest",
            net_input="uint8",
            resizing="corner",
            mean_batch=1,
            score_group=5_000,
            num_images=50_000,
            image_size=256,
            reference="ADM's reference batch",
        ),
        Protocol(
            "clean",
            resize="bilinear",
            rounding="nearest",
            net_input="uint8",
            resizing="bicubic",
            mean_batch=1,
            score_group=0,
            num_images=0,
            image_size=0,
            reference="the originals",
        ),
        Protocol(
            "bicubic",
            resize="bicubic",
            rounding="none",
            net_input="float",
            resizing="bilinear",
            mean_batch=1,
            score_group=0,
            num_images=50_000,
            image_size=256,
            reference="the originals",
        ),
        Protocol(
            "llamagen",
            resize="box_bicubic",
            rounding="nearest",
            net_input="uint8",
            resizing="corner",
            mean_batch=1,
            score_group=5_000,
            num_images=50_000,
            image_size=256,
            reference="the originals",
        ),
    )
}


def find_protocol(name: str) -> Protocol:
    """Returns the protocol called `name`. Raises UsageError if there is none."""
    if name not in PROTOCOLS:
        raise UsageError(f"no protocol is named {name!r}; there are {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]


def for_inception(images: jax.Array, resizing: str) -> jax.Array:
    """Prepares images (float [B, H, W, 3] in [0, 1]) for `inception.features`, as a protocol's `resizing` asks.

    "bilinear" is left to `inception.features`. The other two imitate the input of TensorFlow's graph, which maps grey
    level g to (g - 128) / 128; the PyTorch port maps it to 2 g / 255 - 1.
    """
    if resizing == "bilinear":
        return images
    if resizing == "bicubic":
        shape = (images.shape[0], SIDE, SIDE, 3)
        resized = jax.image.resize(images, shape, "cubic", antialias=True)
    else:
        resized = _resize_from_corner(images)
    return resized * (255 / 256)


def _resize_from_corner(images: jax.Array) -> jax.Array:
    """Resizes bilinearly with output pixel i at i * size / 299 of the input: half a pixel off, as in TensorFlow 1."""
    for axis in (1, 2):
        size = images.shape[axis]
        position = np.arange(SIDE) * (size / SIDE)
        first = np.floor(position).astype(np.int32)
        fraction = (position - first).astype(np.float32).reshape([-1 if i == axis else 1 for i in range(images.ndim)])
        before, after = (jnp.take(images, np.minimum(first + i, size - 1), axis=axis) for i in (0, 1))
        images = before + (after - before) * fraction
    return images
