"""The token cache: the codes of a data set's images, computed once by a tokenizer and read here in any order.

Shapes: V crops of an image, each [h, w] codes in 0..K-1; b rows of a global batch that this process reads.

FOLDER/token_cache.json                    the manifest: tokenizer, data, preprocessing and counts; written last
FOLDER/settings.json                       the manifest without its counts; written first, and compared by a rerun
FOLDER/SPLIT/00000-of-00012.array_record   a fixed range of the split's images; has this name only once it is whole
FOLDER/SPLIT_histogram.npy                 int64 [K], how often each code occurs
FOLDER/decoded.png                         some stored crops, each above what its codes decode to

A record is one image: its index in the split (int64), its label (int32, NO_LABEL without classes) and its codes
[V, h, w], all little-endian, the codes unsigned and as narrow as K allows. `token_cache_writer` writes caches.

The manifest says at what precision the codes were computed, on what kind of machine ("machine": {"platform",
"device_kind"}), and how a sample of them compares with full float32 ("compared_with_float32": {"sampled_codes",
"differing_codes"}). Caches of earlier versions lack the last two: their machine is unknown.

A generator's run holds a copy of the manifest of the cache that it was trained on, also called token_cache.json.
Manifests of format version 1 have other file names (manifest.json in a cache, codes.json in a run) and field names;
they are upgraded on reading and never rewritten.
"""

import math
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any, TypedDict, Unpack

import grain
import numpy as np

from ibq_jax.base.config import flatten
from ibq_jax.base.errors import UsageError, shorten
from ibq_jax.base.json_files import read_json
from ibq_jax.base.parts import SETTINGS, write_json
from ibq_jax.base.precision import PRECISIONS
from ibq_jax.data.batches import (
    NO_LABEL,
    ArrayDict,
    OnePassOptions,
    ShuffledOptions,
    Source,
    one_pass_batches,
    shuffled_batches,
)

VERSION = 2
MIXED_VERSION = 3  # of caches of mixed sizes, which `mixed_cache` reads
MANIFEST = "token_cache.json"
SHEET = "decoded.png"
COMPARED = "compared_with_float32"  # the manifest's field about it; absent in caches of earlier versions
MANIFEST_V1, RUN_MANIFEST_V1 = "manifest.json", "codes.json"
FIELDS_V1 = {"codes": "codebook_size"}  # version 1's name -> today's
COUNTS_V1 = {"codes": "num_tokens"}  # the same for the counts of a split
LONGEST_SHOWN = 80  # characters of a field's value in a message
TYPES = ("uint8", "uint16", "uint32", "uint64")  # of codes
MAX_IMAGES, MAX_BYTES = 2**40, 2**26  # of a split and of a record; a manifest that claims more is damaged
PADDING_LABEL = 0  # of padding rows; every table of class embeddings has this row


class CodedImage(TypedDict):
    """One stored image, as codes."""

    codes: np.ndarray  # [V, h, w], unsigned
    label: int  # NO_LABEL in a data set without classes
    index: int  # its index in the split


class TokenCacheSplit(Source):
    """A split of a token cache; `source[i]` is a CodedImage.

    Attributes:
        path, split: the cache's folder and the split's name.
        manifest: as `read_manifest` returns it.
        views: names of an image's crops, in order; "ten_crop" stands for ten crops.
        codebook_size: K.
        grid: (h, w).
    """

    def __init__(self, path: Path, split: str, manifest: Mapping):
        self.path, self.split, self.manifest = path, split, manifest
        self._records = open_records(path, split, manifest)
        self._record_type = record_type(split, manifest)
        self.class_names = tuple(manifest["data"]["class_names"])
        self.views: tuple[str, ...] = tuple(manifest["data"]["splits"][split]["views"])
        self.codebook_size: int = manifest["codebook_size"]
        height, width = manifest["grid"]
        self.grid: tuple[int, int] = (height, width)

    def __getitem__(self, index: int) -> CodedImage:
        try:
            [record] = np.frombuffer(self._records[index], self._record_type)
        except (RuntimeError, ValueError) as error:  # from ArrayRecord, and from NumPy for a record of another length
            raise damaged(self, f"record {index}: {error}") from error
        if record["codes"].max() >= self.codebook_size or not NO_LABEL <= record["label"] < max(self.num_classes, 1):
            raise damaged(self, f"record {index}: a code or label that does not exist")
        return CodedImage(codes=record["codes"], label=int(record["label"]), index=int(record["index"]))

    def __str__(self) -> str:
        return f"token cache {self.path}, split {self.split!r}"

    def __reduce__(self):
        return open_token_cache, (self.path, self.split)


