"""Encodes images at their own sizes into a token cache of mixed sizes (`ibq_jax.data.mixed_cache`), on all devices.

Shapes: an image [H, W, 3] has codes [h, w], and (h, w) is its shape. A batch holds B images of one shape; B is as
large as the budget of tokens allows. Padded pixels would change codes, by global attention and normalization, so
images are never padded; the last batch of each shape in a part is filled up with black images.
"""

import functools
import os
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from ibq_jax.base.errors import UsageError
from ibq_jax.base.parts import write_part
from ibq_jax.base.sharding import batch_sharding, global_batch, replicated
from ibq_jax.data.any_size import size_within
from ibq_jax.data.mixed_cache import MixedImage, part_paths, read_mixed_manifest
from ibq_jax.data.mixed_cache_writer import PartSummary, finish_mixed, settle_shapes, survey, write_part_file
from ibq_jax.data.raw_images import ImageParts, RawImage
from ibq_jax.data.shapes import Shape, aspect_change
from ibq_jax.data.sized_images import AreaBounds, SizedImage, load_ahead
from ibq_jax.data.token_cache import MIXED_VERSION, find_manifest
from ibq_jax.data.token_cache_writer import Check, locked_cache
from ibq_jax.tokenizer.model import TokenizerModel
from ibq_jax.tokenizer.progress import Progress
from ibq_jax.tokenizer.tokenize import check_overwrite, encode_crops, fingerprint, on_local_devices

IN_FLIGHT = 2  # batches on the devices; the next ones are loaded meanwhile

Encode = Callable[[np.ndarray], jax.Array]  # uint8 [B, H, W, 3] -> codes int32 [B, h, w]


@dataclass(frozen=True)
class MixedJob:
    """The images to encode and how.

    Attributes:
        images: the images, in parts.
        min_pixels, max_pixels: bounds of the area that an image is resized to, as in `any_size.size_within`.
        max_shapes: the most shapes, each of which compiles a program.
        batch_tokens: the most tokens in a batch over this process's devices, but at least one image a device.
        num_threads: threads that decode and resize images.
        precision: of all products between images and codes, one of `ibq_jax.base.precision.PRECISIONS`.
    """

    images: ImageParts
    min_pixels: int
    max_pixels: int
    max_shapes: int
    batch_tokens: int
    num_threads: int
    precision: str = "float32"


def tokenize_mixed(
    model: TokenizerModel,
    params: Mapping,
    job: MixedJob,
    folder: Path,
    origin: Mapping,
    *,
    overwrite: bool,
    process_index: int,
    process_count: int,
    check: Check | None = None,
) -> dict | None:
    """Encodes this process's parts into the token cache `folder`, except those that are there already.

    The arguments are those of `tokenize.tokenize`.

    Returns:
        the manifest, if these parts complete the cache; None while other processes write theirs.

    Raises:
        UsageError: bad input, or a precision that this machine lacks, with nothing written; no image can be encoded; or
            a full disk, with whole parts kept.
    """
    check_mixed_job(job)
    check_overwrite(overwrite, process_count, folder)
    model, mesh = on_local_devices(model, job.precision)
    folder, params = Path(folder).resolve(), jax.device_get(params)
    settings = _settings(model, params, job, origin, mesh)
    with locked_cache(folder, settings, overwrite):
        if find_manifest(folder):
            print(f"{folder} is complete already; --overwrite makes it again")
            return read_mixed_manifest(folder)
        own = range(process_index, len(job.images.parts), process_count)
        bounds = AreaBounds(model.downsampling, job.min_pixels, job.max_pixels)
        surveyed = survey(folder, settings, functools.partial(bounds.count_shapes, job.images), own)
        shapes = settle_shapes(folder, surveyed.sizes, job.max_shapes)
        print(f"{sum(surveyed.images):,} images of {len(surveyed.sizes)} sizes get {len(shapes)} shapes")
        batches = ShapedBatches(_encoder(model, params, mesh), job.batch_tokens, mesh.size)
        with ThreadPoolExecutor(job.num_threads) as pool:
            load = functools.partial(load_ahead, bounds=bounds, shapes=shapes, pool=pool, num_threads=job.num_threads)
            _write_parts(own, folder, settings, job.images, surveyed.images, load, batches)
        return finish_mixed(folder, settings, check)


def check_mixed_job(job: MixedJob) -> None:
    """Raises UsageError for numbers that cannot be; needs no tokenizer."""
    size_within(1, 1, 1, job.min_pixels, job.max_pixels)
    if min(job.num_threads, job.max_shapes, job.batch_tokens) < 1:
        raise UsageError(
            f"num_threads={job.num_threads}, max_shapes={job.max_shapes}, batch_tokens={job.batch_tokens}: at least 1"
        )


