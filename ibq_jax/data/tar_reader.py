"""Reads the regular files of a tar in order, from a stream that need not be trusted.

Python's tarfile keeps every header in memory, reads an extended header of any size it claims, recurses from one to the
next, and seeks backwards if a size is negative. Here headers are read one after another and none is kept, and an
extended header of over 64 KiB is refused.
"""

import bz2
import contextlib
import gzip
import lzma
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

BLOCK = 512
MAX_HEADER_BYTES = 2**16  # of an extended header, which holds a long name and numbers
MIN_UNPACKED, MAX_GROWTH = 2**30, 64  # images hardly compress, so a file that grows more is not a shard
COMPRESSIONS = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\x00": lzma.open}
REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
LONG_NAME, LONG_LINK = tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK
PAX = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
WITHOUT_DATA = (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE)


class BrokenTar(ValueError):
    """A file that is not a tar, or is damaged; the message says why."""


class TarStream:
    """A stream of bytes that is read once, in order, up to a limit."""

    def __init__(self, file: BinaryIO, limit: int = 2**63, compressed: bool = False):
        self._file, self._left, self._limit, self._compressed = file, limit, limit, compressed

    def read(self, count: int) -> bytes:
        """Reads `count` bytes, fewer at the end. Raises BrokenTar if they cannot be read or unpack to too many."""
        if count > self._left:
            raise self._too_much()
        self._left -= count
        try:
            return self._file.read(count)
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            raise BrokenTar(str(error)) from error

    def skip(self, count: int) -> None:
        """Skips `count` bytes. Raises BrokenTar if there are fewer."""
        if not self._compressed:
            if count:
                self._file.seek(count - 1, 1)  # beyond the end is no error, so the last byte is read
                count = 1
        elif count > self._left:  # so a bomb is refused before it is unpacked
            raise self._too_much()
        while count:
            read = len(self.read(min(count, 2**20)))
            if not read:
                raise BrokenTar("unexpected end of data")
            count -= read

    def _too_much(self) -> BrokenTar:
        return BrokenTar(f"it unpacks to over {self._limit >> 20} MiB, which is the limit for a file of its size")


@contextlib.contextmanager
def open_stream(path: Path) -> Iterator[TarStream]:
    """Opens a file, unpacking gzip, bzip2 and xz to at most 64 times its size or 1 GiB, whichever is more.

    Raises BrokenTar if it is not a regular file.
    """
    if not path.is_file():  # a pipe, for example, would never end
        raise BrokenTar("not a regular file")
    with path.open("rb") as file:
        head = file.read(max(map(len, COMPRESSIONS)))
        file.seek(0)
        unpack = next((unpack for magic, unpack in COMPRESSIONS.items() if head.startswith(magic)), None)
        if unpack is None:
            yield TarStream(file)
            return
        limit = max(MIN_UNPACKED, MAX_GROWTH * path.stat().st_size)
        with unpack(file) as unpacked:
            yield TarStream(unpacked, limit, compressed=True)


@dataclass
class Member:
    """A regular file in a tar, of `size` bytes; it has to be read before the next member is requested."""

    name: str
    size: int
    stream: "TarStream | Member"
    left: int  # bytes not read yet

    def read(self, count: int) -> bytes:
        """Reads `count` bytes, or all that are left. Raises BrokenTar if the tar ends earlier."""
        count = min(count, self.left)
        content = self.stream.read(count)
        if len(content) < count:
            raise BrokenTar("unexpected end of data")
        self.left -= count
        return content

    def skip(self, count: int) -> None:
        """Skips `count` bytes. Raises BrokenTar if there are fewer."""
        if count > self.left:
            raise BrokenTar("unexpected end of data")
        self.stream.skip(count)
        self.left -= count


def members(stream: TarStream | Member) -> Iterator[Member]:
    """Yields the regular files of a tar in order; folders, links and devices are skipped.

    Names are as in the tar and may be any text. Raises BrokenTar if the stream is not a tar, is damaged, or holds a
    sparse file.
    """
    name, size, first = None, None, True
    while block := stream.read(BLOCK):
        if not any(block):
            return
        header, first = _header(block), False
        kind, length = header.type, header.size
        if kind in (LONG_NAME, LONG_LINK, *PAX, tarfile.XGLTYPE):
            extended = _extended(stream, length)
            if kind == LONG_NAME:
                name = extended.partition(b"\0")[0].decode("utf-8", "surrogateescape")
            elif kind in PAX:
                name, size = _pax(extended, name, size)
            continue
        if kind == tarfile.GNUTYPE_SPARSE:
            raise BrokenTar("it holds a sparse file, which is not read")
        length = length if size is None else size
        if kind in REGULAR:
            member = Member(header.name if name is None else name, length, stream, length)
            yield member
            stream.skip(member.left + -length % BLOCK)
        elif kind not in WITHOUT_DATA:
            stream.skip(length + -length % BLOCK)
        name, size = None, None
    if first:
        raise BrokenTar("empty file")


def _header(block: bytes) -> tarfile.TarInfo:
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.TarError, ValueError) as error:
        raise BrokenTar(str(error)) from error
    if header.size < 0:
        raise BrokenTar("a file of negative size")
    return header


def _extended(stream: TarStream | Member, length: int) -> bytes:
    if length > MAX_HEADER_BYTES:
        raise BrokenTar(f"a header of {length} bytes; the limit is {MAX_HEADER_BYTES}")
    padded = length + -length % BLOCK
    content = stream.read(padded)
    if len(content) < padded:
        raise BrokenTar("unexpected end of data")
    return content[:length]


def _pax(content: bytes, name: str | None, size: int | None) -> tuple[str | None, int | None]:
    """Returns (name, size) as changed by records "LENGTH KEY=VALUE\\n"."""
    while content:
        length = content[:8].partition(b" ")[0]
        if not length.isdigit() or not len(length) + 1 < int(length) <= len(content):
            raise BrokenTar("a header that is not a pax header")
        key, _, value = content[len(length) + 1 : int(length) - 1].partition(b"=")
        content = content[int(length) :]
        if key.startswith(b"GNU.sparse"):
            raise BrokenTar("it holds a sparse file, which is not read")
        if key == b"path":
            name = value.decode("utf-8", "surrogateescape")
        elif key == b"size":
            if not value.isdigit() or len(value) > 18:
                raise BrokenTar(f"a size of {value[:20]!r}")
            size = int(value)
    return name, size
