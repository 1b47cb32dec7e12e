"""Files that appear complete or not at all, even if a writer is killed or several processes write the same file."""

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from etils import epath

from ibq_jax.base.errors import UsageError

REMOTE = "://"  # in a path such as gs://bucket/run
PARTIAL = ".partial"  # suffix of a file or folder that is still being written


def as_path(path: str | os.PathLike) -> Path:
    """Returns a local path, or one in a bucket (gs://bucket/...), both with the methods of `pathlib.Path`."""
    return epath.Path(path) if is_remote(path) else Path(path)  # pyright: ignore[reportReturnType]: it has Path's methods


def resolve(path: str | os.PathLike) -> Path:
    """Returns `as_path(path)`, made absolute if it is local."""
    return as_path(path) if is_remote(path) else Path(path).resolve()


def is_remote(path: os.PathLike | str) -> bool:
    """Returns whether the path is in a bucket."""
    return REMOTE in str(path)


def write_text(path: Path, text: str) -> None:
    """Writes a text file so that a kill leaves either the old content or the new one, never part of it."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file so that a kill leaves either the old content or the new one, never part of it."""
    if is_remote(path):  # a bucket shows an object only when it is complete
        path.write_bytes(content)
        return
    partial = path.with_name(path.name + PARTIAL)
    partial.write_bytes(content)
    partial.replace(path)


@contextlib.contextmanager
def atomic_file(path: Path, wait: bool = False) -> Iterator[Path | None]:
    """Gives a temporary file to write, renamed to `path` if the block succeeds; None if there is nothing to write.

    There is nothing to write if `path` exists or another process is writing it. With `wait`, the call first waits for
    that process.

    Raises:
        UsageError: the disk is full.
    """
    if path.exists():
        yield None
        return
    partial = path.with_name(path.name + PARTIAL)
    lock = os.open(partial, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if not _locked(lock, wait) or path.exists():  # the previous holder of the lock may have finished the file
            yield None
            return
        try:
            yield partial
            os.replace(partial, path)
        except BaseException as error:
            os.ftruncate(lock, 0)  # not unlinked: one process could lock the old file while another creates a new one
            if isinstance(error, OSError | RuntimeError) and _is_disk_full(error):
                raise UsageError(f"{path}: the disk is full; free room and rerun; complete files were kept") from error
            raise
    finally:
        os.close(lock)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Gives a new folder to fill, renamed to `path` if the block succeeds and removed otherwise.

    Raises:
        UsageError: `path` exists.
    """
    if path.exists():
        raise UsageError(f"{path} exists already; name a folder that does not")
    partial = path.with_name(path.name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _locked(lock: int, wait: bool) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_disk_full(error: Exception) -> bool:
    """ArrayRecord raises RuntimeError with the system's message in its text, so the text is searched."""
    return any(os.strerror(code) in str(error) for code in (errno.ENOSPC, errno.EDQUOT))
