"""The revision of this package's code, for messages and for the files that it writes."""

import hashlib
import subprocess
from pathlib import Path

from ibq_jax import __version__

PACKAGE = Path(__file__).parents[1]


def source_digest() -> str:
    """Returns the first 12 digits of a sha256 over the package's source files as they are on disk."""
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        digest.update(f"{path.relative_to(PACKAGE)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def revision() -> str:
    """Returns the version and the digest of the sources, and for a git checkout its commit.

    The commit ends with "-dirty" if tracked files have changes.
    """
    commit = _commit(PACKAGE.parent)
    return f"ibq-jax {__version__}, sources {source_digest()}" + (f", commit {commit}" if commit else "")


def _commit(checkout: Path) -> str:
    """Returns "" unless `checkout` is a repository's top level, such as for a package installed inside another one."""
    if Path(_git(checkout, "rev-parse", "--show-toplevel") or "/").resolve() != checkout.resolve():
        return ""
    return _git(checkout, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def _git(folder: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):  # git is not installed, or this is not a repository
        return ""
    return done.stdout.strip()
