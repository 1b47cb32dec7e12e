"""Random square windows of images, at several scales, stored in place of the images.

A window of scale s covers s * size x s * size pixels of its image and is reduced by the integer s, each pixel the mean
of s x s pixels (Pillow's box filter), so neither aliasing nor interpolation is added.
"""

import dataclasses
import functools
import io
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from ibq_jax.base.errors import UsageError
from ibq_jax.data.preprocess import UnreadableImage, decode_image, random_crop
from ibq_jax.data.sources import Example, ImageCollection, name_hash

SIZES = range(8, 1025)


@dataclass(frozen=True)
class Windows:
    """How images are cut: into `count` windows of `size` x `size` pixels each, at random places.

    A window's scale is one of 1, 2, 4, ... with equal probability, as long as the window covers at most half of the
    image's shorter side; of a smaller image it is 1. The draws depend on the seed and the image's name alone.

    Raises:
        UsageError: `count` is not positive, or `size` is not in 8..1024.
    """

    count: int
    size: int
    seed: int = 0

    def __post_init__(self):
        if self.count < 1:
            raise UsageError(f"--windows={self.count}: give the number of windows of an image, at least 1")
        if self.size not in SIZES:
            raise UsageError(f"--size={self.size}: windows have {SIZES[0]} to {SIZES[-1]} pixels per side")

    def cut(self, examples: Iterable[Example]) -> Iterator[Example]:
        """Yields the windows of every image in turn, with its split and label.

        An image that cannot be decoded or is smaller than a window is yielded once, to be named and skipped.
        """
        for example in examples:
            try:
                image = decode_image(example.read())
            except (OSError, UnreadableImage) as error:
                yield dataclasses.replace(example, read=functools.partial(_fail, error))
                continue
            height, width = image.shape[:2]
            if min(height, width) < self.size:
                error = UnreadableImage(f"{width}x{height} pixels, smaller than a window of {self.size}")
                yield dataclasses.replace(example, read=functools.partial(_fail, error))
                continue
            rng = np.random.default_rng((self.seed, name_hash(example.name)))
            for number in range(self.count):
                window, scale = self._draw(image, rng)
                name = f"{example.name} window {number} at 1:{scale}"
                yield dataclasses.replace(example, name=name, read=functools.partial(_encode, window, self.size))

    def _draw(self, image: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, int]:
        """Returns a window at its full resolution, [s size, s size, 3], and s."""
        fitting = max(1, min(image.shape[:2]) // (2 * self.size))
        scale = 1 << int(rng.integers(fitting.bit_length()))
        return random_crop(image, scale * self.size, rng), scale


def in_windows(collection: ImageCollection, windows: Windows) -> ImageCollection:
    """Returns a collection of windows of the collection's images, each in the split of its image."""
    read_part = functools.partial(_cut_part, windows=windows, read_part=collection.read_part)
    return dataclasses.replace(
        collection,
        description=(
            f"{collection.description} {windows.count} random windows of each, {windows.size} pixels per side, "
            f"at several scales (seed {windows.seed})."
        ),
        examples=lambda: windows.cut(collection.examples()),
        total=None if collection.total is None else collection.total * windows.count,
        read_part=read_part,
    )


def _cut_part(part: Any, windows: Windows, read_part: Callable[[Any], Iterable[Example]]) -> Iterator[Example]:
    return windows.cut(read_part(part))


def _encode(window: np.ndarray, size: int) -> bytes:
    png = io.BytesIO()
    Image.fromarray(window).resize((size, size), Image.Resampling.BOX).save(png, format="PNG")
    return png.getvalue()


def _fail(error: Exception) -> bytes:
    raise error
