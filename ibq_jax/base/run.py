"""A run in a work folder, of either stage: claimed, started or continued, trained to the end, found again.

workdir/config.json     the resolved config          workdir/checkpoints/    Orbax, one folder a step
workdir/metrics.jsonl   every logged scalar          workdir/events/         the same for TensorBoard, with pictures
workdir/timing.jsonl    where the time went          workdir/stacks_*.txt    of all threads, when something hung
"""

import sys
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from clu import parameter_overview
from ml_collections import ConfigDict

from ibq_jax.base.checkpoint import Checkpoints, Restored, everything
from ibq_jax.base.config import differences, flatten, read_config, save_config
from ibq_jax.base.errors import UsageError
from ibq_jax.base.files import absolute, is_remote
from ibq_jax.base.loop import Loop, Pace, Stage
from ibq_jax.base.processes import barrier, check_alike
from ibq_jax.base.sharding import abstract_state, create_sharded, describe_mesh
from ibq_jax.base.telemetry import Telemetry
from ibq_jax.base.timing import Parts
from ibq_jax.base.watchdog import Watchdog

IMPORTED = "imported.json"  # in a run that was made of a file of weights: where they come from
ELSEWHERE = ("data.dir", "data.workers", "data.threads", "codes", "tokenizer", "loss.perceptual_file")  # may differ
NETWORKS = ("stage:", "model.", "codebook.", "quantizer.name:")
BESIDE = (
    "model.dropout",
    "model.gamma_init",
    "model.remat",
    "model.attention:",
    "model.codebook_dim",  # where it is of the network, the shapes say so
    "codebook.implementation",
    "codebook.init_scale",
)

Batches = Generator[Mapping[str, np.ndarray]]


def claim(workdir: Path, config: ConfigDict, free_fields: tuple[str, ...]) -> None:
    """Makes `workdir` this config's, or checks that it is; `free_fields` (names, or beginnings) may differ, and of
    imported weights that were not trained on yet all that does not say what the networks are.

    Every process calls it. Raises UsageError naming the other fields that differ, from the run's or between processes.
    """
    fields = {name: value for name, value in flatten(config).items() if name not in ELSEWHERE}
    check_alike("configs", fields | {"workdir": str(workdir)})
    path = workdir / "config.json"
    if path.exists():
        differing = differences(read_config(path), config, ignore=free_fields)
        if (workdir / IMPORTED).exists() and not (workdir / "metrics.jsonl").exists():
            differing = [field for field in differing if field.startswith(NETWORKS) and not field.startswith(BESIDE)]
        if differing:
            raise UsageError(f"{workdir} holds a run of another config ({'; '.join(differing)}); use another --workdir")
    barrier("claim")  # every process has looked at the old config
    workdir.mkdir(parents=True, exist_ok=True)
    if jax.process_index() == 0:
        save_config(config, path)


def total_steps(config: ConfigDict, steps_per_epoch: int) -> int:
    """train.steps, or where that is 0 train.epochs in steps."""
    return config.train.steps or config.train.epochs * steps_per_epoch


def train_to_the_end(
    workdir: Path,
    config: ConfigDict,
    mesh: jax.sharding.Mesh,
    stage: Stage,
    create_state: Callable,
    batches_from: Callable[[int], Batches],
    steps_per_epoch: int,
    complete: Callable = lambda state: state,
    profile: range = range(0),
):
    """Trains from the newest whole checkpoint, or from `create_state(seed)`, to the last step; returns the last state.

    `complete` puts into a fresh state what does not come from a seed. `batches_from(step)` makes the batches that
    follow that step. A trace of the steps of `profile` is written. Raises what `ibq_jax.base.loop.Loop.run` raises.
    """
    print(describe_mesh(mesh))
    checkpoints = _checkpoints(workdir, config)
    state, start_step = _start(create_state, mesh, config.seed, checkpoints, complete)
    pace = Pace(
        total_steps=total_steps(config, steps_per_epoch),
        log_every=config.log.every,
        images_every=config.log.images_every,
        evaluate_every=config.evaluate.every,
        checkpoint_every=config.checkpoint.every,
    )
    if start_step >= pace.total_steps:
        print(f"complete: step {start_step} of {pace.total_steps}; a larger train.steps goes on from there")
    telemetry = Telemetry(workdir, start_step, pace.total_steps, enabled=jax.process_index() == 0)
    metadata = {"config": config.to_dict(), "steps_per_epoch": steps_per_epoch}
    parts, watch = Parts(), config.watch
    beside = Path.cwd() if is_remote(workdir) else workdir
    watchdog = Watchdog(
        parts,
        beside / f"stacks_process{jax.process_index()}.txt",
        factor=watch.slow_factor,
        seconds=watch.slow_seconds,
        hang_seconds=watch.hang_seconds,
        say=lambda words: print(words, file=sys.stderr),
    )
    loop = Loop(stage, mesh, pace, checkpoints, telemetry, workdir, metadata, parts, profile)
    try:
        with watchdog:
            state = loop.run(state, batches_from(start_step), start_step)
        telemetry.sum_up()
        return state
    finally:
        telemetry.close()
        checkpoints.close()


def _start(
    create_state: Callable, mesh: jax.sharding.Mesh, seed: int, checkpoints: Checkpoints, complete: Callable
) -> tuple:
    shapes, _ = abstract_state(create_state, mesh, seed)
    restored = checkpoints.restore(shapes)
    if restored is not None:
        weights = "the weights of " if restored.weights_only else ""
        print(f"continuing from {weights}step {restored.step}")
        return restored.completed(lambda: create_sharded(create_state, mesh, seed)), restored.step
    state = create_sharded(create_state, mesh, seed)
    print(parameter_overview.get_parameter_overview(state.params, include_stats=False).splitlines()[-1])
    return complete(state), 0


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
        path = absolute(path)
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
        checkpoints = _checkpoints(self.workdir, self.config)
        if not checkpoints.steps or (self.step is not None and self.step not in checkpoints.steps):
            where = self.workdir if self.step is None else self.workdir / "checkpoints" / str(self.step)
            raise UsageError(f"{where} has no checkpoint; the steps saved are {checkpoints.steps}")
        return checkpoints


def _no_moment(name: str) -> bool:
    return "optimizer" not in name.split("/")


def _checkpoints(workdir: Path, config: ConfigDict) -> Checkpoints:
    checkpoint = config.checkpoint
    return Checkpoints(
        workdir / "checkpoints",
        keep_last=checkpoint.keep_last,
        keep_best=checkpoint.keep_best,
        best_metric=checkpoint.best_metric,
    )