def open_token_cache(path: str | Path, split: str) -> TokenCacheSplit:
    """Opens a split, "train" or "validation", of the complete cache in the folder `path`.

    Raises:
        UsageError: there is no cache, or it is unfinished, damaged, of another format version, or lacks the split.
    """
    path = Path(path).resolve()
    manifest = read_manifest(path)
    if split not in manifest["splits"]:
        raise UsageError(f"token cache {path} has no split {split!r}; it has {', '.join(manifest['splits'])}")
    return TokenCacheSplit(path, split, manifest)


def find_manifest(folder: Path) -> Path | None:
    """Returns the manifest's path in a cache's folder, of either format version; None if there is none."""
    return next((folder / name for name in (MANIFEST, MANIFEST_V1) if (folder / name).is_file()), None)


def read_manifest(folder: Path) -> dict:
    """Returns the manifest of the complete cache in `folder`. Raises UsageError as `open_token_cache` does."""
    file = find_manifest(folder)
    if file is None:
        if (folder / SETTINGS).is_file():
            raise UsageError(f"token cache {folder} is unfinished: rerun the same tokenize command, it continues")
        command = f"python -m ibq_jax tokenize --run=RUN --out={folder}"
        raise UsageError(f"there is no token cache in {folder}: make it with {command}")
    manifest = read_fields(file)
    _check_complete(manifest, file)
    return manifest


def find_run_manifest(workdir: Path) -> dict | None:
    """Returns the manifest of the token cache that the generator in `workdir` was trained on; None if it has none.

    Raises UsageError if the file is damaged or of an unknown format version.
    """
    for name in (MANIFEST, RUN_MANIFEST_V1):
        if (workdir / name).is_file():
            return read_fields(workdir / name)
    return None


def read_run_manifest(workdir: Path) -> dict:
    """Returns the manifest as `find_run_manifest` does. Raises UsageError if there is none."""
    manifest = find_run_manifest(workdir)
    if manifest is None:
        raise UsageError(f"{workdir} lacks {MANIFEST}, which says what codes its generator was trained on")
    return manifest


def write_run_manifest(workdir: Path, manifest: Mapping) -> None:
    """Writes the manifest of a generator's token cache to its run."""
    write_json(workdir / MANIFEST, manifest)


def _check_complete(manifest: dict, file: Path) -> None:
    """Checks that every field that is read later is there, of its type and of a possible size. Raises UsageError."""
    data: Any = manifest.get("data")
    counted: Any = manifest.get("splits")
    splits = data.get("splits") if isinstance(data, dict) else None
    grid: Any = manifest.get("grid")
    right = {
        "tokenizer": isinstance(manifest.get("tokenizer"), dict),
        "data.name": isinstance(data, dict) and isinstance(data.get("name"), str),
        "data.class_names": isinstance(data, dict) and _are(str, data.get("class_names")),
        "data.splits": isinstance(splits, dict),
        "splits": isinstance(counted, dict) and isinstance(splits, dict) and splits.keys() == counted.keys(),
        "codebook_size": _is_count(manifest.get("codebook_size"), 2**31),
        "grid": _are(int, grid) and len(grid) == 2 and all(_is_count(side, MAX_BYTES) for side in grid),
        "dtype": manifest.get("dtype") in TYPES,
        "precision": manifest.get("precision") in PRECISIONS,
        "machine": "machine" not in manifest or _has(str, manifest["machine"], "platform", "device_kind"),
        COMPARED: has_comparison(manifest),
    }
    wrong = next((name for name, is_right in right.items() if not is_right), None)
    if wrong is not None:
        raise damaged(file, f"{wrong} is {_shown(flatten(manifest).get(wrong, 'absent or of another type'))}")
    for split in counted:
        _check_split(split, manifest, file)


