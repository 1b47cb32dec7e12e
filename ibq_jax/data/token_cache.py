"""The token cache: the codes of a data set's images, computed once by some tokenizer and read here at random.

Shapes: V crops of an image, each [h, w] codes in 0..K-1; B images of a global batch, b = B / processes of one's part.

FOLDER/manifest.json                       what the codes are of, and their counts; there only once all the rest is
FOLDER/settings.json                       the same without the counts, from the start; a rerun is compared with it
FOLDER/SPLIT/00000-of-00012.array_record   a fixed range of the split's images; under this name only when whole
FOLDER/SPLIT_histogram.npy                 int64 [K], how often each code occurs

A record is one image: its index in the split (int64), its label (int32, NO_LABEL without classes), its codes [V, h, w],
all little-endian, the codes unsigned and as narrow as K allows. Nothing here knows models; `code_writer` writes.
"""

import functools
import math
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypedDict

import grain
import numpy as np

from ibq_jax.base.config import flatten
from ibq_jax.base.errors import UsageError
from ibq_jax.base.json_files import read_json
from ibq_jax.data.pipeline import NO_LABEL, batches_of_rows, check_readers, check_seed, iterate, rows_of_process
from ibq_jax.data.sources import printable

VERSION = 1
MANIFEST, SETTINGS = "manifest.json", "settings.json"
LONGEST_SHOWN = 80  # characters of a field's value in a message
TYPES = ("uint8", "uint16", "uint32", "uint64")  # of codes
MOST_IMAGES, MOST_BYTES = 2**40, 2**26  # of a split, and of a record: what is more is no cache
PADDING_LABEL = 0  # of rows that only fill a batch up: a class that every table of classes has


class CodedImage(TypedDict):
    """One stored image."""

    codes: np.ndarray  # [V, h, w], unsigned
    label: int  # NO_LABEL in a data set without classes
    index: int  # in its split


class TokenCacheSplit:
    """A split of a token cache: `len(source)` images, `source[i]` -> CodedImage, read in any order and any process.

    class_names: of the labels, empty in a data set without classes. codebook_size: K. grid: (h, w).
    views: names of the crops of an image, in order; "ten_crop" names ten. manifest: as `read_manifest` gives it.
    """

    def __init__(self, path: Path, split: str, manifest: Mapping):
        self.path, self.split, self.manifest = path, split, manifest
        self._records = open_records(path, split, manifest)
        self._type = record_type(split, manifest)
        self.class_names = tuple(manifest["data"]["class_names"])
        self.views = tuple(manifest["data"]["splits"][split]["views"])
        self.codebook_size, self.grid = manifest["codes"], tuple(manifest["grid"])

    @property
    def num_classes(self) -> int:
        """Classes of the labels; 0 in a data set without classes."""
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> CodedImage:
        try:
            [record] = np.frombuffer(self._records[index], self._type)
        except (RuntimeError, ValueError) as error:  # ArrayRecord's, and NumPy's of a record of another length
            raise damaged(self, f"record {index}: {error}") from error
        if record["codes"].max() >= self.codebook_size or not NO_LABEL <= record["label"] < max(self.num_classes, 1):
            raise damaged(self, f"record {index}: a code or label that does not exist")
        return CodedImage(codes=record["codes"], label=int(record["label"]), index=int(record["index"]))

    def __iter__(self) -> Iterator[CodedImage]:
        return map(self.__getitem__, range(len(self)))

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


def read_manifest(folder: Path) -> dict:
    """What the complete cache in `folder` says of itself. Raises UsageError as `open_token_cache` does."""
    if not (folder / MANIFEST).is_file():
        if (folder / SETTINGS).is_file():
            raise UsageError(f"token cache {folder} is unfinished: rerun the same tokenize command, it continues")
        command = f"python -m ibq_jax tokenize --tokenizer=RUN --out={folder}"
        raise UsageError(f"there is no token cache in {folder}: make it with {command}")
    manifest = read_fields(folder / MANIFEST)
    _check_complete(manifest, folder / MANIFEST)
    return manifest


