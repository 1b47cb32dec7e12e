"""Several processes (jax.distributed on the CPU) train as one, stop together, end together, and go on elsewhere.

Those that train are left to an idle machine (-m long): where several tests share two cores, one process may compile for
so much longer than the other that a collective on the CPU gives up waiting.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from small_runs import ROOT, STEPS, arguments

from ibq_jax.__main__ import main
from ibq_jax.base.errors import UsageError
from ibq_jax.base.processes import Place

CALM = "optimizer.learning_rate=1e-5"  # larger ones make Adam's first steps chaotic: rounding decides their signs


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture
def start(cache):
    """Starts the processes of a job, each with the arguments given for it; they are killed in the end."""
    started = []

    def start(*argvs: list[str], count: int | None = None, devices: int = 4, **environment: str):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        several = len(argvs) > 1 or count
        for index, argv in enumerate(argvs):
            place = f"localhost:{port},{count or len(argvs)},{index}" if several else ""
            settings = {
                "IBQ_PROCESSES": place,
                "IBQ_PEER_TIMEOUT": "5",
                "JAX_NUM_CPU_DEVICES": str(devices),
                "JAX_COMPILATION_CACHE_DIR": str(cache),
            }
            started.append(
                subprocess.Popen(
                    [sys.executable, "-m", "ibq_jax", *argv],
                    cwd=ROOT,
                    env=os.environ | settings | environment,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )
        return started[-len(argvs) :]

    yield start
    for process in started:
        process.kill()


def ended(processes: list[subprocess.Popen]) -> list[tuple[int, str]]:
    """(exit code, output) of each."""
    return [(process.returncode, out) for process in processes for out, _ in [process.communicate(timeout=300)]]


def lines(workdir: Path) -> list[str]:
    path = workdir / "metrics.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def wait_for_step(processes: list[subprocess.Popen], workdir: Path, step: int) -> None:
    while sum("loss/total" in line for line in lines(workdir)) < step:
        assert all(process.poll() is None for process in processes), ended(processes)
        time.sleep(0.02)


def check_close(workdir: Path, other: Path) -> None:
    ours, theirs = lines(workdir), lines(other)
    assert len(ours) == len(theirs) > STEPS
    for one, two in zip(map(json.loads, ours), map(json.loads, theirs), strict=True):
        assert one.keys() == two.keys()
        for name, value in two.items():
            np.testing.assert_allclose(one[name], value, rtol=1e-5, atol=1e-5, err_msg=f"step {two['step']}: {name}")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, data_dir, cache):
    """A run of one process with eight devices that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "8", "JAX_COMPILATION_CACHE_DIR": str(cache)}
    command = [sys.executable, "-m", "ibq_jax", *arguments(workdir, data_dir, CALM)]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    return workdir


@pytest.mark.long
def test_two_processes_train_as_one_and_go_on_to_the_bit_after_a_stop_and_a_kill(whole, start, data_dir, tmp_path):
    undisturbed, workdir = tmp_path / "undisturbed", tmp_path / "disturbed"
    results = ended(start(*[arguments(undisturbed, data_dir, CALM)] * 2))
    assert [code for code, _ in results] == [0, 0], results
    assert "2 processes, 8 devices (cpu), 4 each; mesh data=8 (over 2 processes)" in results[0][1]
    assert "step 12/12" in results[0][1] and "step 12/12" not in results[1][1]
    check_close(undisturbed, whole)

    job = start(*[arguments(workdir, data_dir, CALM)] * 2)
    wait_for_step(job, workdir, 5)
    job[1].send_signal(signal.SIGTERM)  # one of them
    results = ended(job)
    assert [code for code, _ in results] == [143, 143], results
    assert "SIGTERM: saved step" in results[0][1] and "SIGTERM: saved step" in results[1][1]

    job = start(*[arguments(workdir, data_dir, CALM)] * 2)
    wait_for_step(job, workdir, 9)
    job[1].send_signal(signal.SIGKILL)
    (code, out), _ = ended(job)
    assert code == 1 and "process 1 of 2 on " in out and "gave no sign of life for 5 s" in out, out

    results = ended(start(*[arguments(workdir, data_dir, CALM)] * 2))
    assert [code for code, _ in results] == [0, 0] and "continuing from step " in results[0][1], results
    assert lines(workdir) == lines(undisturbed)


@pytest.mark.long
def test_a_checkpoint_goes_on_elsewhere_and_back(whole, start, data_dir, tmp_path):
    workdir = tmp_path / "moved"
    for steps, processes, devices, mesh in ((4, 2, 4, 4), (8, 1, 2, 1), (STEPS, 2, 4, 4)):
        fields = (CALM, f"train.steps={steps}", f"mesh.codebook={mesh}")
        results = ended(start(*[arguments(workdir, data_dir, *fields)] * processes, devices=devices))
        assert [code for code, _ in results] == [0] * processes, results
    losses = [
        {json.loads(line)["step"]: json.loads(line)["loss/total"] for line in lines(run) if "loss/total" in line}
        for run in (workdir, whole)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.long
def test_processes_of_different_configs_or_devices_do_not_start(start, data_dir, tmp_path):
    workdir = tmp_path / "run"
    for other, words in (
        (arguments(workdir, data_dir, "seed=1"), "configs are not alike: process 1 on "),
        (["evaluate", "--run=nowhere"], "processes are not alike: process 1 on "),
    ):
        results = ended(start(arguments(workdir, data_dir), other))
        assert [code for code, _ in results] == [2, 2] and all(words in out for _, out in results), results
        assert not workdir.exists()


def test_a_peer_that_never_comes_ends_the_others_with_a_message(start, data_dir, tmp_path):
    [(code, out)] = ended(start(arguments(tmp_path / "run", data_dir), count=2, IBQ_START_TIMEOUT="3"))
    assert code == 1 and "process 0 of 2 waited 3 s at localhost:" in out.splitlines()[-1], out


@pytest.mark.parametrize("text", ["two", "host,2,0", "host:1,2,2", "host:1,2", "host:1,2,-1"])
def test_a_place_that_is_none_is_refused(text, monkeypatch):
    monkeypatch.setenv("IBQ_PROCESSES", text)
    with pytest.raises(UsageError, match=f"IBQ_PROCESSES={text}"):
        Place.from_environment()


def test_commands_of_one_process_refuse_to_be_several(monkeypatch, capsys):
    monkeypatch.setenv("IBQ_PROCESSES", "localhost:1,2,0")
    assert main(["report", "--workdir=x"]) == 2
    assert "runs in one process: unset IBQ_PROCESSES" in capsys.readouterr().err