def _check_split(split: str, manifest: dict, file: Path) -> None:
    fields, counted = manifest["data"]["splits"][split], manifest["splits"][split]
    if "/" in split or split.startswith(".") or not isinstance(fields, dict) or not isinstance(counted, dict):
        raise damaged(file, f"it has no split that could be named {_shown(split)!r}")
    images, views = fields.get("images"), fields.get("views")
    right = {
        "images": _is_count(images, MAX_IMAGES),
        "views": _are(str, views),
        "crops": _is_count(fields.get("crops"), MAX_BYTES),
        "shards": isinstance(images, int)
        and _is_count(images, MAX_IMAGES)
        and _is_count(fields.get("shards"), min(images, MAX_BYTES)),
        "entropy": isinstance(counted.get("entropy"), float | int) and math.isfinite(counted["entropy"]),
    }
    wrong = next((name for name, is_right in right.items() if not is_right), None)
    if wrong is not None:
        value = _shown(fields.get(wrong, counted.get(wrong, "absent")))
        raise damaged(file, f"{wrong} of split {_shown(split)!r} is {value}")
    if fields["crops"] * math.prod(manifest["grid"]) > MAX_BYTES:
        raise damaged(file, f"a record of split {_shown(split)!r} would hold over {MAX_BYTES} codes")


def has_comparison(manifest: Mapping) -> bool:
    """Returns whether the field COMPARED is as it should be, or absent."""
    return COMPARED not in manifest or _has(int, manifest[COMPARED], "sampled_codes", "differing_codes")


def _has(kind: type, fields: object, *names: str) -> bool:
    return isinstance(fields, dict) and all(type(fields.get(name)) is kind for name in names)


def _are(kind: type, values: object) -> bool:
    return isinstance(values, list) and all(type(value) is kind for value in values)


def _is_count(value: object, most: int) -> bool:
    return type(value) is int and 1 <= value <= most


def read_fields(file: Path, mixed: bool = False) -> dict:
    """Returns the fields of a manifest or settings file, under today's names.

    Raises UsageError if it is not a JSON object, is of an unknown format version, or of a cache of mixed sizes unless
    these are welcome (`mixed`).
    """
    try:
        fields = read_json(file)
    except ValueError as error:
        raise damaged(file, error) from error
    if not isinstance(fields, dict):
        raise damaged(file, "not a JSON object")
    version = fields.get("version")
    if type(version) is not int or version not in (1, VERSION, MIXED_VERSION):
        raise UsageError(
            f"{file} is of format version {_shown(version)}, this reads 1 to {MIXED_VERSION}: tokenize with --overwrite"
        )
    if version == MIXED_VERSION and not mixed:
        raise UsageError(
            f"token cache {file.parent} holds images of mixed sizes; this needs codes of one grid, which tokenize "
            "writes without --images"
        )
    return _upgraded(fields) if version == 1 else fields


def _upgraded(fields: dict) -> dict:
    """Returns the fields of a version 1 manifest under today's names."""
    fields = _with_names(fields, FIELDS_V1)
    if isinstance(fields.get("splits"), dict):
        fields["splits"] = {split: _with_names(counts, COUNTS_V1) for split, counts in fields["splits"].items()}
    return fields | {"version": VERSION}


def _with_names(fields, names: Mapping[str, str]):
    return {names.get(name, name): value for name, value in fields.items()} if isinstance(fields, dict) else fields


