"""The token cache of images of mixed sizes: the codes of each image at its own size, with its name and its texts.

FOLDER/token_cache.json                    the manifest: tokenizer, images, bounds, shapes and counts; written last
FOLDER/settings.json                       the manifest without its counts; written first, and compared by a rerun
FOLDER/survey/00000-of-00012.json          how many images of a part state which size
FOLDER/shapes.json                         the shapes that were chosen from the survey
FOLDER/images/00000-of-00012.array_record  the codes of a part; has this name only once it is whole
FOLDER/images/00000-of-00012.json          how many images those are, and which were skipped, and why
FOLDER/histogram.npy                       int64 [K], how often each code occurs
FOLDER/decoded.png                         some of the images, each above what its codes decode to

A record is one image: h and w (uint32), its codes [h, w] (unsigned and as narrow as K allows), all little-endian, then
{"name", "texts"} as JSON in UTF-8. Format version 3; the cache of one grid (`token_cache`) has versions 1 and 2.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grain
import numpy as np

from ibq_jax.base.errors import UsageError
from ibq_jax.base.json_files import parse_json
from ibq_jax.base.parts import SETTINGS
from ibq_jax.base.precision import PRECISIONS
from ibq_jax.data.raw_images import Texts
from ibq_jax.data.token_cache import COMPARED, MIXED_VERSION, TYPES, damaged, find_manifest, has_comparison, read_fields

HISTOGRAM, SHAPES = "histogram.npy", "shapes.json"
HEADER = np.dtype([("h", "<u4"), ("w", "<u4")])
MAX_SIDE = 2**16  # codes; a record that claims more is damaged


@dataclass(frozen=True)
class MixedImage:
    """One stored image."""

    name: str
    codes: np.ndarray  # [h, w], unsigned
    texts: Texts


class MixedCache:
    """A complete token cache of mixed sizes; `cache[i]` is a MixedImage.

    Attributes:
        path: the cache's folder.
        manifest: as `read_mixed_manifest` returns it.
        codebook_size: K.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path).resolve()
        self.manifest = read_mixed_manifest(self.path)
        self.codebook_size: int = self.manifest["codebook_size"]
        self._type = np.dtype(self.manifest["dtype"]).newbyteorder("<")
        paths = part_paths(self.path, self.manifest)
        self._starts = np.cumsum([0, *self.manifest["parts"]])
        self._records = open_parts(self.path, paths, self.manifest["parts"])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> MixedImage:
        try:
            return decode_record(self._records[index], self._type, self.codebook_size)
        except (RuntimeError, ValueError) as error:  # the former from ArrayRecord
            raise damaged(self, f"record {index}: {error}") from error

    def __iter__(self) -> Iterator[MixedImage]:
        return map(self.__getitem__, range(len(self)))

    def __str__(self) -> str:
        return f"token cache {self.path}"

    def part(self, number: int) -> range:
        """Returns the indices of the images of a part."""
        return range(int(self._starts[number]), int(self._starts[number + 1]))


def encode_record(image: MixedImage, dtype: np.dtype) -> bytes:
    """Returns an image's record, with codes of type `dtype`."""
    header = np.array(image.codes.shape, "<u4").tobytes()
    words = json.dumps({"name": image.name, "texts": dict(image.texts)})  # ASCII: names may hold undecodable bytes
    return header + image.codes.astype(dtype.newbyteorder("<")).tobytes() + words.encode()


def decode_record(record: bytes, dtype: np.dtype, codebook_size: int) -> MixedImage:
    """Returns the image of a record. Raises ValueError if it is not one."""
    if len(record) < HEADER.itemsize:
        raise ValueError(f"{len(record)} bytes")
    h, w = map(int, np.frombuffer(record, "<u4", 2))
    end = HEADER.itemsize + h * w * dtype.itemsize
    if not (0 < h < MAX_SIDE and 0 < w < MAX_SIDE and end < len(record)):
        raise ValueError(f"{h}x{w} codes in {len(record)} bytes")
    codes = np.frombuffer(record, dtype, h * w, HEADER.itemsize).reshape(h, w)
    words = parse_json(record[end:])
    if not _are_words(words) or codes.max() >= codebook_size:
        raise ValueError("a code that does not exist, or no name")
    return MixedImage(words["name"], codes, words["texts"])


def _are_words(words: Any) -> bool:
    if not isinstance(words, dict) or type(words.get("name")) is not str or not isinstance(words.get("texts"), dict):
        return False
    return all(type(text) is str for text in words["texts"].values())


def part_paths(folder: Path, settings: Mapping) -> list[Path]:
    """Returns the paths of all parts, including those not written yet."""
    count = settings["images"]["parts"]
    return [folder / "images" / f"{number:05}-of-{count:05}.array_record" for number in range(count)]


def open_parts(folder: Path, paths: list[Path], counts: list[int]) -> Any:
    """Opens the encoded records of all parts that hold `counts` images. Raises UsageError if they hold others."""
    filled = [str(path) for path, count in zip(paths, counts, strict=True) if count]
    try:
        records: Any = grain.sources.ArrayRecordDataSource(filled) if filled else []
        found = len(records)
    except RuntimeError as error:  # from ArrayRecord
        raise damaged(f"token cache {folder}", error) from error
    if found != sum(counts):
        raise damaged(f"token cache {folder}", f"{found} images, not {sum(counts)}")
    return records


def is_mixed(folder: Path) -> bool:
    """Returns whether the folder's token cache, complete or not, is of mixed sizes. Raises UsageError if damaged."""
    file = find_manifest(folder) or folder / SETTINGS
    return file.is_file() and read_fields(file, mixed=True)["version"] == MIXED_VERSION


def read_mixed_manifest(folder: Path) -> dict:
    """Returns the manifest of the complete cache in `folder`.

    Raises UsageError if there is no cache, or it is unfinished, damaged, or of one grid.
    """
    file = find_manifest(folder)
    if file is None:
        if (folder / SETTINGS).is_file():
            raise UsageError(f"token cache {folder} is unfinished: rerun the same tokenize command, it continues")
        raise UsageError(f"there is no token cache in {folder}: make it with python -m ibq_jax tokenize")
    fields = read_fields(file, mixed=True)
    if fields["version"] != MIXED_VERSION:
        raise UsageError(f"token cache {folder} is of one grid, not of mixed sizes")
    images, parts = fields.get("images"), fields.get("parts")
    count = images.get("parts") if isinstance(images, dict) else None
    right = {
        "tokenizer": isinstance(fields.get("tokenizer"), dict),
        "images.parts": type(count) is int and count > 0,
        "parts": isinstance(parts, list)
        and len(parts) == count
        and all(type(part) is int and part >= 0 for part in parts),
        "codebook_size": type(fields.get("codebook_size")) is int and 0 < fields["codebook_size"] <= 2**31,
        "dtype": fields.get("dtype") in TYPES,
        "precision": fields.get("precision") in PRECISIONS,
        "texts": isinstance(fields.get("texts"), list) and all(type(name) is str for name in fields["texts"]),
        "counts": isinstance(fields.get("counts"), dict),
        COMPARED: has_comparison(fields),
    }
    wrong = next((name for name, is_right in right.items() if not is_right), None)
    if wrong is not None:
        raise damaged(file, f"{wrong} is absent or impossible")
    return fields
