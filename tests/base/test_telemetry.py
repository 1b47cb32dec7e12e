"""Tests of what a run logs, and of what it drops when it is resumed."""

import json

import numpy as np

from ibq_jax.base.telemetry import Telemetry


def test_scalars_and_images_reach_the_files(tmp_path, capsys):
    telemetry = Telemetry(tmp_path, 0, 10)
    telemetry.scalars(1, {"loss/l1": 0.5})
    telemetry.image(1, "reconstructions", np.zeros((4, 4, 3), np.uint8))
    telemetry.line(2, "loss 0.5")
    telemetry.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "loss/l1": 0.5}
    (events,) = (tmp_path / "events").iterdir()
    assert b"loss/l1" in events.read_bytes() and b"\x89PNG" in events.read_bytes()
    line = capsys.readouterr().out
    assert line.startswith("step 2/10  ") and "steps/s" in line and "left  loss 0.5" in line


def test_a_resumed_run_drops_what_it_computes_again_and_a_line_cut_short(tmp_path):
    rows = [{"step": step, "loss/l1": step / 10} for step in (1, 2, 3, 4)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "metrics.jsonl").write_text(lines + '{"step": 5, "loss')
    telemetry = Telemetry(tmp_path, 2, 10)
    telemetry.scalars(3, {"loss/l1": 7.0})
    telemetry.close()
    logged = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert logged == [*rows[:2], {"step": 3, "loss/l1": 7.0}]


def test_paused_time_does_not_count_in_the_rate(tmp_path, capsys, monkeypatch):
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    telemetry = Telemetry(tmp_path, 0, 30)
    now = 2.0
    with telemetry.paused():
        now = 100.0
    telemetry.line(10, "")
    assert "step 10/30  5.00 steps/s  00:04 left" in capsys.readouterr().out


def test_other_processes_write_nothing(tmp_path, capsys):
    telemetry = Telemetry(tmp_path, 0, 10, enabled=False)
    telemetry.scalars(1, {"loss": 1.0})
    telemetry.line(1, "words")
    telemetry.close()
    assert not list(tmp_path.iterdir()) and capsys.readouterr().out == ""


def test_a_run_from_trained_weights_compares_its_end_with_its_start(tmp_path, capsys):
    for start in (0, 0, 2):  # killed before its first checkpoint, then after its first
        telemetry = Telemetry(tmp_path, start, 4)
        if start == 0:
            telemetry.scalars(0, {"validation/psnr": 17.6, "validation/rFID": 9.0, "validation/images": 8})
        telemetry.scalars(start + 2, {"loss/total": 1.0})
        telemetry.scalars(start + 2, {"validation/psnr": 18.0 + start, "validation/images": 8})
        telemetry.report_gain()
        telemetry.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 2, 2, 4, 4]
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("before")]
    assert said[0] == said[1] == "before and after 2 steps: validation/psnr 17.6 -> 18"
    assert said[2] == "before and after 4 steps: validation/psnr 17.6 -> 20"
