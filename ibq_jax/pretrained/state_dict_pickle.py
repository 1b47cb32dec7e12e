"""Reads a PyTorch state_dict without PyTorch; the pickle may only refer to dictionaries, tensors and storages.

It exists next to torch.load(weights_only=True) because EfficientNet's weights are installed by pip as a .pth, and
PyTorch is not a requirement. Supports both formats of torch.save: the older one, several pickles followed by the bytes
of the storages, and the .zip archive.
"""

import io
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from ibq_jax.base.errors import UsageError
from ibq_jax.pretrained.archive_limits import check_pickle

OLDER_FORM = b"".join(
    pickle.dumps(number, protocol=2) for number in (0x1950A86A20F9469CFC6C, 1001)
)  # the file's first bytes
ZIP_FORM = b"PK\x03\x04"
TYPES = {"Double": "<f8", "Float": "<f4", "Half": "<f2", "BFloat16": ml_dtypes.bfloat16, "Bool": "?"}
TYPES |= {"Long": "<i8", "Int": "<i4", "Short": "<i2", "Char": "i1", "Byte": "u1"}
STORAGES = {f"{name}Storage": np.dtype(dtype) for name, dtype in TYPES.items()}


def read_state_dict(path: str | Path) -> dict[str, np.ndarray]:
    """Reads every tensor of a state_dict by name, in its own dtype (bfloat16 as ml_dtypes.bfloat16).

    Arrays are read-only, keep the file's strides, and share memory if the file's tensors share a storage. No code in
    the file is run.

    Raises:
        UsageError: the file is absent, damaged or of another format, is not a plain dictionary of tensors, refers to
            an object of another type, or has a tensor that reaches beyond its storage.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"{path}: no such file")
    with path.open("rb") as file:
        try:
            zipped = file.read(len(ZIP_FORM)) == ZIP_FORM
            file.seek(0)
            content, storages = _read_zip(file, path) if zipped else _read_older(file, path)
            named = isinstance(content, dict) and all(isinstance(name, str) for name in content)
            if not named or not all(isinstance(tensor, _Tensor) for tensor in content.values()):
                raise UsageError(f"{path}: not a state_dict, which is a plain dictionary of tensors by name")
            return {name: _array(tensor, storages[tensor.storage.key]) for name, tensor in content.items()}
        except UsageError:
            raise
        except Exception as error:  # the unpickler may raise anything for damaged files
            raise UsageError(f"{path}: cut short, damaged, or not a PyTorch state_dict") from error


class _Storage(NamedTuple):
    kind: str  # of STORAGES
    key: str
    elements: int

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.elements * STORAGES[self.kind].itemsize


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int  # in elements, as the strides are
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Unpickler(pickle.Unpickler):
    """An unpickler that gives the pickle only objects that it cannot use to run code or change anything."""

    def __init__(self, file: BinaryIO, path: Path):
        super().__init__(file, encoding="utf-8")
        self._file, self._path, self.storages = file, path, {}

    def load(self) -> Any:
        """Loads the next pickle of the file, once `check_pickle` has accepted it."""
        start = self._file.tell()
        check_pickle(self._file)
        self._file.seek(start)
        return super().load()

    def find_class(self, module: str, name: str) -> Any:
        """Returns a stand-in for one of the few allowed names. Raises UsageError for all others."""
        if module == "torch" and name in STORAGES:
            return name
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda *parts: _Tensor(*parts[:4])  # the others are gradient flags and hooks
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        raise UsageError(
            f"{self._path}: holds an object of type {module + '.' + name!r}, which is not read because loading it "
            f"could run code; if you trust the file, load it with PyTorch and save only its state_dict"
        )

    def persistent_load(self, pid: tuple) -> _Storage:
        """Returns the storage that the pickle refers to, and remembers it."""
        what, kind, key, _device, elements, *view = pid
        if what != "storage" or any(view):
            raise ValueError(f"unknown reference {pid}")
        self.storages[key] = _Storage(kind, key, elements)
        return self.storages[key]


def _read_older(file: BinaryIO, path: Path) -> tuple[Any, dict[str, bytes]]:
    """Reads the older format: (unpickled content, bytes of each storage)."""
    if file.read(len(OLDER_FORM)) != OLDER_FORM or not _Unpickler(file, path).load()["little_endian"]:
        raise ValueError("another format")
    unpickler = _Unpickler(file, path)
    content = unpickler.load()
    storages, size = {}, os.fstat(file.fileno()).st_size
    for key in _Unpickler(file, path).load():
        storage = unpickler.storages[key]
        (elements,) = struct.unpack("<q", file.read(8))
        if elements != storage.elements or not 0 <= storage.nbytes <= size - file.tell():
            raise ValueError(f"storage {key} has another size, or ends beyond the file")
        storages[key] = file.read(storage.nbytes)
    return content, storages


def _read_zip(file: BinaryIO, path: Path) -> tuple[Any, dict[str, bytes]]:
    """Reads the .zip format: (unpickled content, bytes of each storage)."""
    with zipfile.ZipFile(file) as archive:
        members = {member.filename.partition("/")[2]: member for member in archive.infolist()}
        if any(member.compress_type != zipfile.ZIP_STORED for member in members.values()):
            raise ValueError("compressed, which torch.save never does")
        if "byteorder" in members and archive.read(members["byteorder"]) != b"little":
            raise ValueError("big-endian")
        unpickler = _Unpickler(io.BytesIO(archive.read(members["data.pkl"])), path)
        content = unpickler.load()
        return content, {key: archive.read(members[f"data/{key}"]) for key in unpickler.storages}


def _array(tensor: _Tensor, data: bytes) -> np.ndarray:
    """Returns the tensor as a view of its storage's bytes."""
    storage, offset, shape, strides = tensor
    itemsize = STORAGES[storage.kind].itemsize
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    # NumPy checks the bounds too, but in 64 bits, which large strides overflow.
    beyond = last >= storage.elements and 0 not in shape
    if beyond or min(offset, *shape, *strides, 0) < 0 or len(data) != storage.nbytes:
        raise ValueError(f"reaches beyond its storage of {storage.elements} elements")
    return np.ndarray(shape, STORAGES[storage.kind], data, offset * itemsize, [itemsize * s for s in strides])
