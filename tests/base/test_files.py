"""Files and folders that appear whole or not at all."""

import errno
import os

import pytest

from ibq_jax.base.errors import UsageError
from ibq_jax.base.files import PARTIAL, as_path, atomic_file, atomic_folder, resolve, write_text


def test_a_text_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    write_text(path, "old")
    write_text(path, "new")
    assert path.read_text() == "new" and [file.name for file in tmp_path.iterdir()] == ["config.json"]

    def killed(self, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(type(path), "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_text(path, "newer")
    assert path.read_text() == "new"


def test_paths_in_a_bucket_stay_as_they_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert str(resolve("gs://bucket/run")) == str(as_path("gs://bucket/run")) == "gs://bucket/run"
    assert resolve("run") == tmp_path.resolve() / "run"


def test_a_file_that_exists_is_not_written_again(tmp_path):
    path = tmp_path / "part"
    with atomic_file(path) as partial:
        partial.write_text("first")
        assert not path.exists()
    with atomic_file(path) as partial:
        assert partial is None
    assert path.read_text() == "first"


def test_a_full_disk_is_one_line_and_leaves_no_file(tmp_path):
    path = tmp_path / "part"
    with pytest.raises(UsageError, match="part: the disk is full"), atomic_file(path) as partial:
        partial.write_text("half")
        raise RuntimeError(f"ArrayRecord: {os.strerror(errno.ENOSPC)}")
    assert not path.exists() and (tmp_path / ("part" + PARTIAL)).stat().st_size == 0


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(ValueError, match="stop"), atomic_folder(tmp_path / "run") as partial:
        (partial / "file").write_text("half")
        raise ValueError("stop")
    assert not list(tmp_path.iterdir())
    with atomic_folder(tmp_path / "run") as partial:
        (partial / "file").write_text("whole")
    assert (tmp_path / "run" / "file").read_text() == "whole"
    with pytest.raises(UsageError, match="exists already"), atomic_folder(tmp_path / "run"):
        pass
