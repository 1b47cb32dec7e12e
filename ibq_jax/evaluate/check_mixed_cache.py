"""Checks a token cache of mixed sizes once its parts are whole, as `check_cache` does with one of a single grid.

Shapes: an image [H, W, 3] has codes [h, w], and (h, w) is its shape.
"""

import contextlib
import functools
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import jax
import numpy as np
from PIL import Image, ImageOps

from ibq_jax.data.mixed_cache import decode_record, open_parts, part_paths
from ibq_jax.data.preprocess import UnreadableImage
from ibq_jax.data.raw_images import RawImage
from ibq_jax.data.sized_images import AreaBounds, SizedImage
from ibq_jax.data.token_cache import COMPARED, SHEET
from ibq_jax.evaluate.check_cache import (
    SAMPLED_IMAGES,
    SHOWN_IMAGES,
    decode_to_uint8,
    encode,
    evenly_spaced,
    sheet,
)
from ibq_jax.tokenizer.model import TokenizerModel
from ibq_jax.tokenizer.tokenize_mixed import MixedJob

SAMPLED_PARTS = 8  # of each, the first images
SAMPLED_SHAPES = 3  # the most frequent ones, because each compiles two programs
SHOWN_PIXELS = 256  # the longest side on the sheet


def check_mixed_cache(folder: Path, manifest: Mapping, model: TokenizerModel, params: Mapping, job: MixedJob) -> dict:
    """Compares a sample of the cache's codes with full float32, and writes the sheet of decoded images.

    The sample is encoded again one by one on a single device.

    Args:
        folder: the cache, whose parts are whole.
        manifest: its manifest.
        model: the tokenizer.
        params: its parameters, as for `tokenize_mixed`.
        job: what was encoded.

    Returns:
        the manifest's fields about it: {"compared_with_float32": {"sampled_codes", "differing_codes"}}.

    Raises:
        UsageError: a part is damaged.
    """
    model = model.clone(mesh=None)
    params = jax.device_put(jax.device_get(params), jax.local_devices()[0])
    sampled = _of_few_shapes(list(_sample(folder, manifest, job, model.downsampling)))
    in_float32, as_encoded = model.for_encoding("float32"), model.for_encoding(job.precision)
    differing = 0
    for pixels, codes in sampled:
        differing += np.count_nonzero(np.asarray(encode(in_float32, params, pixels[None])[0]) != codes)
    shown = [sampled[index] for index in evenly_spaced(len(sampled), SHOWN_IMAGES)]
    decoded = [np.asarray(decode_to_uint8(as_encoded, params, codes[None].astype(np.int32))[0]) for _, codes in shown]
    Image.fromarray(sheet(_squares([pixels for pixels, _ in shown]), _squares(decoded))).save(folder / SHEET, "PNG")
    sampled_codes = sum(codes.size for _, codes in sampled)
    return {COMPARED: {"sampled_codes": sampled_codes, "differing_codes": int(differing)}}


def _sample(
    folder: Path, manifest: Mapping, job: MixedJob, pixels_per_code: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields the first images of some parts: their pixels as they were encoded, and their stored codes [h, w]."""
    counts, dtype = manifest["parts"], np.dtype(manifest["dtype"]).newbyteorder("<")
    records = open_parts(folder, part_paths(folder, manifest), counts)
    ends = np.cumsum(counts)
    filled = [number for number, count in enumerate(counts) if count]
    numbers = [filled[index] for index in evenly_spaced(len(filled), SAMPLED_PARTS)]
    bounds = AreaBounds(pixels_per_code, job.min_pixels, job.max_pixels)
    load = functools.partial(bounds.load, shapes=[tuple(shape) for shape in manifest["shapes"]])
    for number in numbers:
        images = _readable(job.images.parts[number].images_with_texts(), load)
        indices = range(ends[number] - counts[number], ends[number])
        for index, image in itertools.islice(zip(indices, images, strict=False), SAMPLED_IMAGES // len(numbers)):
            stored = decode_record(records[index], dtype, manifest["codebook_size"])
            if (stored.name, stored.codes.shape) == (image.name, image.shape):  # else its file was replaced meanwhile
                yield image.pixels, stored.codes


def _readable(images: Iterator[RawImage], load: Callable[[RawImage], SizedImage]) -> Iterator[SizedImage]:
    """Yields the images that can be decoded, which are those that a part has records of."""
    for image in images:
        with contextlib.suppress(UnreadableImage):
            yield load(image)


def _of_few_shapes(sampled: list[tuple[np.ndarray, np.ndarray]]) -> list[tuple[np.ndarray, np.ndarray]]:
    frequent = dict(Counter(codes.shape for _, codes in sampled).most_common(SAMPLED_SHAPES))
    return [(pixels, codes) for pixels, codes in sampled if codes.shape in frequent]


def _squares(images: list[np.ndarray]) -> np.ndarray:
    """Fits images of mixed sizes into white squares of one size: uint8 [N, S, S, 3]."""
    side = min(SHOWN_PIXELS, max(max(pixels.shape) for pixels in images))
    squares = (ImageOps.pad(Image.fromarray(pixels), (side, side), color="white") for pixels in images)
    return np.stack([np.asarray(square) for square in squares])
