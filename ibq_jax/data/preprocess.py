"""From encoded bytes to a square uint8 crop: decode, resize the shorter side, crop.

Shapes: H, W of an image; S the side of the crop. Images are uint8 RGB [H, W, 3]; [S, S, 3] once cropped.
Scaling to [-1, 1] happens on the device. A tokenizer is trained and evaluated without flips, as in arXiv 2412.02692;
they are among the views (named crops) that its codes are stored of.
"""

import io
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, UnidentifiedImageError

from ibq_jax.base.errors import one_line

FORMATS = ("JPEG", "PNG", "WEBP", "BMP")  # Pillow knows dozens; for one of them, PostScript, it would start Ghostscript
MAX_ASPECT = 100  # of the sides: resized by its shorter one, a thin image of a few bytes would take gigabytes


class UnreadableImage(ValueError):
    """Bytes that are no whole image of a known format, or one too large to decode safely; the message says why."""


def decode_image(encoded: bytes) -> np.ndarray:
    """Decodes a JPEG, PNG, WebP or BMP file completely -> uint8 RGB [H, W, 3].

    Transparent pixels show white, 16-bit grey is scaled to 8 bits, CMYK is converted, an animation gives its first
    frame. An EXIF orientation is not applied: the ImageNet pipelines whose numbers are compared do not apply it either.

    Raises:
        UnreadableImage: broken or foreign bytes, more pixels than Pillow's guard against decompression bombs allows, or
            one side over 100 times as long as the other.
    """
    try:
        with Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
            if max(image.size) > MAX_ASPECT * min(image.size):
                raise UnreadableImage(
                    f"{image.width}x{image.height} pixels, one side over {MAX_ASPECT} times the other"
                )
            return np.asarray(_to_rgb(image))
    except UnreadableImage:
        raise
    except UnidentifiedImageError as error:
        raise UnreadableImage("no image of a known format") from error
    except Exception as error:  # from foreign bytes Pillow's parsers may raise anything
        raise UnreadableImage(one_line(error)) from error


def to_float(images: jax.Array) -> jax.Array:
    """Converts uint8 images in [0, 255] to float32 in [-1, 1]; floats are returned unchanged."""
    return images.astype(jnp.float32) / 127.5 - 1.0 if images.dtype == jnp.uint8 else images


def to_uint8(images: jax.Array) -> jax.Array:
    """Converts float images in [-1, 1] to uint8 in [0, 255], rounded to nearest; values outside are clipped."""
    return jnp.round((jnp.clip(images, -1.0, 1.0) + 1.0) * 127.5).astype(jnp.uint8)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # convert() would clip it at 255
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def resize_shorter_side(image: np.ndarray, size: int, antialias: bool = True) -> np.ndarray:
    """Bilinear resize of [H, W, 3] so that the shorter side is `size` pixels; the longer one is rounded.

    With `antialias` as Pillow does it: the filter widens with the reduction. Without, every output pixel mixes its four
    nearest inputs whatever the reduction, as OpenCV does it and as the published IBQ numbers were computed.
    """
    height, width = image.shape[:2]
    shorter = min(height, width)
    if shorter == size:
        return image
    target = (round(height * size / shorter), round(width * size / shorter))
    if antialias:
        return np.asarray(Image.fromarray(image).resize(target[::-1], Image.Resampling.BILINEAR))
    return _resize_plain(image, *target)


def _resize_plain(image: np.ndarray, height: int, width: int) -> np.ndarray:
    top, bottom, down = _neighbours(image.shape[0], height)
    left, right, across = _neighbours(image.shape[1], width)
    across = across[None, :, None]
    down = down[:, None, None]
    rows = image[top] * (1 - down) + image[bottom] * down
    return np.rint(rows[:, left] * (1 - across) + rows[:, right] * across).astype(np.uint8)


def _neighbours(source: int, target: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The two input positions around each output pixel's centre, and the second one's weight; edges are repeated."""
    centre = np.clip((np.arange(target, dtype=np.float32) + 0.5) * (source / target) - 0.5, 0, source - 1)
    first = np.floor(centre).astype(np.int64)
    return first, np.minimum(first + 1, source - 1), (centre - first).astype(np.float32)


def centre_crop(image: np.ndarray, size: int) -> np.ndarray:
    """The middle [size, size, 3] of [H, W, 3]; an odd remainder leaves the extra row or column at the end."""
    top, left = ((side - size) // 2 for side in image.shape[:2])
    return image[top : top + size, left : left + size]


def random_crop(image: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """A [size, size, 3] window of [H, W, 3], every position equally likely."""
    top, left = (int(rng.integers(side - size, endpoint=True)) for side in image.shape[:2])
    return image[top : top + size, left : left + size]


def views(image: np.ndarray, names: Sequence[str], size: int) -> np.ndarray:
    """The crops of [H, W, 3] that VIEWS has under `names`, one name after another: uint8 [V, size, size, 3]."""
    return np.stack([crop for name in names for crop in VIEWS[name](image, size)])


def _ten_crop(image: np.ndarray, size: int) -> list[np.ndarray]:
    """The centre and the four corners, then their mirror images."""
    bottom, right = (side - size for side in image.shape[:2])
    corners = [image[top : top + size, left : left + size] for top in (0, bottom) for left in (0, right)]
    five = [centre_crop(image, size), *corners]
    return five + [_mirrored(crop) for crop in five]


def _mirrored(image: np.ndarray) -> np.ndarray:
    return image[:, ::-1]


# Crops of an image by name: (image [H, W, 3], size) -> [size, size, 3] each.
VIEWS: dict[str, Callable[[np.ndarray, int], list[np.ndarray]]] = {
    "centre": lambda image, size: [centre_crop(image, size)],
    "flip": lambda image, size: [_mirrored(centre_crop(image, size))],
    "ten_crop": _ten_crop,
}