def _check_complete(manifest: dict, file: Path) -> None:
    """Raises UsageError unless every field that is looked up later is there, of its kind and of a possible size."""
    data, counted = manifest.get("data"), manifest.get("splits")
    splits = data.get("splits") if isinstance(data, dict) else None
    grid = manifest.get("grid")
    right = {
        "tokenizer": isinstance(manifest.get("tokenizer"), dict),
        "data.name": isinstance(data, dict) and isinstance(data.get("name"), str),
        "data.class_names": isinstance(data, dict) and _are(str, data.get("class_names")),
        "data.splits": isinstance(splits, dict),
        "splits": isinstance(counted, dict) and isinstance(splits, dict) and splits.keys() == counted.keys(),
        "codes": _is_count(manifest.get("codes"), 2**31),
        "grid": _are(int, grid) and len(grid) == 2 and all(_is_count(side, MOST_BYTES) for side in grid),
        "dtype": manifest.get("dtype") in TYPES,
    }
    wrong = next((name for name, is_right in right.items() if not is_right), None)
    if wrong is not None:
        raise damaged(file, f"{wrong} is {_shown(flatten(manifest).get(wrong, 'absent or of another kind'))}")
    for split in counted:
        _check_split(split, manifest, file)


def _check_split(split: str, manifest: dict, file: Path) -> None:
    fields, counted = manifest["data"]["splits"][split], manifest["splits"][split]
    if "/" in split or split.startswith(".") or not isinstance(fields, dict) or not isinstance(counted, dict):
        raise damaged(file, f"it has no split that could be named {_shown(split)!r}")
    images, views = fields.get("images"), fields.get("views")
    right = {
        "images": _is_count(images, MOST_IMAGES),
        "views": _are(str, views),
        "crops": _is_count(fields.get("crops"), MOST_BYTES),
        "shards": _is_count(images, MOST_IMAGES) and _is_count(fields.get("shards"), min(images, MOST_BYTES)),
        "entropy": isinstance(counted.get("entropy"), float | int) and math.isfinite(counted["entropy"]),
    }
    wrong = next((name for name, is_right in right.items() if not is_right), None)
    if wrong is not None:
        told = _shown(fields.get(wrong, counted.get(wrong, "absent")))
        raise damaged(file, f"{wrong} of split {_shown(split)!r} is {told}")
    if fields["crops"] * math.prod(manifest["grid"]) > MOST_BYTES:
        raise damaged(file, f"a record of split {_shown(split)!r} would hold over {MOST_BYTES} codes")


def _are(kind: type, values: object) -> bool:
    return isinstance(values, list) and all(type(value) is kind for value in values)


def _is_count(value: object, most: int) -> bool:
    return type(value) is int and 1 <= value <= most


def read_fields(file: Path) -> dict:
    """A manifest or settings. Raises UsageError when it is no JSON object, or of another format version."""
    try:
        fields = read_json(file)
    except ValueError as error:
        raise damaged(file, error) from error
    if not isinstance(fields, dict):
        raise damaged(file, "no JSON object")
    if fields.get("version") != VERSION:
        version = _shown(fields.get("version"))
        raise UsageError(f"{file} is of format version {version}, this reads {VERSION}: tokenize with --overwrite")
    return fields


def check_manifest(fields: Mapping, expected: Mapping, where: str | Path, asker: str = "the config") -> None:
    """Raises UsageError naming every field of a manifest or settings that is not as `expected`, in one line.

    Args:
        fields: of the cache.
        expected: the fields that matter, nested or under dotted names ("tokenizer.fingerprint").
        where: the cache, as the message calls it.
        asker: who expects them.
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
    text = printable(str(value))
    return text if len(text) <= LONGEST_SHOWN else text[: LONGEST_SHOWN - 3] + "..."


def damaged(what: object, reason: object) -> UsageError:
    """The error of a cache whose files are not as they were written."""
    return UsageError(f"{what} is damaged ({' '.join(str(reason).split())}): tokenize again with --overwrite")


def shard_paths(folder: Path, split: str, settings: Mapping) -> list[Path]:
    """Where the split's shards are, or will be."""
    count = settings["data"]["splits"][split]["shards"]
    return [folder / split / f"{number:05}-of-{count:05}.array_record" for number in range(count)]


def record_type(split: str, settings: Mapping) -> np.dtype:
    """A record of the split, as NumPy reads it."""
    crops = settings["data"]["splits"][split]["crops"]
    codes = np.dtype(settings["dtype"]).newbyteorder("<")
    return np.dtype([("index", "<i8"), ("label", "<i4"), ("codes", codes, (crops, *settings["grid"]))])


