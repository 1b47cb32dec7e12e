"""Faults injected into training, and the table of what became of them, which pytest prints at its end.

    python -m pytest tests/faults                   everything: 20 kills of one process of two, and 20 of both
    IBQ_FAULTS=few python -m pytest tests/faults    some of it, one kill too, as in CI

A trial ends when the same command, given again until the run is complete, has left the scalars (every step's losses) of
a run that nothing disturbed, equal to the bit.
"""

from collections import Counter
from pathlib import Path

import pytest
from support.jobs import finished, lines
from support.small_runs import arguments
from support.trials import PACE, STEPS, Trials


@pytest.fixture
def trials(record_property, tmp_path):
    return Trials(record_property, tmp_path)


@pytest.fixture(scope="session")
def command(data_dir):
    """The arguments of a run of STEPS steps in a work folder, with overrides."""

    def command(workdir: Path, *overrides: str) -> list[str]:
        return arguments(workdir, data_dir, *PACE, *overrides)

    return command


@pytest.fixture(scope="session")
def undisturbed(start, command, tmp_path_factory):
    """The scalars that one process with one device leaves."""
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    finished(start(command(workdir), devices=1))
    assert len(lines(workdir)) > STEPS
    return lines(workdir)


@pytest.fixture(scope="session")
def undisturbed_pair(start, command, tmp_path_factory):
    """The scalars that two processes with a device each leave."""
    workdir = tmp_path_factory.mktemp("undisturbed") / "pair"
    finished(start(*[command(workdir)] * 2, devices=1))
    assert len(lines(workdir)) > STEPS
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
        terminalreporter.line("| fault | times | ended as undisturbed, to the bit | what is said |\n|---|---|---|---|")
        for fault, times in injected.items():
            terminalreporter.line(f"| {fault} | {times} | {same[fault]} | {said[fault]} |")
