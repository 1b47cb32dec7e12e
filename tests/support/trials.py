"""Settings of the fault tests, and the record of which faults were injected and which runs recovered."""

import os
from pathlib import Path

import pytest

from support.jobs import CALM

FEW = os.environ.get("IBQ_FAULTS") == "few"
# A step of two processes, which send each other every gradient by itself, costs both together 0.7 CPU seconds.
STEPS, STEPS_OF_TWO, KILLS = (28, 16, 1) if FEW else (40, 40, 20)
not_few = pytest.mark.skipif(FEW, reason="left out by IBQ_FAULTS=few")
PACE = (CALM, f"train.steps={STEPS}", "evaluate.every=20", "log.images_every=1_000")


class Trials:
    """The faults that one test injected, stored in its report, because another process may run the test."""

    def __init__(self, record, folder: Path):
        self._record, self._folder = record, folder

    def injected(self, fault: str, said: str) -> None:
        """Records one injection of `fault`; `said` is the line that the run printed about it."""
        self._record("injected", (fault, said.replace(f"{self._folder}/", "")))

    def recovered(self, fault: str) -> None:
        """Records that the run recovered from every injection of `fault` so far."""
        self._record("recovered", fault)
