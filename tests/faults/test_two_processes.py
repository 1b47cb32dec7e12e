"""Faults in a run of two processes: the survivors report the fault, and the same command continues."""

import random
import signal
import time
from pathlib import Path

import pytest
from support.jobs import ended, finished, last_step, lines, wait_for_step
from support.trials import KILLS, STEPS_OF_TWO, not_few

pytestmark = pytest.mark.slow
SECONDS_UNTIL_SAID = 30  # IBQ_PEER_TIMEOUT is 5, and where one has not come yet IBQ_START_TIMEOUT 20


@pytest.fixture
def run(start_two, tmp_path):
    """Starts the run under tmp_path, in two processes with a device each."""
    return lambda: start_two(tmp_path / "run", IBQ_START_TIMEOUT="20")


def wait_for_a_save(job: list, workdir: Path) -> None:
    """Until a checkpoint is half-written."""
    while not list(workdir.glob("checkpoints/*tmp*")):
        assert all(process.poll() is None for process in job), ended(job)
        time.sleep(0.001)


def kill_and_continue(run, workdir: Path, trials, fault: str, victims) -> None:
    """Kills `victims(chance)` of the two processes, time after time and each further on, the last ones while they
    start; every third while a checkpoint is written.
    """
    chance = random.Random(fault)
    places = sorted(chance.sample(range(1, STEPS_OF_TWO - 4), KILLS - KILLS // 10))
    for number, place in enumerate(places + [0] * (KILLS // 10)):
        job, killed = run(), victims(chance)
        if place:
            wait_for_step(job, workdir, place)
        else:
            time.sleep(chance.uniform(0.5, 8))
        if place and number % 3 == 0:
            wait_for_a_save(job, workdir)
        else:
            time.sleep(chance.uniform(0, 0.2))
        for index in killed:
            job[index].send_signal(signal.SIGKILL)
        since = time.monotonic()
        results = ended(job)
        said = "nothing: nobody is left"
        for index in {0, 1} - set(killed):
            code, out = results[index]
            said = out.splitlines()[-1]
            assert code == 1 and "process" in said, out
            assert time.monotonic() - since < SECONDS_UNTIL_SAID, out
        trials.injected(fault, said)
        assert last_step(workdir) < STEPS_OF_TWO
    finished(run())


def test_one_is_killed(run, undisturbed_pair, trials, tmp_path):
    fault = "SIGKILL of one process of two"
    kill_and_continue(run, tmp_path / "run", trials, fault, lambda chance: [chance.randrange(2)])
    assert lines(tmp_path / "run") == undisturbed_pair
    trials.recovered(fault)


@not_few
def test_both_are_killed(run, undisturbed_pair, trials, tmp_path):
    fault = "SIGKILL of both processes"
    kill_and_continue(run, tmp_path / "run", trials, fault, lambda chance: [0, 1])
    assert lines(tmp_path / "run") == undisturbed_pair
    trials.recovered(fault)


def test_one_is_asked_to_stop(run, undisturbed_pair, trials, tmp_path):
    job, workdir = run(), tmp_path / "run"
    wait_for_step(job, workdir, 5)
    job[1].send_signal(signal.SIGTERM)
    results = ended(job)
    assert [code for code, _ in results] == [143, 143], results
    said = results[0][1].splitlines()[-1]
    assert "SIGTERM: saved step" in said and "SIGTERM: saved step" in results[1][1], results
    trials.injected("SIGTERM to one process of two", said)
    finished(run())
    assert lines(workdir) == undisturbed_pair
    trials.recovered("SIGTERM to one process of two")


@not_few
def test_one_never_comes(start, command, run, undisturbed_pair, trials, tmp_path):
    [(code, out)] = ended(start(command(tmp_path / "run"), count=2, IBQ_START_TIMEOUT="3"))
    said = out.splitlines()[-1]
    assert code == 1 and "process 0 of 2 waited 3 s at localhost:" in said, out
    assert not (tmp_path / "run").exists()
    trials.injected("a peer that never comes", said)
    finished(run())
    assert lines(tmp_path / "run") == undisturbed_pair
    trials.recovered("a peer that never comes")
