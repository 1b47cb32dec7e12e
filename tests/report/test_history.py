"""Histories: what is read back from metrics.jsonl, and the metric names of earlier versions."""

import json

import numpy as np

from ibq_jax.report.history import Series, read_history

OLD_ROW = {
    "adversary/discriminator": 1.0,
    "adversary/gradient_norm": 2.0,
    "adversary/hinge": 3.0,
    "codebook/average_entropy": 4.0,
    "gradient_norm": 5.0,
    "loss/total": 6.0,
}
NEW_ROW = {
    "discriminator/loss": 1.0,
    "discriminator/gradient_norm": 2.0,
    "discriminator/hinge": 3.0,
    "codebook/batch_entropy": 4.0,
    "optimizer/gradient_norm": 5.0,
    "loss/total": 6.0,
}


def write(path, *rows: dict) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_names_of_earlier_versions_become_todays(tmp_path):
    write(tmp_path / "old.jsonl", {"step": 1, **OLD_ROW})
    read = read_history(tmp_path / "old.jsonl")
    assert {name: series.last for name, series in read.series.items()} == NEW_ROW


def test_a_run_that_an_earlier_version_began_has_one_series_per_name(tmp_path):
    renamed = {name: value + 10 for name, value in NEW_ROW.items()}
    write(
        tmp_path / "both.jsonl",
        {"step": 1, **OLD_ROW},
        {"step": 2, **OLD_ROW, "gradient_norm": float("nan")},
        {"step": 2, **renamed},  # the new version repeats the step after the last checkpoint
        {"step": 3, **renamed},
    )
    read = read_history(tmp_path / "both.jsonl")
    assert set(read.series) == set(NEW_ROW) and read.not_finite == {"optimizer/gradient_norm": 2}
    for name, value in NEW_ROW.items():
        assert read[name].steps.tolist() == [1, 2, 3] and read[name].values.tolist() == [value, value + 10, value + 10]


def test_a_history_is_read_back_without_its_broken_lines(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "loss/total": 3.0}\n{"step": 2, "loss/total": 2.0, "grid": [[1.0, 2.0]]}\n[]\n'
        '{"step": 3, "grid": [1.0]}\n{"step": 3, "loss/to'
    )
    read = read_history(tmp_path / "metrics.jsonl")
    assert read["loss/total"].steps.tolist() == [1, 2] and read["loss/total"].last == 2.0 and read.last_step == 2
    assert read.unreadable == 3 and read.grids["grid"].tolist() == [[1.0, 2.0]]
    assert read_history(tmp_path / "absent.jsonl").series == {}


def test_the_tail_of_a_series_has_at_least_two_values():
    series = Series(np.asarray([0, 50, 100]), np.asarray([1.0, 2.0, 3.0]))
    assert series.tail(0.1).values.tolist() == [2.0, 3.0] and series.tail(1.0).values.tolist() == [1.0, 2.0, 3.0]
