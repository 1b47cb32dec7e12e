"""Trains a state in a run's folder: claims the folder, creates or restores the state, and runs the loop to the end."""

import sys
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from clu import parameter_overview
from ml_collections import ConfigDict

from ibq_jax.base.checkpoint import Checkpoints
from ibq_jax.base.config import differences, flatten, read_config, save_config
from ibq_jax.base.errors import UsageError
from ibq_jax.base.files import is_remote
from ibq_jax.base.loop import Intervals, Loop, Stage
from ibq_jax.base.memory import keep_freed_memory
from ibq_jax.base.processes import barrier, check_alike
from ibq_jax.base.saved_run import IMPORTED, open_checkpoints, total_steps
from ibq_jax.base.sharding import abstract_state, create_sharded, describe_mesh, platform
from ibq_jax.base.telemetry import Telemetry
from ibq_jax.base.timing import PhaseTimer
from ibq_jax.base.watchdog import Watchdog

Batches = Generator[Mapping[str, np.ndarray]]


@dataclass(frozen=True)
class FieldRoles:
    """Config fields of a stage by the part they play when a run is continued; each entry is a name or a prefix.

    Attributes:
        free: fields that a continued run may change: where it runs, how fast, and what it shows, but not what it
            computes.
        location: fields that may differ between the hosts of one job, because they say where files are or how data is
            loaded.
        network: fields that decide the networks' shapes or how their weights are read. An imported run that was never
            trained is compared by these only. "stage:" means the field `stage` alone.
        not_structural: the exceptions among `network`, which leave the shapes of the weights unchanged.
    """

    free: tuple[str, ...]
    location: tuple[str, ...]
    network: tuple[str, ...]
    not_structural: tuple[str, ...]


def check_same_run(workdir: Path, config: ConfigDict, roles: FieldRoles) -> None:
    """Claims `workdir` for this config. If it holds a run, the configs must agree in all fields that are not free.

    For an imported run that was not trained yet, only the network's fields are compared. Every process calls it.

    Raises:
        UsageError: fields differ from the run's config, or between processes; the message names them.
    """
    fields = {name: value for name, value in flatten(config).items() if name not in roles.location}
    check_alike("configs", fields | {"workdir": str(workdir)})
    path = workdir / "config.json"
    if path.exists():
        differing = differences(read_config(path), config, ignore=roles.free)
        if (workdir / IMPORTED).exists() and not (workdir / "metrics.jsonl").exists():
            differing = [
                field
                for field in differing
                if field.startswith(roles.network) and not field.startswith(roles.not_structural)
            ]
        if differing:
            raise UsageError(f"{workdir} holds a run of another config ({'; '.join(differing)}); use another --workdir")
    barrier("claim")  # every process has compared its config with the old one
    workdir.mkdir(parents=True, exist_ok=True)
    if jax.process_index() == 0:
        save_config(config, path)


def fit(
    workdir: Path,
    config: ConfigDict,
    mesh: jax.sharding.Mesh,
    stage: Stage,
    *,
    create_state: Callable,
    batches_from: Callable[[int], Batches],
    steps_per_epoch: int,
    complete: Callable = lambda state: state,
    at_start: Callable = lambda state: None,
    trained_start: bool = False,
    profile: range = range(0),
):
    """Trains from the newest intact checkpoint, or from `create_state(seed)`, to the last step; returns the last state.

    Args:
        workdir: the run's folder.
        config: the run's config.
        mesh: the devices.
        stage: the steps and what accompanies them.
        create_state: seed -> the state before the first step.
        batches_from: step -> an iterator over the batches after that step.
        steps_per_epoch: steps for one pass over the data.
        complete: new state -> the state with the parts that no seed determines.
        at_start: called with the state before the first step, of a new or of an imported run.
        trained_start: a new run starts from trained weights. These are evaluated before the first step, as an imported
            run's are, and its last line compares.
        profile: steps whose trace is written to the run's folder.

    Raises:
        TrainingStopped, Interrupted: see `ibq_jax.base.loop.Loop.run`.
    """
    print(describe_mesh(mesh))
    if platform(mesh) == "cpu":
        keep_freed_memory()
    checkpoints = open_checkpoints(workdir, config)
    state, start_step = _start(create_state, mesh, config.seed, checkpoints, complete)
    if start_step == 0:
        at_start(state)
    intervals = Intervals(
        total_steps=total_steps(config, steps_per_epoch),
        log_every=config.log.every,
        images_every=config.log.images_every,
        evaluate_every=config.evaluate.every,
        checkpoint_every=config.checkpoint.every,
    )
    if start_step >= intervals.total_steps:
        print(f"complete: step {start_step} of {intervals.total_steps}; a larger train.steps continues from there")
    telemetry = Telemetry(workdir, start_step, intervals.total_steps, enabled=jax.process_index() == 0)
    metadata = {"config": config.to_dict(), "steps_per_epoch": steps_per_epoch}
    timer = PhaseTimer()
    loop = Loop(
        stage=stage,
        mesh=mesh,
        intervals=intervals,
        checkpoints=checkpoints,
        telemetry=telemetry,
        workdir=workdir,
        metadata=metadata,
        timer=timer,
        profile=profile,
        evaluate_start=trained_start or (workdir / IMPORTED).exists(),
    )
    try:
        with _watchdog(timer, workdir, config):
            state = loop.run(state, batches_from(start_step), start_step)
        telemetry.report_time()
        telemetry.report_gain()
        return state
    finally:
        telemetry.close()
        checkpoints.close()


def _watchdog(timer: PhaseTimer, workdir: Path, config: ConfigDict) -> Watchdog:
    """Returns the watchdog of the loop's phases; it writes to the run's folder, or here if that is a bucket."""
    limits, folder = config.watchdog, Path.cwd() if is_remote(workdir) else workdir
    return Watchdog(
        timer,
        folder / f"stacks_process{jax.process_index()}.txt",
        factor=limits.slow_factor,
        seconds=limits.slow_seconds,
        hang_seconds=limits.hang_seconds,
        say=lambda words: print(words, file=sys.stderr),
    )


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
