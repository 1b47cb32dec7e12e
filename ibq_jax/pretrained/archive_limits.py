"""What a .zip (.npz, .pth) or a pickle may cost to read, told before anything is read of it.

Both can be a few bytes that ask for all memory there is: an archive of zeros, or a pickle's object number 2^31.
"""

import contextlib
import pickletools
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

UNPACKED_AT_LEAST, UNPACKED_TIMES = 2**28, 64  # of a file's size; what grows more is no array that somebody trained
MAX_DEPTH = 100  # of objects in objects: hashing a deeper tuple would overflow C's stack
CHANGES = frozenset(("APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD"))  # an object that stays


def unpacked_limit(path: Path) -> int:
    """Bytes that the members of this archive may have together."""
    return max(UNPACKED_AT_LEAST, UNPACKED_TIMES * path.stat().st_size)


def check_archive(path: Path, archive: zipfile.ZipFile) -> None:
    """Raises ValueError for a zip bomb, by the sizes that it names: zipfile reads no more of a member than that."""
    unpacked, limit = sum(member.file_size for member in archive.infolist()), unpacked_limit(path)
    if unpacked > limit:
        raise ValueError(
            f"it unpacks to {unpacked >> 20:,} MiB, over the {limit >> 20:,} MiB that a file of its size may have"
        )


class Arrays:
    """The arrays of an .npz by their names, each read when it is asked for."""

    def __init__(self, file: np.lib.npyio.NpzFile):
        self._file, self.names = file, tuple(file.files)

    def __getitem__(self, name: str) -> np.ndarray:
        """Raises ValueError for what is no plain array, and whatever else zipfile and NumPy raise for foreign bytes."""
        array = self._file[name]
        if not isinstance(array, np.ndarray):
            raise ValueError(f"{name} is no array")
        return array


@contextlib.contextmanager
def open_npz(path: Path) -> Iterator[Arrays]:
    """Never unpickles. Raises ValueError for a zip bomb, and for foreign bytes whatever zipfile and NumPy do."""
    with zipfile.ZipFile(path) as archive:
        check_archive(path, archive)
    with np.load(path, allow_pickle=False) as arrays:
        yield Arrays(arrays)


def check_pickle(file: BinaryIO) -> None:
    """Reads a pickle to its end without making objects.

    Raises ValueError where it is none, numbers an object beyond those there are, or nests deeper than MAX_DEPTH; an
    IndexError or KeyError where it takes what is not there.
    """
    depths = _Depths()
    for number, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and argument > number:
            raise ValueError(f"it numbers an object {argument}, and there are {number} at most")
        depths.follow(opcode, argument)


class _Depths:
    """How deep the objects on a pickle's stack are; None is a mark."""

    def __init__(self):
        self._stack: list[int | None] = []
        self._memo: dict[int, int] = {}

    def follow(self, opcode: pickletools.OpcodeInfo, argument: object) -> None:
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
            depth = 1 + max(popped[1:] if name in CHANGES else popped, default=0)
            if name in CHANGES:
                depth = max(depth, popped[0])
            if depth > MAX_DEPTH:
                raise ValueError(f"it nests objects deeper than {MAX_DEPTH}")
            stack += [depth] * len(opcode.stack_after)

    def _pop(self, opcode: pickletools.OpcodeInfo) -> list[int]:
        before, popped = list(opcode.stack_before), []
        if pickletools.markobject in before:
            while (depth := self._stack.pop()) is not None:
                popped.append(depth)
            before = before[: before.index(pickletools.markobject)]
        own = [self._stack.pop() for _ in before][::-1]
        if None in own:
            raise ValueError("it takes a mark for an object")
        return own + popped