def check_manifest(fields: Mapping, expected: Mapping, where: str | Path, asker: str = "the config") -> None:
    """Checks that a manifest or settings file has the expected fields.

    Args:
        fields: the cache's fields.
        expected: the fields that matter, nested or under dotted names ("tokenizer.fingerprint").
        where: the cache, as the message calls it.
        asker: who expects them, as the message says.

    Raises:
        UsageError: one line that names every field that differs.
    """
    found = flatten(fields)
    differing = [
        f"{name}: the cache has {_shown(found.get(name, 'nothing'))}, {asker} asks for {_shown(value)}"
        for name, value in flatten(expected).items()
        if found.get(name) != value
    ]
    if differing:
        raise UsageError(f"token cache {where} does not fit: {'; '.join(differing)}")


def _shown(value: object) -> str:
    return shorten(value, LONGEST_SHOWN)


def damaged(what: object, reason: object) -> UsageError:
    """Returns the error for a cache whose files are not as they were written."""
    return UsageError(f"{what} is damaged ({' '.join(str(reason).split())}): tokenize again with --overwrite")


def shard_paths(folder: Path, split: str, settings: Mapping) -> list[Path]:
    """Returns the paths of all shards of the split, including those not written yet."""
    count = settings["data"]["splits"][split]["shards"]
    return [folder / split / f"{number:05}-of-{count:05}.array_record" for number in range(count)]


def record_type(split: str, settings: Mapping) -> np.dtype:
    """Returns the NumPy type of the split's records."""
    crops = settings["data"]["splits"][split]["crops"]
    codes = np.dtype(settings["dtype"]).newbyteorder("<")
    return np.dtype([("index", "<i8"), ("label", "<i4"), ("codes", codes, (crops, *settings["grid"]))])


def open_records(folder: Path, split: str, settings: Mapping) -> Any:
    """Opens the split's encoded records. Raises UsageError if their number or length is not what `settings` say."""
    where, images = f"token cache {folder}, split {split!r}", settings["data"]["splits"][split]["images"]
    try:
        records: Any = grain.sources.ArrayRecordDataSource([str(path) for path in shard_paths(folder, split, settings)])
        length = len(records[0])
    except RuntimeError as error:  # from ArrayRecord
        raise damaged(where, error) from error
    if len(records) != images:
        raise damaged(where, f"{len(records)} images, not {images}")
    if length != record_type(split, settings).itemsize:
        raise damaged(where, f"records of {length} bytes, not {record_type(split, settings).itemsize}")
    return records


def training_code_batches(source: TokenCacheSplit, **options: Unpack[ShuffledOptions]) -> Generator[ArrayDict]:
    """Returns endless batches of codes, reshuffled every epoch; of each image, one of its V crops is drawn uniformly.

    Args:
        source: the images.
        **options: as in `shuffled_batches`.

    Returns:
        an iterator over {"codes": int32 [b, h, w], "label": int32 [b] (NO_LABEL without classes), "index": int64 [b]}.
        Its close() ends the readers.

    Raises:
        UsageError: an option is out of range; while iterating, a record is damaged.
    """
    return shuffled_batches(source, _training_example, **options)


def _training_example(image: CodedImage, rng: np.random.Generator) -> dict:
    return _example(image, int(rng.integers(len(image["codes"]))))


def _example(image: CodedImage, crop: int = 0) -> dict:
    codes = image["codes"][crop].astype(np.int32)
    return {"codes": codes, "label": np.int32(image["label"]), "index": np.int64(image["index"])}


def evaluation_code_batches(source: TokenCacheSplit, **options: Unpack[OnePassOptions]) -> Generator[ArrayDict]:
    """Returns one pass over every image's first crop (the centre, unless the split was tokenized otherwise).

    Args:
        source: the images.
        **options: as in `one_pass_batches`.

    Returns:
        an iterator over the arrays of `training_code_batches` and "mask": bool [b]. The last batch is filled up with
        codes 0, label PADDING_LABEL (not NO_LABEL, for which there is no class embedding), index -1, mask False.

    Raises:
        UsageError: as `training_code_batches`.
    """
    padding = _example(CodedImage(codes=np.zeros((1, *source.grid)), label=PADDING_LABEL, index=-1))
    return one_pass_batches(source, _example, padding, **options)
