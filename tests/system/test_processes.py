"""Several processes (jax.distributed on the CPU) train as one, go on elsewhere, and do not start where they differ.

What they do when one of them is stopped, killed or absent is tested in tests/faults.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from support.jobs import CALM, ended, finished, lines
from support.small_runs import STEPS, arguments, generator_arguments

from ibq_jax.__main__ import main
from ibq_jax.base.errors import UsageError
from ibq_jax.base.processes import JobPosition
from ibq_jax.data.token_cache import open_token_cache

CORES = """
import os
from ibq_jax.base.processes import join, leave
join("test", stop_together=False)
print("XLA has", os.environ["NPROC"])
leave()
"""


def check_close(workdir: Path, other: Path) -> None:
    ours, theirs = lines(workdir), lines(other)
    assert len(ours) == len(theirs) > STEPS
    for one, two in zip(map(json.loads, ours), map(json.loads, theirs), strict=True):
        assert one.keys() == two.keys()
        for name, value in two.items():
            np.testing.assert_allclose(one[name], value, rtol=1e-5, atol=1e-5, err_msg=f"step {two['step']}: {name}")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, data_dir, start):
    """A run of one process with eight devices."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    finished(start(arguments(workdir, data_dir, CALM), devices=8))
    return workdir


@pytest.mark.long
@pytest.mark.parametrize("processes", [2, 4])
def test_several_processes_train_as_one(processes, whole, start, data_dir, tmp_path):
    workdir = tmp_path / "run"
    devices = 8 // processes
    results = ended(start(*[arguments(workdir, data_dir, CALM)] * processes, devices=devices))
    assert [code for code, _ in results] == [0] * processes, results
    layout = f"{processes} processes, 8 devices (cpu), {devices} each; mesh data=8 (over {processes} processes)"
    assert layout in results[0][1] and "step 12/12" in results[0][1]
    assert all("step 12/12" not in out for _, out in results[1:])
    check_close(workdir, whole)


@pytest.mark.slow
def test_a_checkpoint_goes_on_elsewhere_and_back(whole, start, data_dir, tmp_path):
    workdir = tmp_path / "moved"
    for steps, processes, devices, mesh in ((2, 2, 4, 4), (4, 1, 2, 1), (6, 2, 4, 4)):
        fields = (CALM, f"train.steps={steps}", f"mesh.codebook={mesh}")
        finished(start(*[arguments(workdir, data_dir, *fields)] * processes, devices=devices))
    losses = [
        {json.loads(line)["step"]: json.loads(line)["loss/total"] for line in lines(run) if "loss/total" in line}
        for run in (workdir, whole)
    ]
    assert losses[0].keys() == {1, 2, 3, 4, 5, 6}
    assert losses[0] == pytest.approx({step: losses[1][step] for step in losses[0]}, rel=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("processes", [2, 4])
def test_the_whole_chain_in_several_processes(processes, whole, start, data_dir, tmp_path):
    """Each command, on what one process made before it, does what one process does."""
    one, several = tmp_path / "one", tmp_path / "several"
    outs = {one: 1, several: processes}

    def in_both(command) -> None:
        for out, count in outs.items():
            finished(start(*[command(out)] * count, devices=8 // count))

    splits = "--splits=train[:96],validation[:40]"
    in_both(lambda out: ["tokenize", f"--tokenizer={whole}", f"--out={out}/codes", splits])
    codes = [[open_token_cache(out / "codes", split) for out in outs] for split in ("train", "validation")]
    for ours, theirs in codes:
        assert len(ours) == len(theirs) > 0
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(a["codes"], b["codes"])
    in_both(lambda out: generator_arguments(out / "ar", one / "codes", CALM, f"tokenizer={whole}"))
    check_close(one / "ar", several / "ar")
    in_both(lambda out: ["sample", f"--run={one}/ar", "--num=40", f"--out={out}/samples.npz"])
    pictures = [np.load(out / "samples.npz")["arr_0"] for out in outs]
    assert pictures[0].shape == pictures[1].shape == (40, 16, 16, 3)
    assert np.mean(pictures[0] == pictures[1]) > 0.999  # rounding to uint8 may go the other way
    for run in (whole, one / "ar"):
        in_both(lambda out, run=run: ["evaluate", f"--run={run}", f"--json={out}/{run.name}.json"])
        ours, theirs = (json.loads((out / f"{run.name}.json").read_text())["metrics"] for out in outs)
        assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.slow
def test_processes_of_different_configs_or_devices_do_not_start(start, data_dir, tmp_path):
    workdir = tmp_path / "run"
    for other, words in (
        (arguments(workdir, data_dir, "seed=1"), "configs differ: process 1 on "),
        (["evaluate", "--run=nowhere"], "processes differ: process 1 on "),
    ):
        results = ended(start(arguments(workdir, data_dir), other))
        assert [code for code, _ in results] == [2, 2] and all(words in out for _, out in results), results
        assert not workdir.exists()


@pytest.mark.slow
@pytest.mark.parametrize("asked", [{}, {"NPROC": "7"}])
def test_processes_on_the_same_cores_share_them(asked, start, monkeypatch):
    monkeypatch.delenv("NPROC", raising=False)
    cores = asked.get("NPROC", max(1, len(os.sched_getaffinity(0)) // 2))
    for code, out in ended(start([], [], program=("-c", CORES), **asked)):
        assert code == 0 and f"XLA has {cores}\n" in out, out


@pytest.mark.parametrize("text", ["two", "host,2,0", "host:1,2,2", "host:1,2", "host:1,2,-1"])
def test_a_malformed_job_position_is_refused(text, monkeypatch):
    monkeypatch.setenv("IBQ_PROCESSES", text)
    with pytest.raises(UsageError, match=f"IBQ_PROCESSES={text}"):
        JobPosition.from_environment()


def test_commands_of_one_process_refuse_to_be_several(monkeypatch, capsys):
    monkeypatch.setenv("IBQ_PROCESSES", "localhost:1,2,0")
    assert main(["report", "--workdir=x"]) == 2
    assert "runs in a single process only; unset IBQ_PROCESSES" in capsys.readouterr().err
