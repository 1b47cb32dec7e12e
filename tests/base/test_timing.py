"""Where the time went: parts of a run, and goodput over restarts; and the watchdog that looks at both."""

import json
import subprocess
import sys
import time

import pytest

from ibq_jax.base.timing import STEP, PhaseTimer, Timeline, goodput, read_timeline, shares
from ibq_jax.base.watchdog import Watchdog


def test_a_part_inside_another_is_not_counted_twice():
    now = 0.0
    parts = PhaseTimer(clock=lambda: now)
    now = 1.0
    with parts("outer"):
        now = 3.0
        with parts("inner"):
            now = 7.0
            assert parts.now == ("inner", 4.0)
        now = 8.0
        assert parts.now == ("outer", 7.0)
    assert parts.take() == {"other": 1.0, "outer": 3.0, "inner": 4.0}
    assert sum(parts.take().values()) == 0.0


def row(step, seconds, wall, start=False):
    return {"step": step, "wall": wall, "start": start, "seconds": seconds}


def test_goodput_leaves_out_what_was_computed_again_and_counts_the_time_between():
    rows = [
        row(0, {}, 100.0, start=True),
        row(10, {"first step": 5.0, STEP: 10.0}, 115.0),
        row(20, {STEP: 10.0}, 125.0),
        row(15, {}, 135.0, start=True),  # killed after step 20, with the checkpoint of step 15
        row(25, {STEP: 10.0, "checkpoint": 5.0}, 150.0),
    ]
    assert goodput(rows) == pytest.approx((10 + 5 + 10) / (15 + 10 + 10 + 15))
    rows[3]["wall"] = 3.0  # a clock that was set back takes nothing away
    assert goodput(rows) == pytest.approx((10 + 5 + 10) / (15 + 10 + 15))
    assert shares(rows)[STEP] == pytest.approx(30 / 40) and goodput([]) == 0.0


def test_a_row_that_a_kill_cut_short_is_passed_over(tmp_path):
    Timeline(tmp_path / "timing.jsonl").add(3, {STEP: 1.0})
    with (tmp_path / "timing.jsonl").open("a") as file:
        file.write('{"step": 4, "wa')
    assert [found["step"] for found in read_timeline(tmp_path / "timing.jsonl")] == [3]


def test_a_long_wait_is_said_once_with_the_stacks(tmp_path):
    parts, said = PhaseTimer(), []
    for _ in range(3):
        with parts("data"):
            pass
    with Watchdog(parts, tmp_path / "stacks.txt", factor=10, seconds=0.2, hang_seconds=0, say=said.append):
        with parts("data"):
            time.sleep(1.0)
    assert len(said) == 1 and "in 'data', usually" in said[0], said
    assert "test_timing.py" in (tmp_path / "stacks.txt").read_text()


def test_what_hangs_is_ended_with_a_message(tmp_path):
    program = f"""
import time
from pathlib import Path
from ibq_jax.base.timing import PhaseTimer
from ibq_jax.base.watchdog import Watchdog
parts = PhaseTimer()
stacks = Path({json.dumps(str(tmp_path))}) / "stacks.txt"
with Watchdog(parts, stacks, factor=10, seconds=60, hang_seconds=1, say=print):
    with parts("data"):
        time.sleep(60)
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=50)
    assert found.returncode == 1 and found.stderr.startswith("watchdog: 1 s in 'data'; stacks in "), found.stderr
    assert "time.sleep" not in found.stdout and (tmp_path / "stacks.txt").exists()
