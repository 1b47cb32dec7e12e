"""Jobs cut into parts, such as the shards of a token cache: they continue after a kill, and processes may share them.

FOLDER/settings.json   the settings that the parts depend on, written first; a continued job must have the same
FOLDER/...             one file per part, renamed to its final name once it is complete
the joined file        written once all parts are complete, by the process that finishes last
"""

import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from ibq_jax.base.files import PARTIAL, atomic_file

SETTINGS = "settings.json"


def write_json(path: Path, fields: Mapping) -> None:
    """Writes fields as indented JSON."""
    path.write_text(json.dumps(fields, indent=2) + "\n")


def claim_folder(folder: Path, settings: Mapping) -> Path:
    """Makes `folder` and writes `settings` to its settings.json, unless the file exists. Returns the file's path."""
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_file(folder / SETTINGS, wait=True) as partial:
        if partial is not None:
            write_json(partial, settings)
    return folder / SETTINGS


def write_part(path: Path, write: Callable[[Path], None]) -> bool:
    """Writes a part unless it is whole or another process is writing it.

    Args:
        path: the part's file.
        write: writes the part to the temporary file that it is given.

    Returns:
        whether this call wrote the part.

    Raises:
        UsageError: the disk is full; whole parts are kept.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as partial:
        if partial is not None:
            write(partial)
    return partial is not None


def join_parts(parts: Iterable[Path], path: Path, join: Callable[[Path], None]) -> bool:
    """Writes `path` from its parts once all are whole; several processes may call it at once.

    Args:
        parts: the files of all parts.
        path: the joined file; left alone if it exists.
        join: writes the joined file to the temporary file that it is given.

    Returns:
        whether `path` is complete; False while a part is missing, which another process writes.
    """
    if not all(part.exists() for part in parts):
        return False
    with atomic_file(path, wait=True) as partial:
        if partial is not None:
            join(partial)
    return True


def unique_partial(path: Path) -> Path:
    """Returns a temporary name next to `path` that no other writer uses, for writers that may try a part twice."""
    return path.with_name(f"{path.name}.{uuid.uuid4().hex}{PARTIAL}")


def replace_text(path: Path, text: str) -> None:
    """Writes a part that several writers may try at once; each replaces it by the whole text."""
    partial = unique_partial(path)
    partial.write_text(text)
    os.replace(partial, path)


def remove_partials(folder: Path, pattern: str = "*") -> None:
    """Removes the temporary files and folders that killed writers left in `folder`; `pattern` may name subfolders."""
    for leftover in folder.glob(pattern + PARTIAL):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)  # a worker that outlived its runner may still be writing
        else:
            leftover.unlink(missing_ok=True)
