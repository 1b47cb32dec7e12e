"""Protocols of evaluation, as data: what must be the same in two measurements before their numbers can be compared.

`seed_voken`  as TencentARC/SEED-Voken's evaluation_image.py measures the published tokenizers
`adm`         as OpenAI's guided-diffusion evaluates samples; the one that the published generators are measured by
`clean`       nothing lost on the way (arXiv 2104.11222): antialiased resizing, rounding to nearest; for one's own runs
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from ibq_jax.base.errors import UsageError
from ibq_jax.evaluate.image_metrics import truncate_to_uint8
from ibq_jax.pretrained.inception import SIDE
from ibq_jax.tokenizer.step import to_float, to_uint8

# What the released evaluation makes of an original's grey levels: scaled to [-1, 1] and back, fractions cut off.
TRUNCATED = np.asarray(((np.arange(256) / 127.5 - 1.0).astype(np.float32) + 1) / 2 * np.float32(255.0)).astype(np.uint8)


@dataclass(frozen=True)
class Protocol:
    """How images become numbers. Of data not used by what is measured, a field says nothing."""

    name: str
    antialias: bool  # in resizing the data's images, before their centre crop
    rounding: Literal["truncate", "nearest"]  # to uint8, before PSNR and SSIM
    features_of: Literal["float", "uint8"]  # what a feature net sees of reconstructions
    resizing: Literal["bilinear", "corner", "bicubic"]  # of pictures to Inception's 299: see `for_inception`
    batch: int  # images whose PSNR and SSIM are averaged first, before the mean over batches
    score_rows: int  # pictures of a group, whose Inception Scores are averaged; 0: one group
    images: int  # how many it takes; 0: the whole split
    side: int  # pixels of an image; 0: any
    reference: str  # in words, what pictures are compared with

    def describe(self) -> str:
        """In words, for whoever reads a number."""
        return ", ".join(
            (
                f"{'antialiased' if self.antialias else 'plain bilinear'} resize and centre crop",
                "fractions of grey levels cut off" if self.rounding == "truncate" else "rounded to uint8",
                "mean over images" if self.batch == 1 else f"mean over batches of {self.batch}",
                f"feature nets see {self.features_of} images, resized {RESIZINGS[self.resizing]}",
                f"against {self.reference}",
            )
        )

    def as_shown(self, originals: jax.Array, reconstructions: jax.Array) -> tuple[jax.Array, jax.Array]:
        """uint8 [B, H, W, 3] and float [-1, 1] -> both as uint8, which PSNR and SSIM are of."""
        if self.rounding == "truncate":
            return jnp.asarray(TRUNCATED)[originals], truncate_to_uint8(reconstructions)
        return originals, to_uint8(reconstructions)

    def as_seen(self, images: jax.Array) -> jax.Array:
        """What a feature net sees of images uint8 or float in [-1, 1]: float32 in [0, 1]."""
        if self.features_of == "uint8" and images.dtype != jnp.uint8:
            images = to_uint8(images)
        return (jnp.clip(to_float(images), -1.0, 1.0) + 1.0) / 2.0

    def mean(self, values: np.ndarray) -> float:
        """Of one number an image [N], in the split's order."""
        starts = np.arange(0, len(values), self.batch)
        sizes = np.minimum(self.batch, len(values) - starts)
        return float(np.mean(np.add.reduceat(np.asarray(values, np.float64), starts) / sizes))

    def marks(self, images: int, available: int, side: int) -> list[str]:
        """Why numbers of so many images, of those that the split has, are not this protocol's; none where they are."""
        asked, marks = self.images or available, []
        if images != asked:
            marks.append(f"not comparable: {images:,} images, the protocol has {asked:,}")
        if self.side not in (0, side):
            marks.append(f"not comparable: images of {side} pixels, the protocol has {self.side}")
        return marks


RESIZINGS = {
    "bilinear": "to 299 bilinearly, pixels between centres (pytorch-fid)",
    "corner": "to 299 bilinearly, pixels from the corner (TensorFlow's graph of 2015)",
    "bicubic": "to 299 bicubically, antialiased (clean-fid)",
}

PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            "seed_voken",
            antialias=False,
            rounding="truncate",
            features_of="float",
            resizing="bilinear",
            batch=4,
            score_rows=0,
            images=50_000,
            side=256,
            reference="the originals",
        ),
        Protocol(
            "adm",
            antialias=True,
            rounding="nearest",
            features_of="uint8",
            resizing="corner",
            batch=1,
            score_rows=5_000,
            images=50_000,
            side=256,
            reference="ADM's reference batch",
        ),
        Protocol(
            "clean",
            antialias=True,
            rounding="nearest",
            features_of="uint8",
            resizing="bicubic",
            batch=1,
            score_rows=0,
            images=0,
            side=0,
            reference="the originals",
        ),
    )
}


def find_protocol(name: str) -> Protocol:
    """Raises UsageError for a name that no protocol has."""
    if name not in PROTOCOLS:
        raise UsageError(f"no protocol is named {name!r}; there are {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]


def for_inception(images: jax.Array, resizing: str) -> jax.Array:
    """Images float [B, H, W, 3] in [0, 1] as `inception.features` takes them, for what a protocol does before it.

    "bilinear" is left to that function. The other two prepare what goes through TensorFlow's graph, which scales grey
    levels by (g - 128) / 128, not by 2 g / 255 - 1 as the PyTorch port does.
    """
    if resizing == "bilinear":
        return images
    if resizing == "bicubic":
        shape = (images.shape[0], SIDE, SIDE, 3)
        resized = jax.image.resize(images, shape, "cubic", antialias=True)
    else:
        resized = _resized_from_corner(images)
    return resized * (255 / 256)


def _resized_from_corner(images: jax.Array) -> jax.Array:
    """Bilinearly, output pixel i at i * size / 299 of the input: half a pixel off, as TensorFlow 1 did it."""
    for axis in (1, 2):
        size = images.shape[axis]
        place = np.arange(SIDE) * (size / SIDE)
        first = np.floor(place).astype(np.int32)
        share = (place - first).astype(np.float32).reshape([-1 if i == axis else 1 for i in range(images.ndim)])
        below, above = (jnp.take(images, np.minimum(first + i, size - 1), axis=axis) for i in (0, 1))
        images = below + (above - below) * share
    return images
