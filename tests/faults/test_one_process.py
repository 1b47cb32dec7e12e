"""Faults in a run of one process; the same command then ends it as if nothing had happened."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from support.jobs import ended, finished, last_step, lines, wait_for_step
from support.trials import STEPS, not_few

from ibq_jax.data.store import find_dataset

INJECTED = str(Path(__file__).parent / "injected.py")
pytestmark = pytest.mark.slow


@pytest.fixture
def run(start, command, tmp_path):
    """Starts the run under tmp_path, in one process; ended() and wait_for_step() take what it returns."""
    return lambda *overrides, **options: start(command(tmp_path / "run", *overrides), devices=1, **options)


def test_sigterm(run, undisturbed, trials, tmp_path):
    job, workdir = run(), tmp_path / "run"
    wait_for_step(job, workdir, 5)
    job[0].send_signal(signal.SIGTERM)
    [(code, out)] = ended(job)
    said = out.splitlines()[-1]
    assert code == 128 + signal.SIGTERM and said.startswith("ibq_jax train: SIGTERM: saved step "), out
    saved = int(said.partition("saved step ")[2].split()[0])
    assert 5 < saved < STEPS and (workdir / "checkpoints" / str(saved)).is_dir()
    trials.injected("SIGTERM", said)
    assert f"continuing from step {saved}" in finished(run())
    assert lines(workdir) == undisturbed
    trials.recovered("SIGTERM")


def test_a_truncated_checkpoint(run, undisturbed, trials, tmp_path):
    checkpoints = tmp_path / "run" / "checkpoints"
    finished(run("train.steps=20"))
    files = [path for path in (checkpoints / "20").rglob("*") if path.is_file()]
    os.truncate(max(files, key=lambda path: path.stat().st_size), 100)
    out = finished(run())
    said = f"checkpoint {checkpoints}/20 is not whole"
    assert said in out and "continuing from step 16" in out and (checkpoints / "broken" / "20").is_dir(), out
    trials.injected("a truncated checkpoint file", next(line for line in out.splitlines() if said in line))
    # The shorter run evaluated at its end, as the longer one does at step 20.
    assert lines(tmp_path / "run") == undisturbed
    trials.recovered("a truncated checkpoint file")


def test_a_full_disk(run, undisturbed, trials, tmp_path):
    workdir = tmp_path / "run"
    workdir.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", workdir], capture_output=True)
    if mounted.returncode:
        pytest.skip("only root can mount a small disk")
    try:
        [(code, out)] = ended(run())
        said = out.splitlines()[-1]
        assert code == 2 and "Traceback" not in out, out
        assert said.startswith("ibq_jax train: cannot write a checkpoint under "), out
        trials.injected("a full disk", said)
        subprocess.run(["mount", "-o", "remount,size=200m", workdir], check=True)
        finished(run())
        assert lines(workdir) == undisturbed
        trials.recovered("a full disk")
    finally:
        subprocess.run(["umount", workdir], check=True)


def test_a_corrupt_record_in_the_data(run, undisturbed, trials, data_dir, tmp_path):
    damaged = tmp_path / "data"
    shutil.copytree(data_dir, damaged)
    shard = next(find_dataset("openmoji", damaged).glob("*-train.array_record*"))
    with shard.open("r+b") as file:
        file.seek(shard.stat().st_size // 2)
        file.write(b"\x55" * 40_000)
    [(code, out)] = ended(run(f"data.dir={damaged}"))
    said = out.splitlines()[-1]
    assert code == 2 and "Traceback" not in out and "is damaged" in said and str(damaged) in said, out
    trials.injected("a corrupt record in the data", said)
    finished(run())  # with the data mended
    assert lines(tmp_path / "run") == undisturbed
    trials.recovered("a corrupt record in the data")


@not_few
def test_a_batch_of_nan(run, undisturbed, trials, tmp_path):
    [(code, out)] = ended(run(program=(INJECTED, "nan_batch")))
    said = out.splitlines()[-1]
    assert code == 1 and said.startswith("ibq_jax train: step 10: ") and "is not finite" in said, out
    assert (tmp_path / "run" / "stopped_step10_process0.json").exists()
    trials.injected("a NaN batch", said)
    assert "continuing from step 8" in finished(run())
    assert lines(tmp_path / "run") == undisturbed
    trials.recovered("a NaN batch")


@not_few
def test_clock_jumps(run, undisturbed, trials, tmp_path):
    out = finished(run(program=(INJECTED, "clock_jumps")))
    trials.injected("the clock jumps back an hour, on a day", "nothing")
    assert "watchdog" not in out and "no heartbeat" not in out
    assert lines(tmp_path / "run") == undisturbed
    trials.recovered("the clock jumps back an hour, on a day")


@pytest.fixture
def stalled(run, tmp_path):
    """Starts a run whose input comes from a worker, and stops that; returns the job and the worker's process."""
    stopped = []

    def stalled(*overrides: str):
        job = run("data.num_workers=1", "watchdog.slow_factor=5.0", "watchdog.slow_seconds=2.0", *overrides)
        wait_for_step(job, tmp_path / "run", 5)
        [worker] = [child for child in children(job[0].pid) if b"spawn_main" in command_line(child)]
        stopped.append(worker)
        os.kill(worker, signal.SIGSTOP)
        return job, worker

    yield stalled
    for worker in stopped:
        if b"spawn_main" in command_line(worker):
            os.kill(worker, signal.SIGKILL)


def children(pid: int) -> list[int]:
    return [int(child) for path in Path(f"/proc/{pid}/task").glob("*/children") for child in path.read_text().split()]


def command_line(pid: int) -> bytes:
    path = Path(f"/proc/{pid}/cmdline")
    return path.read_bytes() if path.exists() else b""


def test_a_stalled_input_worker(stalled, undisturbed, trials, tmp_path):
    job, worker = stalled()
    stacks, step = tmp_path / "run" / "stacks_process0.txt", 0
    while not stacks.exists():
        assert job[0].poll() is None, ended(job)
        time.sleep(0.1)
    step = last_step(tmp_path / "run")
    os.kill(worker, signal.SIGCONT)
    said = next(line for line in finished(job).splitlines() if "watchdog: " in line)
    assert "in 'data', usually " in said and step < STEPS
    trials.injected("a stalled input worker, for a while", said)
    assert lines(tmp_path / "run") == undisturbed
    trials.recovered("a stalled input worker, for a while")


@not_few
def test_an_input_worker_that_stays_stalled(stalled, run, undisturbed, trials, tmp_path):
    job, _ = stalled("watchdog.hang_seconds=8.0")
    [(code, out)] = ended(job)
    said = next(line for line in out.splitlines() if "ended, the same command continues" in line)
    assert code == 1 and said.startswith("watchdog: ") and "Traceback" not in out, out
    trials.injected("a stalled input worker, for good", said)
    finished(run())
    assert lines(tmp_path / "run") == undisturbed
    trials.recovered("a stalled input worker, for good")


def test_a_killed_run_leaves_no_input_worker_behind(run, tmp_path):
    job = run("data.num_workers=1")
    wait_for_step(job, tmp_path / "run", 1)
    workers = [child for child in children(job[0].pid) if b"spawn_main" in command_line(child)]
    job[0].kill()
    ended(job)
    assert len(workers) == 1
    for _ in range(100):
        if not command_line(workers[0]):
            return
        time.sleep(0.1)
    raise AssertionError("the worker lives on")
