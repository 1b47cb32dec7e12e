"""Functions that the scripts tests/golden/make_*.py share.

Each script recomputes a golden file with the public package that its docstring names, in its own virtual environment:

    python tests/golden/make_NAME.py OUT.npz

Inputs (images, features) are read from the committed file; everything else is computed. The largest difference to each
committed array is printed.
"""

import argparse
import sys
import types
import zlib
from pathlib import Path

import numpy as np

from support import released


def main(name: str, make, description: str) -> None:
    """Writes `make(committed arrays)`, a dict of arrays, to the file named on the command line, and compares them.

    Exits with an error if an array is missing, or is added, or has another shape or type.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT.npz", help="file to write")
    out = parser.parse_args().out
    committed = released.load(name)
    arrays = {key: np.asarray(array) for key, array in make(committed).items()}
    np.savez_compressed(out, **arrays)
    for key in committed:
        if key not in arrays or arrays[key].shape != committed[key].shape or arrays[key].dtype != committed[key].dtype:
            sys.exit(f"{key}: missing, or of another shape or type")
    print(f"{'array':24} largest difference  largest value")
    for key, array in arrays.items():
        if array.dtype.kind == "f":
            difference = np.abs(array.astype(np.float64) - committed[key]).max()
            print(f"{key:24} {difference:18.1e} {np.abs(array).max():14.3g}")
        else:
            print(f"{key:24} {'equal' if np.array_equal(array, committed[key]) else 'DIFFERENT':>18}")
    if arrays.keys() != committed.keys():
        sys.exit(f"arrays that the committed file does not have: {', '.join(arrays.keys() - committed.keys())}")
    print(f"wrote {out}")


def allow_torchvision_without_cuda() -> None:
    """Lets PyPI's torchvision, which is built for CUDA, be imported with PyTorch's CPU build.

    Its compiled operators are then missing, and registering their shapes would fail; networks do not need them.
    """
    sys.modules["torchvision._meta_registrations"] = types.ModuleType("skipped")


def checksums(tensors) -> tuple[np.ndarray, np.ndarray]:
    """Returns float64 [n, 2], each tensor's sum and sum of magnitudes, and uint32 [n], its CRC-32, sorted by name."""
    ordered = [tensors[name] for name in sorted(tensors)]
    sums = np.array([[x.sum(dtype=np.float64), np.abs(x).sum(dtype=np.float64)] for x in ordered])
    return sums, np.array([zlib.crc32(x.tobytes()) for x in ordered], np.uint32)
