"""Decodes images of any size and resizes each to its own shape within an area, or to the nearest of a few shapes.

Shapes: an image [H, W, 3] has [h, w] codes; its shape is (h, w), and H = h * pixels per code.
"""

import functools
import itertools
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from ibq_jax.base.errors import UsageError, printable
from ibq_jax.data.any_size import decode_upright, resize_to, size_within
from ibq_jax.data.preprocess import UnreadableImage
from ibq_jax.data.raw_images import ImageParts, RawImage, Texts
from ibq_jax.data.shapes import Shape, nearest_shape

AHEAD = 4  # images per thread that are read, decoded and resized ahead


@dataclass(frozen=True)
class SizedImage:
    """An image ready to be encoded.

    Attributes:
        name, texts: as in `raw_images.RawImage`.
        pixels: uint8 [H, W, 3].
        shape: (h, w) of these pixels.
        own: the shape that the image's size and the bounds give, which differs if that is none of the shapes.
    """

    name: str
    texts: Texts
    pixels: np.ndarray
    shape: Shape
    own: Shape


@dataclass(frozen=True)
class AreaBounds:
    """The sizes that images are resized to: see `any_size.size_within`."""

    pixels_per_code: int  # along one side
    min_pixels: int
    max_pixels: int

    def own_shape(self, width: int, height: int) -> Shape | None:
        """Returns the shape of an image of width x height pixels; None if it is too thin to have one."""
        try:
            columns, rows = size_within(width, height, self.pixels_per_code, self.min_pixels, self.max_pixels)
        except UsageError:
            return None
        return rows // self.pixels_per_code, columns // self.pixels_per_code

    def count_shapes(self, images: ImageParts, part: int) -> tuple[int, Counter[Shape]]:
        """Returns how many images a part has, and how many are of each own shape; broken and thin ones have none."""
        sizes, shapes = images.size_counts(part), Counter()
        for size, count in sizes.items():
            if size is not None and (shape := self.own_shape(*size)) is not None:
                shapes[shape] += count
        return sizes.total(), shapes

    def load(self, raw: RawImage, shapes: Sequence[Shape]) -> SizedImage:
        """Decodes an image and resizes it to its own shape, or to the nearest of `shapes` if that is none of them.

        Raises UnreadableImage for a broken, odd or too thin image.
        """
        if isinstance(raw.encoded, UnreadableImage):
            raise raw.encoded
        image = decode_upright(raw.encoded)
        own = self.own_shape(*image.size)
        if own is None:
            raise UnreadableImage(
                f"{image.width}x{image.height} pixels, too thin for {self.pixels_per_code} pixels a code"
            )
        shape = nearest_shape(own, shapes)
        rows, columns = (side * self.pixels_per_code for side in shape)
        return SizedImage(raw.name, raw.texts, resize_to(image, (columns, rows)), shape, own)


def load_ahead(
    images: Iterator[RawImage],
    bounds: AreaBounds,
    shapes: Sequence[Shape],
    pool: ThreadPoolExecutor,
    num_threads: int,
    skip: Callable[[str], None],
) -> Iterator[SizedImage]:
    """Yields the readable images in order, loaded ahead in threads; of the others, tells `skip` "name: reason"."""
    load = functools.partial(bounds.load, shapes=shapes)
    pending: deque[tuple[str, Future[SizedImage]]] = deque()
    while True:
        for raw in itertools.islice(images, AHEAD * num_threads - len(pending)):
            pending.append((raw.name, pool.submit(load, raw)))
        if not pending:
            return
        name, future = pending.popleft()
        if (error := future.exception()) is None:
            yield future.result()
        elif isinstance(error, UnreadableImage):
            skip(printable(f"{name}: {error}"))
        else:
            raise error
