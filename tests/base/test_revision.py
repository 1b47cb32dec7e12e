"""The revision that files carry: the version, the sources, and the commit of a checkout of this package alone."""

import re
import subprocess

import pytest

from ibq_jax import __version__
from ibq_jax.base import revision as module
from ibq_jax.base.revision import revision, source_digest


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A repository whose top level holds the package; `git` runs in it."""
    package = tmp_path / "ibq_jax"
    package.mkdir()
    (package / "module.py").write_text("x = 1\n")
    monkeypatch.setattr(module, "PACKAGE", package)
    identity = ("-c", "user.name=nobody", "-c", "user.email=nobody@localhost")

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "--message=first")
    return package, git


def test_a_clean_checkout_names_its_commit_and_a_changed_one_is_dirty(checkout):
    package, git = checkout
    commit, before = git("rev-parse", "HEAD"), source_digest()
    assert revision() == f"ibq-jax {__version__}, sources {before}, commit {commit}"
    (package / "module.py").write_text("x = 2\n")
    assert source_digest() != before
    assert revision() == f"ibq-jax {__version__}, sources {source_digest()}, commit {commit}-dirty"


def test_a_package_inside_another_repository_does_not_name_its_commit(checkout, monkeypatch):
    package, _ = checkout
    installed = package.parent / "venv" / "site-packages" / "ibq_jax"
    installed.mkdir(parents=True)
    (installed / "module.py").write_text("x = 1\n")
    monkeypatch.setattr(module, "PACKAGE", installed)
    assert revision() == f"ibq-jax {__version__}, sources {source_digest()}"


def test_without_git_the_sources_are_named(checkout, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert re.fullmatch(rf"ibq-jax {re.escape(__version__)}, sources [0-9a-f]{{12}}", revision())
