"""The phases of a run, goodput over restarts, and the watchdog that reports overlong phases."""

import json
import subprocess
import sys
import time

import pytest

from ibq_jax.base.timing import STEP, PhaseTimer, Timeline, goodput, read_timeline, shares
from ibq_jax.base.watchdog import Watchdog


def test_a_nested_phase_is_not_counted_twice():
    now = 0.0
    timer = PhaseTimer(clock=lambda: now)
    now = 1.0
    with timer("outer"):
        now = 3.0
        with timer("inner"):
            now = 7.0
            assert timer.now == ("inner", 4.0)
        now = 8.0
        assert timer.now == ("outer", 7.0)
    assert timer.take() == {"other": 1.0, "outer": 3.0, "inner": 4.0}
    assert sum(timer.take().values()) == 0.0


def row(step, seconds, wall, start=False):
    return {"step": step, "wall": wall, "start": start, "seconds": seconds}


def test_goodput_excludes_repeated_steps_and_counts_the_time_between_starts():
    rows = [
        row(0, {}, 100.0, start=True),
        row(10, {"first step": 5.0, STEP: 10.0}, 115.0),
        row(20, {STEP: 10.0}, 125.0),
        row(15, {}, 135.0, start=True),  # killed after step 20, with the checkpoint of step 15
        row(25, {STEP: 10.0, "checkpoint": 5.0}, 150.0),
    ]
    assert goodput(rows) == pytest.approx((10 + 5 + 10) / (15 + 10 + 10 + 15))
    rows[3]["wall"] = 3.0  # a wall clock that was set back subtracts nothing
    assert goodput(rows) == pytest.approx((10 + 5 + 10) / (15 + 10 + 15))
    assert shares(rows)[STEP] == pytest.approx(30 / 40) and goodput([]) == 0.0


def test_a_row_that_a_kill_cut_short_is_skipped(tmp_path):
    Timeline(tmp_path / "timing.jsonl").add(3, {STEP: 1.0})
    with (tmp_path / "timing.jsonl").open("a") as file:
        file.write('{"step": 4, "wa')
    assert [found["step"] for found in read_timeline(tmp_path / "timing.jsonl")] == [3]


def test_an_overlong_phase_is_reported_once_with_the_stacks(tmp_path):
    timer, reported = PhaseTimer(), []
    for _ in range(3):
        with timer("data"):
            pass
    with Watchdog(timer, tmp_path / "stacks.txt", factor=10, seconds=0.2, hang_seconds=0, say=reported.append):
        with timer("data"):
            time.sleep(1.0)
    assert len(reported) == 1 and "in 'data', usually" in reported[0], reported
    assert "test_timing.py" in (tmp_path / "stacks.txt").read_text()


def test_a_hang_ends_the_process_with_a_message(tmp_path):
    program = f"""
import time
from pathlib import Path
from ibq_jax.base.timing import PhaseTimer
from ibq_jax.base.watchdog import Watchdog
timer = PhaseTimer()
stacks = Path({json.dumps(str(tmp_path))}) / "stacks.txt"
with Watchdog(timer, stacks, factor=10, seconds=60, hang_seconds=1, say=print):
    with timer("data"):
        time.sleep(60)
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=50)
    assert found.returncode == 1 and found.stderr.startswith("watchdog: 1 s in 'data'; stacks in "), found.stderr
    assert "time.sleep" not in found.stdout and (tmp_path / "stacks.txt").exists()
