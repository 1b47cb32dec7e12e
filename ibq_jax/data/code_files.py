"""Files of codes that other projects train on: Megatron's IndexedDataset, JSON lines and Parquet.

megatron  NAME.bin, NAME.idx: the tokens of a `CodeLayout`; each image is a sequence and a document of its own
jsonl     NAME.jsonl: {"class_id", "tokens": [h w codes], "height": h, "width": w, "name", texts...}, as RAR's
          pretokenization writes it (class_id and tokens; bytedance/1d-tokenizer, scripts/pretokenization.py)
parquet   NAME.parquet: columns of the same names, tokens as list<int32>

IndexedDataset (megatron/core/datasets/indexed_dataset.py of NVIDIA/Megatron-LM): NAME.bin holds all tokens one after
another; NAME.idx, little-endian, the 9 bytes "MMIDIDX", 0, 0; version 1 (uint64); the code of the tokens' type (uint8;
4 is int32, 8 is uint16); the numbers of sequences n and of document boundaries d (uint64); the sequences' lengths
(int32 [n]) and byte offsets (int64 [n]); and the boundaries (int64 [d]), here 0, 1, ..., n.
"""

import itertools
import json
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ibq_jax.base.errors import UsageError, one_line
from ibq_jax.base.json_files import parse_json
from ibq_jax.base.parts import unique_partial
from ibq_jax.data.batches import NO_LABEL
from ibq_jax.data.code_layouts import PLAIN, CodeLayout
from ibq_jax.data.raw_images import Texts

INDEX_HEADER, INDEX_VERSION = b"MMIDIDX\x00\x00", 1
TOKEN_TYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}  # the index's code -> NumPy's type
UINT16, INT32 = 8, 4
UINT16_TOKENS = 65_500  # Megatron takes uint16 for vocabularies below this
ROWS_PER_GROUP = 1024  # of a Parquet file
COLUMNS = ("class_id", "tokens", "height", "width", "name")


@dataclass(frozen=True)
class CodedImage:
    """The codes of an image, or of one crop of it."""

    codes: np.ndarray  # [h, w]
    class_id: int = NO_LABEL
    name: str = ""
    texts: Texts = field(default_factory=dict)

    def row(self) -> dict[str, Any]:
        """Returns the columns of `jsonl` and `parquet`; a text of the same name as one of them is left out."""
        columns = (self.class_id, self.codes.reshape(-1), *self.codes.shape, self.name)
        texts = {name: text for name, text in self.texts.items() if name not in COLUMNS}
        return dict(zip(COLUMNS, columns, strict=True)) | texts


@dataclass(frozen=True)
class FileSettings:
    """The settings of a file that is written or read.

    Attributes:
        layout: of the tokens, in `megatron`.
        vocab_size: a number above every token, in `megatron`.
        texts: the names of all texts, in `parquet`.
        grid: (h, w) if every image has that; readers need it where neither the file nor the layout states it.
    """

    layout: CodeLayout = PLAIN
    vocab_size: int = 2**31
    texts: tuple[str, ...] = ()
    grid: tuple[int, int] | None = None


def write_jsonl(path: Path, partial: Path, images: Iterable[CodedImage], settings: FileSettings) -> None:
    """Writes one line per image to `partial`."""
    del path, settings
    with partial.open("w", encoding="utf-8") as file:
        for image in images:
            row = image.row()
            file.write(json.dumps(row | {"tokens": row["tokens"].tolist()}) + "\n")


def write_parquet(path: Path, partial: Path, images: Iterable[CodedImage], settings: FileSettings) -> None:
    """Writes one row per image to `partial`; an image without one of the texts has null there."""
    del path
    texts = [name for name in settings.texts if name not in COLUMNS]
    types = {"class_id": pa.int64(), "tokens": pa.list_(pa.int32()), "height": pa.int32(), "width": pa.int32()}
    schema = pa.schema([*types.items(), ("name", pa.string()), *((name, pa.string()) for name in texts)])
    rows = (image.row() for image in images)
    with pq.ParquetWriter(partial, schema, compression="zstd") as writer:
        while group := list(itertools.islice(rows, ROWS_PER_GROUP)):
            columns = {name: [row.get(name) for row in group] for name in schema.names}
            writer.write_table(pa.Table.from_pydict(columns, schema))


