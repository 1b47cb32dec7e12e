"""The regular files of a tar, read in order from a stream that nobody has to trust.

Python's tarfile keeps every header in memory, reads an extended header of whatever size it claims, recurses from one to
the next, and goes back in the file where a size is negative. Here a header takes one block, or a bounded one more.
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
MAX_HEADER_BYTES = 2**16  # of an extended header: a long name, and numbers
UNPACKED_AT_LEAST, UNPACKED_TIMES = 2**30, 64  # images hardly shrink, so what grows more is no shard
COMPRESSIONS = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\x00": lzma.open}
REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
LONG_NAME, LONG_LINK = tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK
PAX = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
WITHOUT_DATA = (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE)


class BrokenTar(ValueError):
    """What is not, or no longer, a tar; the message says why."""


class TarStream:
    """Bytes that are read once, in order, up to a limit."""

    def __init__(self, file: BinaryIO, limit: int = 2**63, compressed: bool = False):
        self._file, self._left, self._limit, self._compressed = file, limit, limit, compressed

    def read(self, count: int) -> bytes:
        """Fewer bytes than `count` where they end. Raises BrokenTar for what cannot be read, or unpacks to too much."""
        if count > self._left:
            raise self._too_much()
        self._left -= count
        try:
            return self._file.read(count)
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            raise BrokenTar(str(error)) from error

    def skip(self, count: int) -> None:
        """Raises BrokenTar where there are not as many bytes."""
        if not self._compressed:
            if count:
                self._file.seek(count - 1, 1)  # beyond the end as well
                count = 1
        elif count > self._left:  # known before a bomb is unpacked, not after
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
    """A file's bytes, unpacked where they are gzip's, bzip2's or xz's: to 64 times its size, or 1 GiB."""
    if not path.is_file():  # a pipe, say, would never end
        raise BrokenTar("no regular file")
    with path.open("rb") as file:
        head = file.read(max(map(len, COMPRESSIONS)))
        file.seek(0)
        unpack = next((unpack for magic, unpack in COMPRESSIONS.items() if head.startswith(magic)), None)
        if unpack is None:
            yield TarStream(file)
            return
        limit = max(UNPACKED_AT_LEAST, UNPACKED_TIMES * path.stat().st_size)
        with unpack(file) as unpacked:
            yield TarStream(unpacked, limit, compressed=True)


@dataclass
class Member:
    """A regular file: `size` bytes, to be read before the next member is asked for."""

    name: str
    size: int
    stream: TarStream
    left: int

    def read(self, count: int) -> bytes:
        """The next `count` bytes, or all that are left. Raises BrokenTar where the tar ends before."""
        count = min(count, self.left)
        content = self.stream.read(count)
        if len(content) < count:
            raise BrokenTar("unexpected end of data")
        self.left -= count
        return content

    def skip(self, count: int) -> None:
        """Raises BrokenTar where there are not as many bytes."""
        if count > self.left:
            raise BrokenTar("unexpected end of data")
        self.stream.skip(count)
        self.left -= count


def members(stream: TarStream | Member) -> Iterator[Member]:
    """The regular files of a tar in order; folders, links and devices are passed over.

    Names are as the tar has them: anything. Raises BrokenTar.
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
        raise BrokenTar(f"a header of {length} bytes; they have {MAX_HEADER_BYTES} at most")
    padded = length + -length % BLOCK
    content = stream.read(padded)
    if len(content) < padded:
        raise BrokenTar("unexpected end of data")
    return content[:length]


def _pax(content: bytes, name: str | None, size: int | None) -> tuple[str | None, int | None]:
    """(name, size) as records "LENGTH KEY=VALUE\\n" change them."""
    while content:
        length = content[:8].partition(b" ")[0]
        if not length.isdigit() or not len(length) + 1 < int(length) <= len(content):
            raise BrokenTar("a header that is none of pax's")
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
