"""Files that are whole or not there, whoever is killed while writing them, and however many processes write."""

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
PARTIAL = ".partial"  # behind the name of a file that is being written


def as_path(path: str | os.PathLike) -> Path:
    """A path on this machine, or in a bucket (gs://bucket/...), with the same methods."""
    return epath.Path(path) if is_remote(path) else Path(path)


def resolve(path: str | os.PathLike) -> Path:
    return as_path(path) if is_remote(path) else Path(path).resolve()


def is_remote(path: os.PathLike) -> bool:
    return REMOTE in str(path)


@contextlib.contextmanager
def atomic_file(path: Path, wait: bool = False) -> Iterator[Path | None]:
    """A file to write, which gets the name `path` if the block ends well. None where nothing is to be written.

    That is where `path` is there, or another process is writing it; with `wait`, once that process is done.

    Raises:
        UsageError: the disk is full.
    """
    if path.exists():
        yield None
        return
    partial = path.with_name(path.name + PARTIAL)
    lock = os.open(partial, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if not _locked(lock, wait) or path.exists():  # whoever had it locked may have been done in between
            yield None
            return
        try:
            yield partial
            os.replace(partial, path)
        except BaseException as error:
            os.ftruncate(lock, 0)  # unlinked, it could be locked by one process and made anew by another
            if isinstance(error, OSError | RuntimeError) and _tells_full_disk(error):
                raise UsageError(f"{path}: the disk is full; free room and rerun, what is whole was kept") from error
            raise
    finally:
        os.close(lock)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A new folder to fill, which gets the name `path` if the block ends well, and is removed if not.

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


def _tells_full_disk(error: Exception) -> bool:
    """ArrayRecord's errors are RuntimeErrors with the system's words in them."""
    return any(os.strerror(code) in str(error) for code in (errno.ENOSPC, errno.EDQUOT))
