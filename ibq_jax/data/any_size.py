"""Images of any size and aspect ratio: reads one as viewers show it, and resizes it to an area as Emu3.5 does."""

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageOps

from ibq_jax.base.errors import UsageError, one_line
from ibq_jax.data.preprocess import FORMATS, UnreadableImage, check_aspect, to_rgb

MIN_PIXELS, MAX_PIXELS = 256**2, 1024**2
QUARTER_TURNS = (5, 6, 7, 8)  # EXIF orientations that exchange width and height
WITHOUT_RANGE = ("I", "F")  # Pillow's modes of 32-bit numbers, which convert("RGB") would clip at 255


def read_upright(source: Image.Image | str | os.PathLike) -> Image.Image:
    """Returns an image, or the one in a JPEG, PNG, WebP or BMP file, in RGB and turned as its EXIF orientation says.

    Modes are converted as by `ibq_jax.data.preprocess.to_rgb`; of an animation this is the frame that it stands at,
    in a file the first.

    Raises:
        UsageError: no such file, broken or unknown bytes, too many pixels, one side over 100 times as long as the
            other, or 32-bit pixels, whose range is not known.
    """
    if isinstance(source, Image.Image):
        return _or_usage_error("the image", _upright, source)
    try:
        encoded = Path(source).read_bytes()
    except OSError as error:
        raise UsageError(f"{source}: {one_line(error)}") from error
    return _or_usage_error(str(source), decode_upright, encoded)


def _or_usage_error(where: str, read: Callable[[Any], Image.Image], source: object) -> Image.Image:
    try:
        return read(source)
    except Exception as error:  # Pillow's parsers may raise anything
        raise UsageError(f"{where}: {one_line(error)}") from error


def decode_upright(encoded: bytes) -> Image.Image:
    """Returns the image of a file's bytes as `read_upright` does. Raises UnreadableImage if that cannot be read."""
    try:
        with Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
            return _upright(image)
    except UnreadableImage:
        raise
    except Image.UnidentifiedImageError as error:
        raise UnreadableImage(f"no image of a known format ({', '.join(FORMATS)})") from error
    except Exception as error:  # Pillow's parsers may raise anything
        raise UnreadableImage(one_line(error)) from error


def stated_size(file: BinaryIO) -> tuple[int, int]:
    """Returns (width, height) of an upright image as the head of its file states them, without decoding pixels.

    Raises whatever Pillow's parsers raise for a head that they cannot read.
    """
    with Image.open(file, formats=FORMATS) as image:
        turned = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1) in QUARTER_TURNS  # PNG's own would decode
        return (image.height, image.width) if turned else image.size


def _upright(image: Image.Image) -> Image.Image:
    check_aspect(image)
    if image.mode in WITHOUT_RANGE:
        raise UnreadableImage(f"pixels of mode {image.mode} have no known range; convert the image to RGB")
    return to_rgb(ImageOps.exif_transpose(image))


def size_within(width: int, height: int, multiple: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Returns (width, height) that an image is resized to: near its aspect ratio, both multiples of `multiple`.

    The area is that of the image, or the nearer one of the bounds. Each side is then rounded to the nearest multiple,
    so that the area may pass a bound by half a multiple a side. With both bounds equal to an area, this is what
    Emu3.5's processor does for it.

    Raises:
        UsageError: bounds that are not positive or contradict each other, or a side that would be rounded to zero.
    """
    if not 0 < min_pixels <= max_pixels:
        raise UsageError(f"min_pixels={min_pixels} and max_pixels={max_pixels}: 0 < min_pixels <= max_pixels is needed")
    aspect = width / height
    area = min(max(width * height, min_pixels), max_pixels)
    rows = int((area / aspect) ** 0.5)
    columns = int(rows * aspect)
    size = tuple((side + multiple // 2) // multiple * multiple for side in (columns, rows))
    if 0 in size:
        raise UsageError(
            f"an image of {width}x{height} pixels has no side of {multiple} pixels left at an area of {area:,}; "
            "raise min_pixels or crop it"
        )
    return size[0], size[1]


def resize_within(image: Image.Image, multiple: int, min_pixels: int, max_pixels: int) -> np.ndarray:
    """Resizes an RGB image bicubically to `size_within` its area: uint8 [H, W, 3]."""
    return resize_to(image, size_within(*image.size, multiple, min_pixels, max_pixels))


def resize_to(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """Resizes an RGB image bicubically to (width, height): uint8 [height, width, 3]."""
    return np.asarray(image.resize(size, Image.Resampling.BICUBIC))
