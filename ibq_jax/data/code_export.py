"""Converts a complete token cache, of one grid or of mixed sizes, to files that other projects train on.

OUT/settings.json                   the format, layout, tokenizer and map; written first, and compared by a rerun
OUT/old_to_new.npy                  int32 [K], with compact codes: the new index of each code, -1 if it is left out
OUT/SPLIT-00000-of-00012.SUFFIX     a part of the cache (`code_files.FORMATS`); has this name only once it is whole

The parts are those of the cache, so that several processes can share the work and a killed one continues.
"""

import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ibq_jax.base.config import flatten
from ibq_jax.base.errors import UsageError, one_line, shorten
from ibq_jax.base.files import PARTIAL, atomic_file
from ibq_jax.base.json_files import parse_json, read_json
from ibq_jax.base.parts import SETTINGS, claim_folder, write_part
from ibq_jax.data.batches import NO_LABEL
from ibq_jax.data.code_files import FORMATS, CodedImage, FileSettings
from ibq_jax.data.code_layouts import PLAIN, CodeLayout
from ibq_jax.data.mixed_cache import HISTOGRAM, MixedCache, is_mixed
from ibq_jax.data.raw_images import Texts
from ibq_jax.data.token_cache import damaged, open_token_cache, read_manifest
from ibq_jax.data.token_cache_writer import list_shards

OLD_TO_NEW = "old_to_new.npy"
USED = "used"  # in place of a map: the codes that the cache uses, in order


@dataclass(frozen=True)
class CachePart:
    """A part of a cache: its name, its number of images, and a function that yields them (each crop is one)."""

    name: str
    images: int
    read: Callable[[], Iterator[CodedImage]]


@dataclass(frozen=True)
class CachedCodes:
    """All codes of a complete cache.

    Attributes:
        path: the cache's folder.
        parts: its parts.
        manifest: the cache's manifest.
        codebook_size: K.
        grid: (h, w) of every image; None in a cache of mixed sizes.
        texts: the names of all texts.
        histograms: files of how often each code occurs.
    """

    path: Path
    parts: tuple[CachePart, ...]
    manifest: Mapping
    codebook_size: int
    grid: tuple[int, int] | None
    texts: tuple[str, ...]
    histograms: tuple[Path, ...]

    @property
    def tokenizer(self) -> Mapping:
        """The manifest's fields about the tokenizer."""
        return self.manifest["tokenizer"]

    def counts(self) -> np.ndarray:
        """Returns how often each code occurs, int64 [K]. Raises UsageError if a histogram is missing or damaged."""
        try:
            counts = np.sum([np.load(path, allow_pickle=False) for path in self.histograms], axis=0)
        except (OSError, ValueError, EOFError) as error:
            raise UsageError(f"token cache {self.path}: {one_line(error)}") from error
        if counts.shape != (self.codebook_size,):
            raise damaged(f"token cache {self.path}", "a histogram of another codebook")
        return counts.astype("<i8")


def open_codes(folder: str | Path) -> CachedCodes:
    """Opens a complete cache of either kind. Raises UsageError as their own functions do."""
    folder = Path(folder).resolve()
    if is_mixed(folder):
        cache = MixedCache(folder)
        count = len(cache.manifest["parts"])
        parts = tuple(
            CachePart(f"train-{number:05}-of-{count:05}", size, functools.partial(_mixed_images, cache, number))
            for number, size in enumerate(cache.manifest["parts"])
        )
        about = cache.manifest, cache.codebook_size, None, tuple(cache.manifest["texts"])
        return CachedCodes(folder, parts, *about, (folder / HISTOGRAM,))
    manifest = read_manifest(folder)
    sources = {split: open_token_cache(folder, split) for split in manifest["splits"]}
    counts = {split: manifest["data"]["splits"][split]["shards"] for split in sources}
    parts = tuple(
        CachePart(
            f"{shard.split}-{shard.number:05}-of-{counts[shard.split]:05}",
            len(shard.images),
            functools.partial(_grid_images, sources[shard.split], shard.images),
        )
        for shard in list_shards(folder, manifest)
    )
    height, width = manifest["grid"]
    histograms = tuple(folder / f"{split}_histogram.npy" for split in sources)
    return CachedCodes(folder, parts, manifest, manifest["codebook_size"], (height, width), (), histograms)


def _grid_images(source, indices: range) -> Iterator[CodedImage]:
    for index in indices:
        image = source[index]
        for crop, codes in enumerate(image["codes"]):
            name = f"{source.split}/{index}" + (f"/{crop}" if len(image["codes"]) > 1 else "")
            yield CodedImage(codes, image["label"], name)


def _mixed_images(cache: MixedCache, number: int) -> Iterator[CodedImage]:
    for index in cache.part(number):
        image = cache[index]
        yield CodedImage(image.codes, _class_id(image.texts), image.name, image.texts)


def _class_id(texts: Texts) -> int:
    """Returns the number in .cls, or "label" or "cls" in .json if that is a number; NO_LABEL otherwise."""
    text = texts.get("cls", "").strip()
    if text.isdecimal() and len(text) < 10:
        return int(text)
    try:
        described = parse_json(texts.get("json", "null"))
    except ValueError:
        return NO_LABEL
    label = described.get("label", described.get("cls")) if isinstance(described, dict) else None
    return label if type(label) is int and 0 <= label < 2**31 else NO_LABEL