def write_megatron(path: Path, partial: Path, images: Iterable[CodedImage], settings: FileSettings) -> None:
    """Writes the tokens to the .bin file next to `path`, which then is complete, and the index to `partial`."""
    code = UINT16 if settings.vocab_size < UINT16_TOKENS else INT32
    dtype, lengths = np.dtype(TOKEN_TYPES[code]), []
    tokens_file = path.with_suffix(".bin")
    unfinished = unique_partial(tokens_file)
    try:
        with unfinished.open("wb") as file:
            for image in images:
                tokens = settings.layout.tokens(image.codes)
                file.write(tokens.astype(dtype).tobytes())
                lengths.append(len(tokens))
        unfinished.replace(tokens_file)
    finally:
        unfinished.unlink(missing_ok=True)
    counts = np.array(lengths, np.int64)
    starts = (np.cumsum(counts) - counts) * dtype.itemsize
    with partial.open("wb") as file:
        file.write(INDEX_HEADER + struct.pack("<QBQQ", INDEX_VERSION, code, len(counts), len(counts) + 1))
        for array in (counts.astype("<i4"), starts.astype("<i8"), np.arange(len(counts) + 1, dtype="<i8")):
            file.write(array.tobytes())


def read_jsonl(path: Path, settings: FileSettings) -> Iterator[CodedImage]:
    """Yields the images of a file. Raises UsageError for a line that holds none."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield _image_of(parse_json(line), settings)
            except (KeyError, TypeError, ValueError) as error:
                raise UsageError(f"{path}, line {number}: {_reason(error)}") from error


def read_parquet(path: Path, settings: FileSettings) -> Iterator[CodedImage]:
    """Yields the images of a file. Raises UsageError if it is no such file."""
    try:
        for group in pq.ParquetFile(path).iter_batches(ROWS_PER_GROUP):
            for row in group.to_pylist():
                yield _image_of(row, settings)
    except (KeyError, TypeError, ValueError, OSError, pa.ArrowException) as error:
        raise UsageError(f"{path}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    return f"there is no {error}" if isinstance(error, KeyError) else one_line(error)


def _image_of(row: dict[str, Any], settings: FileSettings) -> CodedImage:
    tokens = np.asarray(row["tokens"])
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu" or tokens.min() < 0:
        raise ValueError("tokens are not a list of codes")
    shape = (row["height"], row["width"]) if row.get("height") and row.get("width") else settings.grid
    codes = PLAIN.codes(tokens, shape)
    texts = {name: text for name, text in row.items() if name not in COLUMNS and isinstance(text, str)}
    return CodedImage(codes, int(row.get("class_id", NO_LABEL)), str(row.get("name", "")), texts)


def read_megatron(path: Path, settings: FileSettings) -> Iterator[CodedImage]:
    """Yields the images of NAME.idx and NAME.bin. Raises UsageError if they are no such files or of another layout."""
    try:
        with path.open("rb") as file:
            dtype, lengths, starts = _read_index(file)
        content = np.memmap(path.with_suffix(".bin"), np.uint8, "r") if len(lengths) else np.zeros(0, np.uint8)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: {one_line(error)}") from error
    for number, (length, start) in enumerate(zip(lengths.tolist(), starts.tolist(), strict=True)):
        try:
            encoded = content[start : start + length * dtype.itemsize].tobytes()
            tokens = np.frombuffer(encoded, dtype, length)
            yield CodedImage(settings.layout.codes(tokens, settings.grid))
        except ValueError as error:
            raise UsageError(f"{path}, sequence {number}: {one_line(error)}") from error


def _read_index(file: BinaryIO) -> tuple[np.dtype, np.ndarray, np.ndarray]:
    """Returns (type of the tokens, lengths of the sequences, their byte offsets). Raises ValueError if damaged."""
    if file.read(len(INDEX_HEADER)) != INDEX_HEADER:
        raise ValueError("not the index of an IndexedDataset")
    try:
        version, code, sequences, _ = struct.unpack("<QBQQ", file.read(25))
        content = file.read(12 * min(sequences, 2**40))
        lengths = np.frombuffer(content, "<i4", sequences)
        starts = np.frombuffer(content, "<i8", sequences, 4 * sequences)
    except (struct.error, OverflowError, MemoryError) as error:
        raise ValueError("a damaged index") from error
    if version != INDEX_VERSION or code not in TOKEN_TYPES or (lengths < 0).any() or (starts < 0).any():
        raise ValueError(f"an index of version {version} and type {code}, or with negative lengths")
    return np.dtype(TOKEN_TYPES[code]), lengths, starts


@dataclass(frozen=True)
class Format:
    """A kind of file: its suffix, the function that writes one and the one that reads it."""

    suffix: str
    write: Callable[[Path, Path, Iterable[CodedImage], FileSettings], None]
    read: Callable[[Path, FileSettings], Iterator[CodedImage]]


FORMATS = {
    "megatron": Format(".idx", write_megatron, read_megatron),
    "jsonl": Format(".jsonl", write_jsonl, read_jsonl),
    "parquet": Format(".parquet", write_parquet, read_parquet),
}
