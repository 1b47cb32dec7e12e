"""Named arrays from files: .safetensors and .npz, and with PyTorch installed .pth, .pt and .ckpt."""

import re
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from ibq_jax.base.errors import UsageError

PICKLED = (".pth", ".pt", ".ckpt")
SUFFIXES = (".safetensors", ".npz", *PICKLED)


def read_tensors(path: str | Path) -> dict[str, np.ndarray]:
    """Every tensor of a file by its name, in its own dtype (bfloat16 as ml_dtypes.bfloat16).

    Pickled files are read with weights_only=True, so that they cannot run code; of a checkpoint that keeps its tensors
    under "state_dict", those are returned. Raises UsageError for a file that is absent, cut short or foreign, and where
    a pickled file meets no PyTorch.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise UsageError(f"{path}: cannot tell its format by its name; it must end in one of {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise UsageError(f"{path}: no such file")
    if path.suffix in PICKLED:
        return _read_pickled(path)
    return _read_safetensors(path) if path.suffix == ".safetensors" else _read_npz(path)


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UsageError(f"{path}: cut short, or not a safetensors file ({error})") from error
    except AttributeError as error:
        raise UsageError(f"{path}: holds a tensor of a type that NumPy lacks ({error})") from error


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with zipfile.ZipFile(path), np.load(path, allow_pickle=False) as arrays:
            tensors = dict(arrays)
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise UsageError(f"{path}: cut short, or not an .npz file of plain arrays ({error})") from error
    # NumPy stores bfloat16 as nameless two-byte values.
    return {name: array.view(ml_dtypes.bfloat16) if array.dtype == "V2" else array for name, array in tensors.items()}


def _read_pickled(path: Path) -> dict[str, np.ndarray]:
    try:
        import torch
    except ImportError as error:
        raise UsageError(
            f"{path}: reading {path.suffix} files needs PyTorch: pip install -r requirements-torch.txt"
        ) from error
    try:
        # Mapped where the format allows it: optimizer states, often most of a file, are then never read.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # from foreign bytes the unpickler may raise anything
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused:
            raise UsageError(
                f"{path}: holds an object of type {refused[1]}, which is not read because loading it could run code; "
                f"where you trust the file, load it with PyTorch and save its state_dict alone"
            ) from error
        raise UsageError(f"{path}: cut short, or not a PyTorch file") from error
    if isinstance(content, Mapping) and "state_dict" in content:
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not all(isinstance(tensor, torch.Tensor) for tensor in content.values()):
        raise UsageError(f"{path}: neither a dictionary of tensors nor a checkpoint that holds one as 'state_dict'")
    return {name: _to_numpy(tensor, torch) for name, tensor in content.items()}


def _to_numpy(tensor, torch) -> np.ndarray:
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()
