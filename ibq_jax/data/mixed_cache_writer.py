"""Writes a token cache of mixed sizes (`ibq_jax.data.mixed_cache`) part by part.

Several processes may share the job, and a kill loses at most the parts that were being written. A part's content
depends on its images and on the shapes alone. The shapes depend on the sizes of all images, so the survey comes first.
"""

import functools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from tqdm import tqdm

from ibq_jax.base.errors import UsageError
from ibq_jax.base.files import atomic_file
from ibq_jax.base.histogram import entropy, perplexity
from ibq_jax.base.json_files import read_json
from ibq_jax.base.parts import join_parts, remove_partials, replace_text, write_json
from ibq_jax.data.mixed_cache import (
    HISTOGRAM,
    SHAPES,
    MixedImage,
    decode_record,
    encode_record,
    open_parts,
    part_paths,
    read_mixed_manifest,
)
from ibq_jax.data.shapes import Shape, choose_shapes
from ibq_jax.data.token_cache import MANIFEST, damaged
from ibq_jax.data.token_cache_writer import Check

SKIPPED_SHOWN = 20  # names of skipped images in the manifest; the parts have all


@dataclass(frozen=True)
class Survey:
    """The images of all parts: their number in each part, and how many are of each size [h, w] in codes."""

    images: tuple[int, ...]
    sizes: Mapping[Shape, int]


@dataclass
class PartSummary:
    """A part's counts, collected while it is written.

    Attributes:
        images: the number of images with codes.
        own_size: how many of them have the shape that their size and the bounds give, as in one-at-a-time encoding.
        aspect_change: the largest change of an aspect ratio by the limit on shapes, as a fraction.
        skipped: "name: reason" of each image without codes.
        texts: the suffixes of all texts.
    """

    images: int = 0
    own_size: int = 0
    aspect_change: float = 0.0
    skipped: list[str] = field(default_factory=list)
    texts: set[str] = field(default_factory=set)


def survey(
    folder: Path, settings: Mapping, sizes_of: Callable[[int], tuple[int, Counter[Shape]]], own: Iterable[int]
) -> Survey:
    """Returns the survey of all parts, taken by several processes together: first of a process's own, then the rest.

    Args:
        folder: the cache's folder.
        settings: its settings.
        sizes_of: returns the number of images in a part, and how many are of each size.
        own: the numbers of this process's parts.
    """
    count = settings["images"]["parts"]
    (folder / "survey").mkdir(exist_ok=True)
    paths = [folder / "survey" / f"{number:05}-of-{count:05}.json" for number in range(count)]
    order = dict.fromkeys([*own, *range(count)])
    for number in tqdm(order, "reading sizes", unit=" parts", disable=None, dynamic_ncols=True):
        with atomic_file(paths[number], wait=True) as partial:
            if partial is not None:
                images, sizes = sizes_of(number)
                rows = [[*size, sizes[size]] for size in sorted(sizes)]
                partial.write_text(json.dumps({"images": images, "sizes": rows}))
    total, images = Counter(), []
    for path in paths:
        try:
            found = read_json(path)
            images.append(int(found["images"]))
            total.update({(int(h), int(w)): int(times) for h, w, times in found["sizes"]})
        except (KeyError, TypeError, ValueError) as error:
            raise damaged(path, error) from error
    return Survey(tuple(images), total)


def settle_shapes(folder: Path, sizes: Mapping[Shape, int], most: int) -> list[Shape]:
    """Returns the cache's shapes: chosen once, by the process that comes first.

    Raises UsageError if there is no image.
    """
    if not sizes:
        raise UsageError(f"{folder}: none of the images states a size that can be encoded")
    with atomic_file(folder / SHAPES, wait=True) as partial:
        if partial is not None:
            write_json(partial, {"shapes": choose_shapes(sizes, most)})
    try:
        return [(int(h), int(w)) for h, w in read_json(folder / SHAPES)["shapes"]]
    except (KeyError, TypeError, ValueError) as error:
        raise damaged(folder / SHAPES, error) from error


def write_part_file(
    path: Path, partial: Path, images: Iterable[MixedImage], dtype: np.dtype, summary: PartSummary
) -> None:
    """Writes a part's records to `partial`, and its summary next to `path`, which appears later."""
    writer = ArrayRecordWriter(str(partial), "group_size:1")
    for image in images:
        writer.write(encode_record(image, dtype))
        summary.images += 1
        summary.texts.update(image.texts)
    writer.close()
    replace_text(path.with_suffix(".json"), json.dumps(vars(summary) | {"texts": sorted(summary.texts)}) + "\n")


def finish_mixed(folder: Path, settings: Mapping, check: Check | None = None) -> dict | None:
    """Counts the codes, checks them and writes the manifest, once all parts are whole.

    Args:
        folder: the cache's folder.
        settings: its settings.
        check: adds to the manifest, which it is given, what it finds out about the codes.

    Returns:
        the manifest; None while a part is missing, which another process writes.

    Raises:
        UsageError: a part is damaged, or no image could be encoded.
    """
    paths = part_paths(folder, settings)
    if not join_parts(paths, folder / MANIFEST, functools.partial(_write_manifest, folder, settings, paths, check)):
        return None
    remove_partials(folder, "*/*")
    return read_mixed_manifest(folder)


def _write_manifest(folder: Path, settings: Mapping, paths: list[Path], check: Check | None, partial: Path) -> None:
    summaries = [_read_summary(path.with_suffix(".json")) for path in paths]
    parts = [summary.images for summary in summaries]
    skipped = [line for summary in summaries for line in summary.skipped]
    if not sum(parts):
        raise UsageError(f"{folder}: none of {len(skipped)} images can be encoded, the first {skipped[0]}")
    histogram = _histogram(folder, settings, paths, parts)
    with atomic_file(folder / HISTOGRAM) as file:
        if file is not None:
            with file.open("wb") as opened:
                np.save(opened, histogram)
    counts = {
        "images": sum(parts),
        "skipped": len(skipped),
        "own_size": sum(summary.own_size for summary in summaries),
        "aspect_change": max(summary.aspect_change for summary in summaries),
        "num_tokens": int(histogram.sum()),
        "used": int(np.count_nonzero(histogram)),
        "perplexity": float(perplexity(histogram)),
        "entropy": float(entropy(histogram)),  # nats
    }
    manifest = {
        **settings,
        "shapes": read_json(folder / SHAPES)["shapes"],
        "parts": parts,
        "texts": sorted(set().union(*(summary.texts for summary in summaries))),
        "skipped": skipped[:SKIPPED_SHOWN],
        "counts": counts,
    }
    write_json(partial, {**manifest, **(check(folder, manifest) if check else {})})


def _read_summary(path: Path) -> PartSummary:
    try:
        summary = PartSummary(**read_json(path))
        summary.texts = set(summary.texts)
        return summary
    except (OSError, TypeError, ValueError) as error:
        raise damaged(path, error) from error


def _histogram(folder: Path, settings: Mapping, paths: list[Path], parts: list[int]) -> np.ndarray:
    """Returns how often each code occurs, int64 [K]."""
    histogram = np.zeros(settings["codebook_size"], np.int64)
    dtype = np.dtype(settings["dtype"]).newbyteorder("<")
    records = open_parts(folder, paths, parts)
    for index in range(sum(parts)):
        try:
            codes = decode_record(records[index], dtype, len(histogram)).codes
        except (RuntimeError, ValueError) as error:  # the former from ArrayRecord
            raise damaged(folder / "images", error) from error
        histogram += np.bincount(codes.reshape(-1), minlength=len(histogram))
    return histogram
