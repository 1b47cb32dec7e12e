"""Injects faults into training, and prints a table of the outcomes at the end of the pytest session.

    python -m pytest tests/faults                   all faults: 20 kills of one process of two, and 20 of both
    IBQ_FAULTS=few python -m pytest tests/faults    fewer faults, with one kill, as in CI

After a fault, the same command is repeated until the run is complete. The run has recovered if its scalars (every
step's losses) equal those of an undisturbed run bit for bit.
"""

from collections import Counter
from pathlib import Path

import pytest
from support.jobs import finished, lines
from support.small_runs import arguments
from support.trials import PACE, STEPS, STEPS_OF_TWO, Trials


@pytest.fixture
def trials(record_property, tmp_path):
    return Trials(record_property, tmp_path)


@pytest.fixture(scope="session")
def command(data_dir):
    """Returns a function: a run folder and overrides -> the arguments of a run, by default of STEPS steps."""

    def command(workdir: Path, *overrides: str) -> list[str]:
        return arguments(workdir, data_dir, *PACE, *overrides)

    return command


@pytest.fixture(scope="session")
def start_two(start, command):
    """Returns a function: a run folder -> the started job, STEPS_OF_TWO steps of two processes with one device each."""

    def start_two(workdir: Path, **environment: str) -> list:
        return start(*[command(workdir, f"train.steps={STEPS_OF_TWO}")] * 2, devices=1, **environment)

    return start_two


@pytest.fixture(scope="session")
def undisturbed(start, command, tmp_path_factory):
    """Returns the scalars of an undisturbed run of one process with one device."""
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    finished(start(command(workdir), devices=1))
    assert len(lines(workdir)) > STEPS
    return lines(workdir)


@pytest.fixture(scope="session")
def undisturbed_pair(start_two, tmp_path_factory):
    """Returns the scalars of an undisturbed run of two processes with one device each."""
    workdir = tmp_path_factory.mktemp("undisturbed") / "pair"
    finished(start_two(workdir))
    assert len(lines(workdir)) > STEPS_OF_TWO
    return lines(workdir)


def pytest_terminal_summary(terminalreporter):
    injected, same, said = Counter(), Counter(), {}
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, []):
            trials = Counter()
            for name, value in report.user_properties:
                if name == "injected":
                    trials[value[0]] += 1
                    said[value[0]] = value[1]
                else:
                    same[value] += trials[value]
            injected += trials
    if injected:
        terminalreporter.section("faults")
        terminalreporter.line(
            "| fault | times | as if undisturbed, bit for bit | what is reported |\n|---|---|---|---|"
        )
        for fault, times in injected.items():
            terminalreporter.line(f"| {fault} | {times} | {same[fault]} | {said[fault]} |")
