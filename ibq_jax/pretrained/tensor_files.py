"""Reads and writes named arrays: .safetensors, .npz, and PyTorch's .pth, .pt and .ckpt.

Without PyTorch, the last three can be read if they are plain dictionaries of tensors, and cannot be written.
"""

import io
import re
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from ibq_jax.base.errors import UsageError, one_line, printable
from ibq_jax.base.files import atomic_file
from ibq_jax.pretrained.archive_limits import check_pickle, open_npz
from ibq_jax.pretrained.state_dict_pickle import OLDER_FORM, read_state_dict

PICKLED = (".pth", ".pt", ".ckpt")
SUFFIXES = (".safetensors", ".npz", *PICKLED)
STATE_DICT, METADATA = "state_dict", "metadata"  # keys of a pickled checkpoint
MAPPED_AT_MOST = 2**29  # bytes of a memory-mapped file that may be resident before it is mapped again


class TensorFile(ABC):
    """A file's tensors, read one by one, so that only the last one needs memory."""

    shapes: dict[str, tuple[int, ...]]
    about: dict[str, str]  # the file's metadata

    @abstractmethod
    def read(self, name: str) -> np.ndarray:
        """Reads a tensor in its own dtype (bfloat16 as ml_dtypes.bfloat16); each can be read once."""