def _settings(model: TokenizerModel, params: Mapping, job: MixedJob, origin: Mapping, mesh: jax.sharding.Mesh) -> dict:
    """Returns the cache's settings: its manifest without shapes, parts, texts and counts."""
    device = mesh.devices.flat[0]
    return {
        "version": MIXED_VERSION,
        "tokenizer": {"fingerprint": fingerprint(model, params), **origin},
        "images": {
            "source": os.path.abspath(os.path.expanduser(job.images.where)),
            "names": job.images.digest,
            "parts": len(job.images.parts),
        },
        "preprocessing": {
            "min_pixels": job.min_pixels,
            "max_pixels": job.max_pixels,
            "max_shapes": job.max_shapes,
            "pixels_per_code": model.downsampling,
            "resize": "bicubic",
        },
        "precision": model.precision,
        "machine": {"platform": device.platform, "device_kind": device.device_kind},
        "codebook_size": model.codebook_size,
        "dtype": np.min_scalar_type(model.codebook_size - 1).name,
    }


def _encoder(model: TokenizerModel, params: Mapping, mesh: jax.sharding.Mesh) -> Encode:
    params = jax.device_put(params, replicated(mesh))
    encode = jax.jit(encode_crops, static_argnums=0, out_shardings=batch_sharding(mesh))
    return lambda pixels: encode(model, params, global_batch({"pixels": pixels}, mesh)["pixels"])


class ShapedBatches:
    """Puts images into batches by shape and encodes them.

    Args:
        encode: encodes a batch.
        batch_tokens: the most tokens in a batch.
        devices: the number of devices, of which B is a multiple.
    """

    def __init__(self, encode: Encode, batch_tokens: int, devices: int):
        self._encode, self._batch_tokens, self._devices = encode, batch_tokens, devices

    def size(self, shape: Shape) -> int:
        """Returns B for images of a shape."""
        images = self._batch_tokens // (shape[0] * shape[1])
        return max(1, images // self._devices) * self._devices

    def encoded(self, images: Iterable[SizedImage]) -> Iterator[tuple[int, SizedImage, np.ndarray]]:
        """Yields (position, image, codes [h, w]) of every image, batch by batch, so not in order."""
        waiting: dict[Shape, list[tuple[int, SizedImage]]] = defaultdict(list)
        in_flight: deque[tuple[list[tuple[int, SizedImage]], jax.Array]] = deque()

        def start(shape: Shape) -> Iterator[tuple[int, SizedImage, np.ndarray]]:
            group = waiting.pop(shape)
            in_flight.append((group, self._start(shape, group)))
            if len(in_flight) > IN_FLIGHT:
                yield from _finished(*in_flight.popleft())

        for position, image in enumerate(images):
            waiting[image.shape].append((position, image))
            if len(waiting[image.shape]) == self.size(image.shape):
                yield from start(image.shape)
        for shape in sorted(waiting):
            yield from start(shape)
        for batch in in_flight:
            yield from _finished(*batch)

    def _start(self, shape: Shape, group: list[tuple[int, SizedImage]]) -> jax.Array:
        pixels = np.zeros((self.size(shape), *group[0][1].pixels.shape), np.uint8)
        pixels[: len(group)] = np.stack([image.pixels for _, image in group])
        return self._encode(pixels)


def _finished(group: list[tuple[int, SizedImage]], codes: jax.Array) -> Iterator[tuple[int, SizedImage, np.ndarray]]:
    for (position, image), own in zip(group, np.asarray(codes), strict=False):
        yield position, image, own


def _write_parts(
    own: Iterable[int],
    folder: Path,
    settings: Mapping,
    images: ImageParts,
    counts: tuple[int, ...],
    load: Callable[..., Iterator[SizedImage]],
    batches: ShapedBatches,
) -> None:
    """Writes the parts that are neither whole nor being written by another process."""
    paths = part_paths(folder, settings)
    missing = [number for number in own if not paths[number].exists()]
    total, left = (sum(counts[number] for number in numbers) for numbers in (own, missing))
    if left < total:
        print(f"continuing: {total - left:,} of {total:,} images are encoded")
    with Progress(total, total - left) as progress:
        for number in missing:
            part = _Part(images.parts[number].images_with_texts(), load, batches, progress)
            if not write_part(paths[number], functools.partial(part.write, paths[number], np.dtype(settings["dtype"]))):
                progress.add(counts[number], 0)


class _Part:
    """One part while it is encoded."""

    def __init__(
        self,
        raw: Iterator[RawImage],
        load: Callable[..., Iterator[SizedImage]],
        batches: ShapedBatches,
        progress: Progress,
    ):
        self._raw, self._load, self._batches, self._progress = raw, load, batches, progress
        self._summary = PartSummary()

    def write(self, path: Path, dtype: np.dtype, partial: Path) -> None:
        """Encodes the images and writes them to `partial`, in their order."""
        encoded = dict(self._encoded())
        write_part_file(path, partial, (encoded[position] for position in sorted(encoded)), dtype, self._summary)

    def _encoded(self) -> Iterator[tuple[int, MixedImage]]:
        for position, image, codes in self._batches.encoded(self._load(self._raw, skip=self._skip)):
            self._summary.own_size += image.shape == image.own
            change = aspect_change(image.own, image.shape)
            self._summary.aspect_change = max(self._summary.aspect_change, change)
            self._progress.add(1, codes.size)
            yield position, MixedImage(image.name, codes, image.texts)

    def _skip(self, line: str) -> None:
        self._summary.skipped.append(line)
        self._progress.add(1, 0)
