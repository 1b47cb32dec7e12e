"""A job in parts: settings are claimed once, parts are whole or absent, and the last process joins them."""

import json

import pytest

from ibq_jax.base.files import PARTIAL, atomic_file
from ibq_jax.base.parts import (
    SETTINGS,
    claim_folder,
    join_parts,
    remove_partials,
    replace_text,
    unique_partial,
    write_part,
)


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_first_settings_stay(tmp_path):
    assert claim_folder(tmp_path / "a" / "b", {"seed": 1}) == tmp_path / "a" / "b" / SETTINGS
    file = claim_folder(tmp_path / "a" / "b", {"seed": 2})
    assert json.loads(file.read_text()) == {"seed": 1} and names(file.parent) == [SETTINGS]


def test_a_part_is_written_once(tmp_path):
    path = tmp_path / "split" / "0"
    assert write_part(path, lambda partial: partial.write_text("first"))
    assert not write_part(path, lambda partial: partial.write_text("second"))
    assert path.read_text() == "first" and names(path.parent) == ["0"]


def test_a_part_that_another_process_is_writing_is_left_to_it(tmp_path):
    with atomic_file(tmp_path / "0") as partial:
        assert not write_part(tmp_path / "0", lambda partial: partial.write_text("second"))
        partial.write_text("first")
    assert (tmp_path / "0").read_text() == "first"


def test_a_killed_part_is_absent_and_written_again(tmp_path):
    def killed(partial):
        partial.write_text("ha")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_part(tmp_path / "0", killed)
    assert not (tmp_path / "0").exists()
    assert write_part(tmp_path / "0", lambda partial: partial.write_text("whole"))
    assert (tmp_path / "0").read_text() == "whole"


def test_parts_are_joined_once_all_are_there(tmp_path):
    parts, joined = [tmp_path / "0", tmp_path / "1"], tmp_path / "all"

    def join(partial):
        partial.write_text("".join(part.read_text() for part in parts))

    parts[0].write_text("a")
    assert not join_parts(parts, joined, join) and not joined.exists()
    parts[1].write_text("b")
    assert join_parts(parts, joined, join) and joined.read_text() == "ab"
    assert join_parts(parts, joined, lambda partial: pytest.fail("joined twice"))


def test_a_text_is_replaced_whole_and_by_names_of_its_own(tmp_path):
    assert unique_partial(tmp_path / "a") != unique_partial(tmp_path / "a")
    replace_text(tmp_path / "a", "first")
    replace_text(tmp_path / "a", "second")
    assert (tmp_path / "a").read_text() == "second" and names(tmp_path) == ["a"]


def test_what_killed_writers_left_is_removed(tmp_path):
    for name in ("0", f"1{PARTIAL}", f"split/2{PARTIAL}", f"split/folder{PARTIAL}/x"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("half")
    remove_partials(tmp_path)
    assert names(tmp_path) == ["0", "split"] and len(names(tmp_path / "split")) == 2
    remove_partials(tmp_path, "*/*")
    assert names(tmp_path) == ["0", "split"] and not names(tmp_path / "split")