def open_tensors(path: str | Path) -> TensorFile:
    """Opens a file of tensors; its suffix says which format it has.

    Pickled files are read with weights_only=True, so that they cannot run code; a checkpoint's tensors are found under
    "state_dict". Without PyTorch, only plain dictionaries of tensors can be read.

    Raises:
        UsageError: the file is absent, damaged or of another format, or reading it needs PyTorch.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise UsageError(f"{path}: unknown format; its name must end in one of {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise UsageError(f"{path}: no such file")
    if path.suffix in PICKLED:
        return _Pickled(path) if _has_pytorch() else _StateDict(path)
    return _Safetensors(path) if path.suffix == ".safetensors" else _Npz(path)


def read_tensors(path: str | Path) -> dict[str, np.ndarray]:
    """Reads all tensors of a file by name; errors are those of `open_tensors`."""
    file = open_tensors(path)
    return {name: file.read(name) for name in file.shapes}


class _Safetensors(TensorFile):
    def __init__(self, path: Path):
        self._path = path
        try:
            self._file = safe_open(
                path, framework="np", backend="pread"
            )  # not memory-mapped: its pages would count as memory
            self.about = self._file.metadata() or {}
            names = self._file.keys()
            self.shapes = {name: tuple(self._file.get_slice(name).get_shape()) for name in names}
        except Exception as error:  # SafetensorError, and what Rust raises for invalid text
            raise UsageError(f"{path}: cut short, or not a safetensors file ({one_line(error)})") from error

    def read(self, name: str) -> np.ndarray:
        try:
            return self._file.get_tensor(name)
        except Exception as error:  # AttributeError, SafetensorError, and NumPy's
            raise UsageError(
                f"{self._path}: holds a tensor of a type that NumPy does not have ({one_line(error)})"
            ) from error


class _Npz(TensorFile):
    def __init__(self, path: Path):
        self.about = {}
        try:
            with open_npz(path) as arrays:
                tensors = {name: arrays[name] for name in arrays.names}
        except Exception as error:  # zipfile and NumPy may raise anything for damaged files
            raise UsageError(f"{path}: cut short, or not an .npz file of plain arrays ({one_line(error)})") from error
        # NumPy stores bfloat16 as two-byte values without a type.
        self._tensors = {
            name: array.view(ml_dtypes.bfloat16) if array.dtype == "V2" else array for name, array in tensors.items()
        }
        self.shapes = {name: array.shape for name, array in self._tensors.items()}

    def read(self, name: str) -> np.ndarray:
        return self._tensors.pop(name)


class _StateDict(TensorFile):
    """A PyTorch file that is a plain dictionary of tensors, read without PyTorch."""

    def __init__(self, path: Path):
        self.about = {}
        try:
            self._tensors = read_state_dict(path)
        except UsageError as error:
            hint = "PyTorch may read it: pip install -r requirements-torch.txt"
            raise UsageError(f"{error}; {hint}") from error
        self.shapes = {name: array.shape for name, array in self._tensors.items()}

    def read(self, name: str) -> np.ndarray:
        return self._tensors.pop(name)


class _Pickled(TensorFile):
    """A PyTorch file read by PyTorch, memory-mapped if its format allows it.

    So optimizer states, often most of a file, are never read. A file of the older format is read as a whole, and each
    tensor is released once it was read.
    """

    def __init__(self, path: Path):
        self._path, self._mapped, self._resident = path, zipfile.is_zipfile(path), 0
        self._tensors, self.about = self._load()
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def read(self, name: str) -> np.ndarray:
        tensor = self._tensors.pop(name).detach()
        self._resident += tensor.nbytes
        if self._mapped and self._resident > MAPPED_AT_MOST:
            left = self._tensors.keys()
            self._tensors = {}  # pages stay resident until the last tensor is released
            again, _ = self._load()
            self._tensors, self._resident = {other: again[other] for other in left}, tensor.nbytes
        try:
            if tensor.dtype == self._torch.bfloat16:
                return tensor.contiguous().view(self._torch.uint16).numpy().view(ml_dtypes.bfloat16)
            return tensor.numpy()
        except (RuntimeError, TypeError) as error:  # the tensor is sparse, quantized or on no device
            raise UsageError(
                f"{self._path}: {name} is of a kind that NumPy does not have ({one_line(error)})"
            ) from error

    @cached_property
    def _torch(self):
        return _pytorch(f"{self._path}: reading {self._path.suffix} files")

    def _check(self) -> None:
        """Raises ValueError for files that would make PyTorch use excessive time, memory or stack."""
        with self._path.open("rb") as file:
            if self._mapped:
                with zipfile.ZipFile(file) as archive:
                    if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                        raise ValueError("compressed, which torch.save never does")
                    for name in archive.namelist():
                        if name.endswith(".pkl"):
                            check_pickle(io.BytesIO(archive.read(name)))
            elif file.read(len(OLDER_FORM)) == OLDER_FORM:
                for _ in ("system", "content", "keys"):
                    check_pickle(file)

    def _load(self) -> tuple[dict, dict[str, str]]:
        """Loads (tensors, metadata)."""
        try:
            self._check()
            content = self._torch.load(self._path, map_location="cpu", weights_only=True, mmap=self._mapped)
        except UsageError:
            raise
        except Exception as error:  # the unpickler may raise anything for damaged files
            refused = re.search(r"GLOBAL (\S+)", str(error))
            if refused:
                raise UsageError(
                    f"{self._path}: holds an object of type {printable(refused[1])}, which is not read because loading "
                    f"it could run code; if you trust the file, load it with PyTorch and save only its state_dict"
                ) from error
            raise UsageError(f"{self._path}: cut short, or not a PyTorch file") from error
        about = {}
        if isinstance(content, Mapping) and STATE_DICT in content:
            about = content.get(METADATA, {})
            content = content[STATE_DICT]
        named = isinstance(content, Mapping) and all(
            isinstance(name, str) and isinstance(x, self._torch.Tensor) for name, x in content.items()
        )
        if not named or not isinstance(about, Mapping):
            raise UsageError(
                f"{self._path}: neither a dictionary of tensors nor a checkpoint that holds one as {STATE_DICT!r}"
            )
        return dict(content), {str(key): value for key, value in about.items() if isinstance(value, str)}


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray], about: Mapping[str, str]) -> None:
    """Writes a .safetensors file, or a pickle that the released code loads: {"state_dict": ..., "metadata": `about`}.

    The write is atomic. Raises UsageError if the name has another suffix or exists, or the disk is full.
    """
    if path.suffix not in (".safetensors", *PICKLED):
        raise UsageError(f"{path}: weights are written as .safetensors, {', '.join(PICKLED)}")
    torch = _pytorch(f"{path}: writing {path.suffix} files") if path.suffix in PICKLED else None
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as partial:
        if partial is None:
            raise UsageError(f"{path} exists already, or another process is writing it")
        if torch is None:
            save_file(dict(tensors), partial, metadata={"format": "pt", **about})
        else:
            state_dict = {name: _to_torch(array, torch) for name, array in tensors.items()}
            torch.save({STATE_DICT: state_dict, METADATA: dict(about)}, partial)


def _to_torch(array: np.ndarray, torch):
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _has_pytorch() -> bool:
    try:
        _pytorch("reading")
    except UsageError:
        return False
    return True


def _pytorch(doing: str):
    try:
        import torch
    except ImportError as error:
        raise UsageError(f"{doing} needs PyTorch: pip install -r requirements-torch.txt") from error
    return torch
