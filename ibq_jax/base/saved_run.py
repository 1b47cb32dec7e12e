"""Saved runs on disk: their config and their checkpoints. The folder of a run holds

config.json      the resolved config            checkpoints/    Orbax checkpoints, one folder per step
metrics.jsonl    every logged scalar            events/         the same for TensorBoard, with images
timing.jsonl     seconds per phase              stacks_*.txt    stacks of all threads, written when a phase hung
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
from ml_collections import ConfigDict

from ibq_jax.base.checkpoint import Checkpoints, Restored, every_leaf
from ibq_jax.base.config import flatten, read_config, renamed_leaves
from ibq_jax.base.errors import UsageError
from ibq_jax.base.files import resolve
from ibq_jax.base.sharding import abstract_state

IMPORTED = "imported.json"  # in a run that was made from a file of weights: where the weights come from


def open_checkpoints(workdir: Path, config: ConfigDict) -> Checkpoints:
    """Opens the checkpoints of a run, with the retention policy of its config."""
    checkpoint = config.checkpoint
    return Checkpoints(
        workdir / "checkpoints",
        keep_last=checkpoint.keep_last,
        keep_best=checkpoint.keep_best,
        best_metric=checkpoint.best_metric,
        renamed=renamed_leaves(config.stage),
    )


def total_steps(config: ConfigDict, steps_per_epoch: int) -> int:
    """Returns train.steps, or train.epochs in steps if train.steps is 0."""
    return config.train.steps or config.train.epochs * steps_per_epoch


@dataclass(frozen=True)
class SavedRun:
    """A run on disk: its folder, its config, and the requested step (None: the newest whole checkpoint)."""

    workdir: Path
    config: ConfigDict
    step: int | None

    @classmethod
    def find(cls, path: Path, stage: str = "", needed: str = "") -> "SavedRun":
        """Finds a run by its folder, or by one step's folder under its `checkpoints/`.

        Args:
            path: the folder.
            stage: the required stage; "" accepts any.
            needed: that stage in words, for the error message.

        Raises:
            UsageError: there is no run, or it is of another stage.
        """
        path = resolve(path)
        step = int(path.name) if path.name.isdigit() and path.parent.name == "checkpoints" else None
        workdir = path if step is None else path.parent.parent
        config = read_config(workdir / "config.json")
        if stage and config.stage != stage:
            inner = [f"; {folder} is one" for folder in _runs_inside(workdir, stage)]
            raise UsageError(f"{workdir} is a run of stage {config.stage!r}; this needs {needed}{''.join(inner)}")
        return cls(workdir, config, step)

    def restore(self, create_state: Callable, mesh: jax.sharding.Mesh, with_optimizer: bool = False) -> Restored:
        """Returns the saved state on `mesh`, whatever mesh the run had.

        Leaves of the optimizers are None unless `with_optimizer`, as are leaves that were not saved.

        Raises:
            UsageError: nothing is saved yet, or not the requested step.
        """
        checkpoints = self._open()
        shapes, _ = abstract_state(create_state, mesh, self.config.seed, spread_out=False)
        select = every_leaf if with_optimizer else _is_not_of_an_optimizer
        if self.step is None:
            newest = checkpoints.restore(shapes, select=select)
            assert newest is not None  # _open found one
            return newest
        return checkpoints.restore_step(self.step, shapes, select)

    def saved_step(self) -> int:
        """Returns the requested step, or the newest one. Raises UsageError if nothing is saved yet."""
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


def _runs_inside(workdir: Path, stage: str) -> list[Path]:
    """Returns the runs of a stage that the folder of another run has, as that of a joint run does."""
    configs = sorted(workdir.glob("*/config.json"))
    return [path.parent for path in configs if flatten(read_config(path)).get("stage") == stage]


def _is_not_of_an_optimizer(name: str) -> bool:
    return "optimizer" not in name.split("/")
