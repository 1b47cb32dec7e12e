"""How long the disturbed runs are, how often they are killed, and the record of what became of them."""

import os
from pathlib import Path

import pytest

from support.jobs import CALM

STEPS = 40
FEW = os.environ.get("IBQ_FAULTS") == "few"
KILLS = 1 if FEW else 20
not_few = pytest.mark.skipif(FEW, reason="one of many: IBQ_FAULTS=few")
PACE = (CALM, f"train.steps={STEPS}", "evaluate.every=20", "log.images_every=20")


class Trials:
    """Of one test. What it tells goes with its report, since other processes may run it."""

    def __init__(self, record, folder: Path):
        self._record, self._folder = record, folder

    def injected(self, fault: str, said: str) -> None:
        """Once for each time that it was; `said` is the line that tells a person."""
        self._record("injected", (fault, said.replace(f"{self._folder}/", "")))

    def recovered(self, fault: str) -> None:
        """All of those that were injected so far."""
        self._record("recovered", fault)
