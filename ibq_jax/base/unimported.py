"""Keeps a library that another one imports, but does not need here, out of a process."""

import contextlib
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def unimported(library: str) -> Iterator[None]:
    """Lets `import library` fail within the block, as if it were not installed; one already imported stays.

    PyTorch takes two seconds and 200 MB of each process that imports it.
    """
    if library in sys.modules:
        yield
        return
    sys.modules[library] = None  # pyright: ignore[reportArgumentType]  # Python's own mark for "not to be found"
    try:
        yield
    finally:
        del sys.modules[library]