def open_records(folder: Path, split: str, settings: Mapping) -> grain.sources.ArrayRecordDataSource:
    """The split's encoded records. Raises UsageError when there are not as many, or not as long, as `settings` say."""
    where, images = f"token cache {folder}, split {split!r}", settings["data"]["splits"][split]["images"]
    try:
        records = grain.sources.ArrayRecordDataSource([str(path) for path in shard_paths(folder, split, settings)])
        length = len(records[0])
    except RuntimeError as error:  # ArrayRecord's
        raise damaged(where, error) from error
    if len(records) != images:
        raise damaged(where, f"{len(records)} images, not {images}")
    if length != record_type(split, settings).itemsize:
        raise damaged(where, f"records of {length} bytes, not {record_type(split, settings).itemsize}")
    return records


def training_code_batches(
    source: TokenCacheSplit,
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    rows: Sequence[int] | None = None,
    num_workers: int = 0,
    num_threads: int = 2,
) -> Generator[dict[str, np.ndarray]]:
    """Endless batches, reshuffled every epoch, each image by one of its crops chosen at random, all equally likely.

    As in `pipeline.training_batches`, what lies at a position of the run depends on the seed and the position alone.

    Args:
        source: the images.
        batch_size: B, over all processes. A batch may straddle two epochs.
        seed: of the order and the choice of crops, 0..2**32 - 1.
        start_step: steps to leave out at the start; costs nothing.
        process_index: this process's place among process_count.
        process_count: processes that share every batch.
        rows: of every batch to read, in place of the part that the two before say.
        num_workers: reader processes, which need a guarded entry point; 0 reads in threads of this process.
        num_threads: reader threads in each process; each holds one batch.

    Yields:
        {"codes": int32 [b, h, w], "label": int32 [b] (NO_LABEL without classes), "index": int64 [b]}. The iterator has
        a close(), which ends the readers.

    Raises:
        UsageError: options that do not fit each other; while iterating, a damaged record.
    """
    rows = rows_of_process(batch_size, process_index, process_count) if rows is None else rows
    check_readers(num_threads, num_workers)
    check_seed(seed)
    examples = grain.MapDataset.source(source).seed(seed).shuffle().repeat().random_map(_training_example)
    batches = batches_of_rows(examples, batch_size, rows)[start_step:]
    return iterate(batches, num_workers, num_threads)


def _training_example(image: CodedImage, rng: np.random.Generator) -> dict[str, np.ndarray]:
    return _example(image, int(rng.integers(len(image["codes"]))))


def _example(image: CodedImage, crop: int) -> dict[str, np.ndarray]:
    codes = image["codes"][crop].astype(np.int32)
    return {"codes": codes, "label": np.int32(image["label"]), "index": np.int64(image["index"])}


def evaluation_code_batches(
    source: TokenCacheSplit,
    *,
    batch_size: int,
    examples: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    rows: Sequence[int] | None = None,
    num_threads: int = 2,
) -> Generator[dict[str, np.ndarray]]:
    """One pass over every image's first crop (the centre, but in a split tokenized otherwise).

    Args:
        source: the images.
        batch_size: B, over all processes, which get as many batches each.
        examples: how many images, spread evenly over the split so that every class has its share; 0 takes all.
        process_index: this process's place among process_count.
        process_count: processes that share every batch.
        rows: of every batch to read, in place of the part that the two before say.
        num_threads: reader threads.

    Yields:
        what `training_code_batches` yields, and "mask": bool [b]. The last batch is filled up with codes 0, label
        PADDING_LABEL (not NO_LABEL, which is outside a table of classes), index -1, mask False.

    Raises:
        UsageError: as `training_code_batches`.
    """
    rows = rows_of_process(batch_size, process_index, process_count) if rows is None else rows
    check_readers(num_threads)
    count = min(examples, len(source)) if examples else len(source)
    padded = -(-count // batch_size) * batch_size
    load = functools.partial(_evaluation_example, source=source, count=count)
    batches = batches_of_rows(grain.MapDataset.range(padded).map(load), batch_size, rows)
    return iterate(batches, 0, num_threads)


def _evaluation_example(position: int, *, source: TokenCacheSplit, count: int) -> dict[str, np.ndarray]:
    if position >= count:
        padding = CodedImage(codes=np.zeros((1, *source.grid)), label=PADDING_LABEL, index=-1)
        return {**_example(padding, 0), "mask": np.False_}
    return {**_example(source[position * len(source) // count], 0), "mask": np.True_}
