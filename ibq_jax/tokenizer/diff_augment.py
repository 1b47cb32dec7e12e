"""Differentiable augmentation of what a discriminator sees (DiffAugment, arXiv 2006.10738, section 3.2), and crops.

Shapes: images [B, H, W, 3] in [-1, 1]; every random number is an array [B] that is drawn before, so that micro-batches
and devices see the numbers of the whole batch.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from ibq_jax.base.errors import UsageError
from ibq_jax.base.precision import FULL

TRANSLATION = 0.125  # of a side, at most
CUTOUT = 0.5  # of a side
DRAWS = {  # augmentation -> its random numbers, uniform in [0, 1)
    "color": ("brightness", "saturation", "contrast"),
    "translation": ("down", "across"),
    "cutout": ("row", "column"),
}


def augmentations(names: str) -> tuple[str, ...]:
    """Returns the augmentations in a list such as "color,translation". Raises UsageError for an unknown one."""
    found = tuple(name.strip() for name in names.split(",") if name.strip())
    for name in found:
        if name not in DRAWS:
            raise UsageError(f"discriminator.augment={names}: there is no {name!r}; there are {', '.join(DRAWS)}")
    return found


def draw(key: jax.Array, names: tuple[str, ...], count: int) -> dict[str, jax.Array]:
    """Returns the random numbers of some augmentations for `count` images, float32 [count] in [0, 1) each."""
    wanted = [number for name in names for number in DRAWS[name]]
    return {
        number: jax.random.uniform(part, (count,))
        for number, part in zip(wanted, jax.random.split(key, max(1, len(wanted))), strict=False)
    }


def augment(images: jax.Array, draws: Mapping[str, jax.Array]) -> jax.Array:
    """Augments images [B, H, W, 3] by the numbers drawn for them; differentiable in the images."""
    if "brightness" in draws:
        images = _recolored(images, draws)
    if "down" in draws:
        images = _translated(images, draws)
    return images * _outside_cutout(images.shape, draws) if "row" in draws else images


def draw_crop(key: jax.Array, probability: float, count: int) -> dict[str, jax.Array]:
    """Returns whether a batch is cropped, and where: one draw, as in VAR's code, repeated for its `count` images."""
    numbers = jax.random.uniform(key, (3,))
    drawn = {"cropped": numbers[0] < probability, "top": numbers[1], "left": numbers[2]}
    return {name: jnp.full((count,), number) for name, number in drawn.items()}


def crop(images: jax.Array, whole: jax.Array, draws: Mapping[str, jax.Array]) -> jax.Array:
    """Returns [B, h, w, 3]: pieces of the images that are drawn to be cropped, and the others as they are in `whole`.

    It is differentiable in both.

    Args:
        images: [B, H, W, 3]. Unless H > h and W > w, none is cropped.
        whole: the same images resized to [B, h, w, 3].
        draws: those of `draw_crop`, [B] each, or none of these; then nothing is cropped.
    """
    sides = tuple(zip(images.shape[1:3], whole.shape[1:3], strict=True))
    if "cropped" not in draws or any(side <= kept for side, kept in sides):
        return whole
    rows, columns = (
        _crop_matrix(draws[name], side, kept) for name, (side, kept) in zip(("top", "left"), sides, strict=True)
    )
    pieces = jnp.einsum("bij,bjwc->biwc", rows, images, precision=FULL)
    pieces = jnp.einsum("bij,bhjc->bhic", columns, pieces, precision=FULL)
    return jnp.where(draws["cropped"][:, None, None, None], pieces, whole)


def _crop_matrix(draws: jax.Array, side: int, kept: int) -> jax.Array:
    """Numbers [B] -> [B, kept, side], whose entry (i, j) is 1 where row i of the piece is row j of the image."""
    first = jnp.floor(draws * (side - kept + 1)).astype(jnp.int32)
    rows, pixels = jnp.arange(kept)[None, :, None], jnp.arange(side)[None, None, :]
    return (rows + first[:, None, None] == pixels).astype(jnp.float32)


def _recolored(images: jax.Array, draws: Mapping[str, jax.Array]) -> jax.Array:
    brightness, saturation, contrast = (draws[name][:, None, None, None] for name in DRAWS["color"])
    images = images + (brightness - 0.5)
    gray = jnp.mean(images, axis=3, keepdims=True)
    images = (images - gray) * (2 * saturation) + gray
    mean = jnp.mean(images, axis=(1, 2, 3), keepdims=True)
    return (images - mean) * (contrast + 0.5) + mean


def _translated(images: jax.Array, draws: Mapping[str, jax.Array]) -> jax.Array:
    """Moves images by whole pixels and fills with zeros: products with matrices of zeros and ones, exact."""
    down, across = (
        _shift_matrix(draws[name], side) for name, side in zip(DRAWS["translation"], images.shape[1:3], strict=True)
    )
    images = jnp.einsum("bij,bjwc->biwc", down, images, precision=FULL)
    return jnp.einsum("bij,bhjc->bhic", across, images, precision=FULL)


def _shift_matrix(draws: jax.Array, side: int) -> jax.Array:
    """Numbers [B] -> [B, side, side], whose entry (i, j) is 1 where row i comes from row j."""
    most = int(side * TRANSLATION + 0.5)
    shift = jnp.floor(draws * (2 * most + 1)).astype(jnp.int32) - most
    rows, columns = jnp.arange(side)[None, :, None], jnp.arange(side)[None, None, :]
    return (rows + shift[:, None, None] == columns).astype(jnp.float32)


def _outside_cutout(shape: tuple[int, ...], draws: Mapping[str, jax.Array]) -> jax.Array:
    """Returns [B, H, W, 1]: 0 in a rectangle of each image, 1 elsewhere."""
    inside = []
    for name, side in zip(DRAWS["cutout"], shape[1:3], strict=True):
        length = int(side * CUTOUT + 0.5)
        first = jnp.floor(draws[name] * (side + 1 - length % 2)).astype(jnp.int32)[:, None] - length // 2
        pixels = jnp.arange(side)[None]
        inside.append((pixels >= first) & (pixels < first + length))
    rows, columns = inside
    return 1.0 - (rows[:, :, None, None] & columns[:, None, :, None]).astype(jnp.float32)
