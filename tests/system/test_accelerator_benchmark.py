"""The benchmark for accelerators runs on a CPU, shrunk: every part, its table and its JSON."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, str(ROOT / "tests/benchmarks/accelerator.py"), "--shrunk"]


def run(*flags: str) -> str:
    done = subprocess.run(
        [*COMMAND, *flags], env=os.environ | {"JAX_PLATFORMS": "cpu"}, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_every_part_is_measured(tmp_path):
    out = run(f"--json={tmp_path}/results.json")
    report = json.loads((tmp_path / "results.json").read_text())
    rows = {(row["part"], row["case"]): row for row in report["rows"]}
    assert report["platform"] == "cpu" and report["size"] == "shrunk"
    assert {part for part, _ in rows} == {"tokenizer", "quantizer", "sampler", "encode", "generator", "codes", "start"}
    for (part, case), row in rows.items():
        assert f"| {case} | " in out and not row["note"].startswith("left out")
        assert part == "codes" or row["seconds"] > 0
        if part in ("tokenizer", "generator", "sampler", "encode"):
            assert row["rate"] > 0 and row["peak_bytes"] > 0 and row["flops"] > 0
    assert rows["codes", "codes at float32 that differ from a CPU's at float32"]["rate"] == 0
    first, second = (int(row["note"].split()[0]) for (part, _), row in rows.items() if part == "start")
    assert first > 0 and second == 0  # programs compiled


def test_what_there_is_no_time_for_is_left_out():
    out = run("--parts", "sampler", "codes", "--seconds=-1")
    assert "| 2 images, with guidance | left out: no time |" in out and out.count("left out: no time |") == 3
