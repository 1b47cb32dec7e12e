"""Turns encoded bytes into a square uint8 crop: decodes, resizes the shorter side, crops.

Images are uint8 RGB [H, W, 3]; scaling to [-1, 1] happens on the device. A tokenizer is trained and evaluated without
flips, as in arXiv 2412.02692; flips are among the views (named crops) whose codes a token cache stores.
"""

import io
from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, UnidentifiedImageError

from ibq_jax.base.errors import one_line

FORMATS = ("JPEG", "PNG", "WEBP", "BMP")  # Pillow knows dozens; for PostScript it would start Ghostscript
Resize = Literal["bilinear", "plain", "bicubic", "box_bicubic"]  # see `resize_shorter_side`
MAX_ASPECT = 100  # ratio of the sides: a thin image of a few bytes, resized by its shorter side, needs gigabytes


class UnreadableImage(ValueError):
    """An error for bytes that are not a complete image of a known format, or are too large; the message says why."""


def decode_image(encoded: bytes) -> np.ndarray:
    """Decodes a JPEG, PNG, WebP or BMP file completely -> uint8 RGB [H, W, 3].

    Transparent pixels become white, 16-bit grey is scaled to 8 bits, CMYK is converted, and of an animation the first
    frame is taken. EXIF orientation is not applied, as in the ImageNet pipelines behind the published numbers.

    Raises:
        UnreadableImage: broken or unknown bytes, more pixels than Pillow's guard against decompression bombs allows, or
            one side over 100 times as long as the other.
    """
    try:
        with Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
            check_aspect(image)
            return np.asarray(to_rgb(image))
    except UnreadableImage:
        raise
    except UnidentifiedImageError as error:
        raise UnreadableImage("no image of a known format") from error
    except Exception as error:  # Pillow's parsers may raise anything
        raise UnreadableImage(one_line(error)) from error


def check_aspect(image: Image.Image) -> None:
    """Raises UnreadableImage for an image that is far longer one way than the other."""
    if max(image.size) > MAX_ASPECT * min(image.size):
        raise UnreadableImage(f"{image.width}x{image.height} pixels, one side over {MAX_ASPECT} times the other")


def to_float(images: jax.Array) -> jax.Array:
    """Converts uint8 images in [0, 255] to float32 in [-1, 1]; floats are returned unchanged."""
    return images.astype(jnp.float32) / 127.5 - 1.0 if images.dtype == jnp.uint8 else images


def to_uint8(images: jax.Array) -> jax.Array:
    """Converts float images in [-1, 1] to uint8 in [0, 255], rounded to nearest; values outside are clipped."""
    return jnp.round((jnp.clip(images, -1.0, 1.0) + 1.0) * 127.5).astype(jnp.uint8)


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts an image to RGB: transparent pixels become white, 16-bit grey is scaled to 8 bits."""
    if image.mode.startswith("I;16"):  # convert() would clip it at 255
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def resize_shorter_side(image: np.ndarray, size: int, method: Resize = "bilinear") -> np.ndarray:
    """Resizes an image [H, W, 3] to a shorter side of `size` pixels.

    Args:
        image: uint8.
        size: pixels of the shorter side.
        method: "bilinear", Pillow's, whose filter widens with the reduction; "plain", bilinear without that, so that
            every output pixel mixes its four nearest input pixels at any reduction, as in OpenCV and in the evaluation
            behind the published IBQ numbers; "bicubic", Pillow's, as torchvision's Resize asks for it, which rounds
            the longer side down; "box_bicubic", by averages of 2x2 pixels as long as the shorter side stays at least
            `size`, then bicubic, as in guided-diffusion and LlamaGen. Except for "bicubic" the longer side is rounded.
    """
    if method == "box_bicubic":
        image = _halved(image, size)
    height, width = image.shape[:2]
    shorter = min(height, width)
    if shorter == size:
        return image
    if method == "bicubic":
        target = (height * size // shorter, width * size // shorter)
    elif method == "box_bicubic":
        target = (round(height * (size / shorter)), round(width * (size / shorter)))
    else:
        target = (round(height * size / shorter), round(width * size / shorter))
    if method == "plain":
        return _resize_plain(image, *target)
    smooth = Image.Resampling.BILINEAR if method == "bilinear" else Image.Resampling.BICUBIC
    return np.asarray(Image.fromarray(image).resize(target[::-1], smooth))


def _halved(image: np.ndarray, size: int) -> np.ndarray:
    """Halves an image [H, W, 3] by averages until its shorter side is less than twice `size`."""
    halved = Image.fromarray(image)
    while min(halved.size) >= 2 * size:
        halved = halved.resize((halved.width // 2, halved.height // 2), Image.Resampling.BOX)
    return np.asarray(halved)


def _resize_plain(image: np.ndarray, height: int, width: int) -> np.ndarray:
    top, bottom, down = _neighbours(image.shape[0], height)
    left, right, across = _neighbours(image.shape[1], width)
    across = across[None, :, None]
    down = down[:, None, None]
    rows = image[top] * (1 - down) + image[bottom] * down
    return np.rint(rows[:, left] * (1 - across) + rows[:, right] * across).astype(np.uint8)


def _neighbours(source: int, target: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the two input positions around each output pixel's centre and the second's weight; edges repeat."""
    centre = np.clip((np.arange(target, dtype=np.float32) + 0.5) * (source / target) - 0.5, 0, source - 1)
    first = np.floor(centre).astype(np.int64)
    return first, np.minimum(first + 1, source - 1), (centre - first).astype(np.float32)


def centre_crop(image: np.ndarray, size: int) -> np.ndarray:
    """Returns the middle [size, size, 3] of [H, W, 3]; if the margins differ, the bottom or right one is larger."""
    top, left = ((side - size) // 2 for side in image.shape[:2])
    return image[top : top + size, left : left + size]


def random_crop(image: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """Returns a [size, size, 3] window of [H, W, 3], every position equally likely."""
    top, left = (int(rng.integers(side - size, endpoint=True)) for side in image.shape[:2])
    return image[top : top + size, left : left + size]


def views(image: np.ndarray, names: Sequence[str], size: int) -> np.ndarray:
    """Returns an image's views with these names (keys of VIEWS), in order: [H, W, 3] -> uint8 [V, size, size, 3]."""
    return np.stack([crop for name in names for crop in VIEWS[name](image, size)])


def _ten_crop(image: np.ndarray, size: int) -> list[np.ndarray]:
    """Returns the centre and the four corners, then their mirror images."""
    bottom, right = (side - size for side in image.shape[:2])
    corners = [image[top : top + size, left : left + size] for top in (0, bottom) for left in (0, right)]
    five = [centre_crop(image, size), *corners]
    return five + [_mirrored(crop) for crop in five]


def _mirrored(image: np.ndarray) -> np.ndarray:
    return image[:, ::-1]


# Named crops of an image: (image [H, W, 3], size) -> a list of [size, size, 3].
VIEWS: dict[str, Callable[[np.ndarray, int], list[np.ndarray]]] = {
    "centre": lambda image, size: [centre_crop(image, size)],
    "flip": lambda image, size: [_mirrored(centre_crop(image, size))],
    "ten_crop": _ten_crop,
}
