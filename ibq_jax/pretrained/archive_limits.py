"""Checks that reading a .zip archive (.npz, .pth) or a pickle will not exhaust memory or stack, before it is read.

A few bytes suffice to ask for all memory: a compressed archive of zeros, or a pickle that numbers an object 2^31. Such
files come from other people (see `ibq_jax.pretrained`), so the limits stay.
"""

import contextlib
import pickletools
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

MIN_LIMIT, MAX_EXPANSION = 2**28, 64  # bytes; times the file's size. Trained weights never compress that well
MAX_DEPTH = 100  # of nested objects: hashing a deeper tuple would overflow C's stack
# Opcodes that change the object below their arguments on the stack, and leave it there.
MUTATIONS = frozenset(("APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD"))


def unpacked_limit(path: Path) -> int:
    """Returns how many bytes the members of this archive may have in total."""
    return max(MIN_LIMIT, MAX_EXPANSION * path.stat().st_size)


def check_archive(path: Path, archive: zipfile.ZipFile) -> None:
    """Raises ValueError for a zip bomb, detected by its declared sizes: zipfile reads no more of a member than that."""
    unpacked, limit = sum(member.file_size for member in archive.infolist()), unpacked_limit(path)
    if unpacked > limit:
        raise ValueError(f"it unpacks to {unpacked >> 20:,} MiB; a file of its size may have {limit >> 20:,} MiB")


class Arrays:
    """The arrays of an .npz by name, each read on access."""

    def __init__(self, file: np.lib.npyio.NpzFile):
        self._file, self.names = file, tuple(file.files)

    def __getitem__(self, name: str) -> np.ndarray:
        """Reads an array. Raises ValueError if it is none, and what zipfile and NumPy raise for damaged files."""
        array = self._file[name]
        if not isinstance(array, np.ndarray):
            raise ValueError(f"{name} is not an array")
        return array


@contextlib.contextmanager
def open_npz(path: Path) -> Iterator[Arrays]:
    """Opens an .npz, without unpickling anything.

    Raises ValueError for a zip bomb, and whatever zipfile and NumPy raise for damaged files.
    """
    with zipfile.ZipFile(path) as archive:
        check_archive(path, archive)
    with np.load(path, allow_pickle=False) as arrays:
        yield Arrays(arrays)


def check_pickle(file: BinaryIO) -> None:
    """Reads a pickle to its end without creating objects.

    Raises:
        ValueError: it is not a pickle, gives an object a number beyond the number of objects, or nests deeper than
            MAX_DEPTH.
        IndexError, KeyError: it uses an object that does not exist.
    """
    depths = _Depths()
    for number, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and isinstance(argument, int) and argument > number:
            raise ValueError(f"it gives an object the number {argument}, with at most {number} objects")
        depths.follow(opcode, argument)


class _Depths:
    """Tracks the nesting depth of the objects on a pickle's stack; None stands for a mark."""

    def __init__(self):
        self._stack: list[int | None] = []
        self._memo: dict[int, int | None] = {}

    def follow(self, opcode: pickletools.OpcodeInfo, argument: Any) -> None:
        """Applies one opcode."""
        stack, name = self._stack, opcode.name
        if name == "MARK":
            stack.append(None)
        elif name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self._memo[len(self._memo) if name == "MEMOIZE" else argument] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(self._memo[argument])
        elif name == "DUP":
            stack.append(stack[-1])
        elif name == "POP":
            stack.pop()
        else:
            popped = self._pop(opcode)
            depth = 1 + max(popped[1:] if name in MUTATIONS else popped, default=0)
            if name in MUTATIONS:
                depth = max(depth, popped[0])
            if depth > MAX_DEPTH:
                raise ValueError(f"it nests objects deeper than {MAX_DEPTH}")
            stack += [depth] * len(opcode.stack_after)

    def _pop(self, opcode: pickletools.OpcodeInfo) -> list[int]:
        """Pops the opcode's arguments and returns their depths, lowest on the stack first."""
        before, popped = list(opcode.stack_before), []
        if pickletools.markobject in before:
            while (depth := self._stack.pop()) is not None:
                popped.append(depth)
            before = before[: before.index(pickletools.markobject)]
        own = [self._stack.pop() for _ in before][::-1]
        depths = [depth for depth in own if depth is not None]
        if len(depths) < len(own):
            raise ValueError("it uses a mark as an object")
        return depths + popped