def export_codes(
    codes: CachedCodes, out: Path, form: str, layout: CodeLayout = PLAIN, compact: str | None = None
) -> dict:
    """Converts a cache, except for the parts that are there already.

    Args:
        codes: the cache.
        out: the folder of the files, created if absent.
        form: one of `code_files.FORMATS`.
        layout: of the tokens in `megatron`.
        compact: USED, or a file of int [K] as `convert --prune` writes it (old_to_new.npy): codes become new indices.

    Returns:
        the settings.

    Raises:
        UsageError: `out` holds files of other settings, the layout does not state sizes that differ, the map does not
            fit, or an image has a code that the map left out.
    """
    if codes.grid is None and form == "megatron":
        check_states_shape(layout)
    counts = codes.counts()
    old_to_new = None if compact is None else _old_to_new(counts, compact)
    settings = _settings(codes, counts, form, layout, old_to_new)
    _claim(out, settings)
    if old_to_new is not None:
        with atomic_file(out / OLD_TO_NEW) as partial:
            if partial is not None:
                with partial.open("wb") as file:
                    np.save(file, old_to_new)
    file_settings = FileSettings(layout, settings["vocab_size"], codes.texts, codes.grid)
    total, jobs = sum(part.images for part in codes.parts), []
    with tqdm(total=total, unit=" images", disable=None, dynamic_ncols=True) as bar:
        for part in codes.parts:
            path = out / f"{part.name}{FORMATS[form].suffix}"

            def write(partial: Path, part=part, path=path) -> None:
                FORMATS[form].write(path, partial, _compact(part.read(), old_to_new, codes.path), file_settings)

            jobs.append((path, write))
            if write_part(path, write) or path.exists():
                bar.update(part.images)
        for path, write in jobs:  # another process may still be writing some, or have died at it
            with atomic_file(path, wait=True) as partial:
                if partial is not None:
                    write(partial)
    return settings


def check_states_shape(layout: CodeLayout) -> None:
    """Raises UsageError for a layout that cannot hold images of mixed sizes."""
    if not layout.states_shape:
        raise UsageError(
            "this layout states no rows, and the images are of mixed sizes: give --layout=emu35, for example"
        )


def _settings(
    codes: CachedCodes, counts: np.ndarray, form: str, layout: CodeLayout, old_to_new: np.ndarray | None
) -> dict:
    size = codes.codebook_size if old_to_new is None else int(old_to_new.max()) + 1
    return {
        "format": form,
        "layout": layout.fields() if form == "megatron" else None,
        "codebook_size": size,
        "vocab_size": layout.vocab_size(size) if form == "megatron" else size,
        "compact": None if old_to_new is None else hashlib.sha256(old_to_new.tobytes()).hexdigest(),
        "grid": list(codes.grid) if codes.grid else None,
        "cache": str(codes.path),
        "counts": hashlib.sha256(counts.tobytes()).hexdigest(),  # tells a cache from what may replace it
        "tokenizer": {name: value for name, value in codes.tokenizer.items() if name != "config"},
    }


def _claim(out: Path, settings: Mapping) -> None:
    """Writes the settings unless `out` has some, then checks that they agree. Raises UsageError if not."""
    names = sorted(path.name for path in out.iterdir() if path.suffix != PARTIAL) if out.is_dir() else []
    if out.exists() and (not out.is_dir() or (names and SETTINGS not in names)):
        raise UsageError(
            f"{out} is no export, it is a file or holds {names[0] if names else 'nothing'}: name a new folder"
        )
    try:
        found: Any = read_json(claim_folder(out, settings))
    except ValueError as error:
        raise UsageError(f"{out / SETTINGS} is damaged ({one_line(error)}): name a new folder") from error
    had, wanted = (flatten(fields) if isinstance(fields, dict) else {} for fields in (found, settings))
    free = ("cache", "tokenizer.path")
    differing = [name for name in wanted if name not in free and had.get(name, "nothing") != wanted[name]]
    if differing:
        name = differing[0]
        shown = shorten(had.get(name, "nothing"), 80), shorten(wanted[name], 80)
        raise UsageError(f"{out} holds an export with {name} {shown[0]}, not {shown[1]}: name a new folder")


def _old_to_new(counts: np.ndarray, compact: str) -> np.ndarray:
    if compact == USED:
        return np.where(counts > 0, np.cumsum(counts > 0) - 1, -1).astype(np.int32)
    return read_map(Path(compact), len(counts))


def read_map(path: Path, codebook_size: int | None = None) -> np.ndarray:
    """Returns the map from old codes to new ones in a file: int32 [K], -1 for codes that were left out.

    Raises UsageError if it is no such map, or of another codebook's size if that is given.
    """
    try:
        found = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UsageError(f"{path}: {one_line(error)}") from error
    is_map = isinstance(found, np.ndarray) and found.dtype.kind == "i" and found.ndim == 1
    if not is_map or codebook_size not in (None, len(found)):
        codes = "codes" if codebook_size is None else f"{codebook_size} codes"
        raise UsageError(f"{path} is no map of {codes}, as convert --prune writes it ({OLD_TO_NEW})")
    kept = found[found >= 0]
    if not len(kept) or len(np.unique(kept)) != len(kept) or found.min() < -1 or kept.max() >= 2**31:
        raise UsageError(f"{path} maps two codes to one, or none to any")
    return found.astype(np.int32)


def _compact(images: Iterator[CodedImage], old_to_new: np.ndarray | None, cache: Path) -> Iterator[CodedImage]:
    for image in images:
        if old_to_new is None:
            yield image
            continue
        codes = old_to_new[image.codes]
        if codes.min() < 0:
            lost = np.unique(image.codes[codes < 0])
            raise UsageError(
                f"token cache {cache}, image {image.name}: the map left out {len(lost)} of its codes, such as "
                f"{lost[0]}; --compact={USED} keeps all that occur"
            )
        yield CodedImage(codes, image.class_id, image.name, image.texts)
