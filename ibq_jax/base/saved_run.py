"""A run found on disk: its config and its checkpoints.

workdir/config.json     the resolved config          workdir/checkpoints/    Orbax, one folder a step
workdir/metrics.jsonl   every logged scalar          workdir/events/         the same for TensorBoard, with images
workdir/timing.jsonl    where the time went          workdir/stacks_*.txt    of all threads, when something hung
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
from ml_collections import ConfigDict

from ibq_jax.base.checkpoint import Checkpoints, Restored, everything
from ibq_jax.base.config import read_config, renamed_leaves
from ibq_jax.base.errors import UsageError
from ibq_jax.base.files import resolve
from ibq_jax.base.sharding import abstract_state

IMPORTED = "imported.json"  # in a run that was made of a file of weights: where they come from


def open_checkpoints(workdir: Path, config: ConfigDict) -> Checkpoints:
    """The checkpoints of a run, kept as its config says."""
    checkpoint = config.checkpoint
    return Checkpoints(
        workdir / "checkpoints",
        keep_last=checkpoint.keep_last,
        keep_best=checkpoint.keep_best,
        best_metric=checkpoint.best_metric,
        renamed=renamed_leaves(config.stage),
    )


def total_steps(config: ConfigDict, steps_per_epoch: int) -> int:
    """train.steps, or where that is 0 train.epochs in steps."""
    return config.train.steps or config.train.epochs * steps_per_epoch


@dataclass(frozen=True)
class SavedRun:
    """A run found on disk: its config, and the checkpoint that was asked for (None: the newest whole one)."""

    workdir: Path
    config: ConfigDict
    step: int | None

    @classmethod
    def find(cls, path: Path, stage: str = "", needed: str = "") -> "SavedRun":
        """From a run's folder, or one step's folder under its `checkpoints/`.

        Raises UsageError when there is none, or it is not of the `stage` asked for, which `needed` names in words.
        """
        path = resolve(path)
        step = int(path.name) if path.name.isdigit() and path.parent.name == "checkpoints" else None
        workdir = path if step is None else path.parent.parent
        config = read_config(workdir / "config.json")
        if stage and config.stage != stage:
            raise UsageError(f"{workdir} is a run of stage {config.stage!r}; this needs {needed}")
        return cls(workdir, config, step)

    def restore(self, create_state: Callable, mesh: jax.sharding.Mesh, whole: bool = False) -> Restored:
        """The saved state on `mesh`, whatever mesh the run had: unless it is wanted `whole`, without the optimizers'
        moments. What is not wanted, or was not saved, is None.

        Raises UsageError when nothing is saved yet.
        """
        checkpoints = self._open()
        shapes, _ = abstract_state(create_state, mesh, self.config.seed)
        wanted = everything if whole else _no_moment
        if self.step is None:
            return checkpoints.restore(shapes, wanted=wanted)
        return checkpoints.restore_step(self.step, shapes, wanted)

    def saved_step(self) -> int:
        """The step asked for, or the newest. Raises UsageError when nothing is saved yet."""
        steps = self._open().steps
        return steps[-1] if self.step is None else self.step

    def _open(self) -> Checkpoints:
        if not (self.workdir / "checkpoints").is_dir():
            raise UsageError(f"{self.workdir} has no checkpoint yet")
        checkpoints = open_checkpoints(self.workdir, self.config)
        if not checkpoints.steps or (self.step is not None and self.step not in checkpoints.steps):
            where = self.workdir if self.step is None else self.workdir / "checkpoints" / str(self.step)
            raise UsageError(f"{where} has no checkpoint; the steps saved are {checkpoints.steps}")
        return checkpoints


def _no_moment(name: str) -> bool:
    return "optimizer" not in name.split("/")
