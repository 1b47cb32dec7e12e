"""The training loop that both stages share.

A stage supplies its compiled step, its evaluation and its images. The loop decides when they run: it queues a step,
examines the metrics of the previous one, evaluates, saves, and stops cleanly on SIGTERM or Ctrl-C, with all processes
at the same step. A state is saved only after the metrics of its step were examined, so every checkpoint is healthy.
"""

import contextlib
import json
import math
import signal
import threading
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from ibq_jax.base import processes
from ibq_jax.base.checkpoint import Checkpoints
from ibq_jax.base.errors import Failed, Interrupted
from ibq_jax.base.sharding import global_batch
from ibq_jax.base.supervise import handling
from ibq_jax.base.telemetry import Telemetry
from ibq_jax.base.timing import STEP, PhaseTimer


class TrainingStopped(Failed):
    """Training that diverged or collapsed; the message names what was seen and what to try."""


class Stage(Protocol):
    """The interface of a stage. `state` is its whole training state, a pytree."""

    def step(self, state, batch: Mapping[str, jax.Array]) -> tuple[Any, dict[str, jax.Array]]:
        """Runs one training step; returns the new state and metrics, scalars on the devices, with "finite": bool."""
        ...

    def examine(self, step: int, metrics: Mapping[str, float]) -> None:
        """Raises TrainingStopped if the logged metrics show that continuing is pointless."""

    def describe(self, metrics: Mapping[str, float]) -> str:
        """Returns the most important of the logged metrics as text for one console line."""
        ...

    def evaluate(self, state) -> dict[str, float | np.ndarray]:
        """Returns validation metrics by name: scalars, or nonnegative arrays [h, w] with one value per token."""
        ...

    def images(self, state) -> dict[str, np.ndarray]:
        """Returns images to look at by name, uint8 [H, W, 3]: reconstructions or samples."""
        ...


@dataclass
class Intervals:
    """The number of steps of a run, and the steps between two logs, images, evaluations and checkpoints."""

    total_steps: int
    log_every: int
    images_every: int
    evaluate_every: int
    checkpoint_every: int


@dataclass(kw_only=True)
class Loop:
    """A run of the training loop. `metadata` is saved as JSON with every checkpoint.

    `profile` is a range of steps whose trace is written to workdir/profile. With `evaluate_start`, the state before the
    first step is evaluated, too.
    """

    stage: Stage
    mesh: jax.sharding.Mesh
    intervals: Intervals
    checkpoints: Checkpoints
    telemetry: Telemetry
    workdir: Path
    metadata: dict
    timer: PhaseTimer = field(default_factory=PhaseTimer)
    profile: range = range(0)
    evaluate_start: bool = False
    _pending: tuple | None = field(default=None, init=False)
    _signal: int | None = field(default=None, init=False)

    def run(self, state, batches: Generator[Mapping[str, np.ndarray]], start_step: int):
        """Trains from the state after `start_step` to the last step; returns the last state, which is saved.

        Raises:
            TrainingStopped: the metrics of a step are bad. Its state is not saved; the indices of its batch are written
                to workdir.
            Interrupted: SIGTERM or Ctrl-C arrived. The state is saved.
        """
        queueing = "first step"  # includes compilation
        with self._signals(), contextlib.closing(batches), self._tracing() as trace:
            if self.evaluate_start and start_step == 0:
                self._evaluate(0, state)
            for step in range(start_step + 1, self.intervals.total_steps + 1):
                trace(step)
                with self.timer("data"):
                    batch = next(batches)
                indices = batch["index"]
                arrays = {name: rows for name, rows in batch.items() if name != "index"}
                with self.timer(queueing):
                    state, metrics = self.stage.step(state, global_batch(arrays, self.mesh))
                self._examine_pending()
                self._pending = (step, metrics, indices)
                self._occasionally(step, state)
                queueing = STEP
            self._examine_pending()
        return state

    def _occasionally(self, step: int, state) -> None:
        intervals, last = self.intervals, step == self.intervals.total_steps
        stopping = self._signal is not None or processes.asked_to_stop(step)
        metrics = None
        if last or step % intervals.evaluate_every == 0:
            self._examine_pending()
            metrics = self._evaluate(step, state)
        if last or step % intervals.images_every == 0:
            with self._paused("images"):
                for name, image in self.stage.images(state).items():
                    self.telemetry.image(step, name, image)
        if last or stopping or step % intervals.checkpoint_every == 0:
            self._examine_pending()
            with self._paused("checkpoint"):
                self.checkpoints.save(step, state, self.metadata | {"step": step}, metrics)
                self.telemetry.sync()
                if last or stopping:
                    self.checkpoints.wait()
            self.telemetry.goodput(step)
        if stopping and not last:
            number = self._signal or signal.SIGTERM
            message = f"saved step {step} of {intervals.total_steps}; the same command continues from it"
            raise Interrupted(number, f"{signal.Signals(number).name}: {message}")

    def _evaluate(self, step: int, state) -> dict[str, float]:
        """Logs the stage's validation metrics, and returns the scalars among them."""
        with self._paused("evaluation"):
            measured = self.stage.evaluate(state)
        metrics = {name: float(value) for name, value in measured.items() if np.ndim(value) == 0}
        self.telemetry.scalars(step, metrics)
        for name in measured.keys() - metrics.keys():
            self.telemetry.grid(step, name, np.asarray(measured[name]))
        self.telemetry.say(f"step {step}  " + "  ".join(f"{name} {value:.4g}" for name, value in metrics.items()))
        return metrics

    @contextlib.contextmanager
    def _paused(self, phase: str):
        with self.timer(phase), self.telemetry.paused():
            yield

    @contextlib.contextmanager
    def _tracing(self):
        """Gives a function to call with each step before it is queued; it traces the steps of `profile`."""
        tracing = False

        def trace(step: int) -> None:
            nonlocal tracing
            if tracing and step == self.profile.stop:
                self._examine_pending()  # so that the trace includes the work of the last step
                jax.profiler.stop_trace()
                tracing = False
                self.telemetry.say(f"wrote the trace of {len(self.profile)} steps to {self.workdir / 'profile'}")
            elif self.profile and step == self.profile.start:
                self._examine_pending()
                jax.profiler.start_trace(str(self.workdir / "profile"))
                tracing = True

        yield trace
        trace(self.profile.stop)

    def _examine_pending(self) -> None:
        """Waits for the last queued step (not for the one being queued), and examines its metrics."""
        if self._pending is None:
            return
        step, metrics, indices = self._pending
        self._pending = None
        due = step % self.intervals.log_every == 0 or step == self.intervals.total_steps
        try:
            with self.timer(STEP):
                finite = bool(metrics["finite"])
            if not finite:
                numbers = {name: float(value) for name, value in metrics.items()}
                bad = [name for name, value in numbers.items() if not math.isfinite(value)]
                which = ", ".join(bad[:3]) + (f" and {len(bad) - 3} more" if len(bad) > 3 else "")
                raise TrainingStopped(
                    f"step {step}: {which or 'a gradient'} is not finite; no later step was saved. Try a lower "
                    "optimizer.learning_rate, optimizer.gradient_clip=1.0, or dtype=float32"
                )
            if due:
                values = {name: float(value) for name, value in jax.device_get(metrics).items() if name != "finite"}
                with self.timer("logging"):
                    self.telemetry.scalars(step, values)
                    self.telemetry.line(step, self.stage.describe(values))
                self.telemetry.time(step, self.timer.take())
                self.stage.examine(step, values)
        except TrainingStopped as stopped:
            self._save_batch(step, indices, str(stopped))
            raise
        self.telemetry.advance(step)

    def _save_batch(self, step: int, indices: np.ndarray, reason: str) -> None:
        path = self.workdir / f"stopped_step{step}_process{jax.process_index()}.json"
        record = {"step": step, "reason": reason, "indices": np.asarray(indices).tolist()}
        path.write_text(json.dumps(record) + "\n")

    @contextlib.contextmanager
    def _signals(self):
        """Makes SIGTERM and Ctrl-C save and stop inside the block; works in the main thread only.

        With several processes SIGTERM is left to JAX, which finds a step at which all can stop, and Ctrl-C is turned
        into SIGTERM.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        handlers: dict[int, Callable] = {signal.SIGTERM: self._on_signal, signal.SIGINT: self._on_signal}
        if processes.joined():
            handlers = {signal.SIGINT: lambda *_: signal.raise_signal(signal.SIGTERM)}
        with handling(handlers):
            yield

    def _on_signal(self, number: int, _frame) -> None:
        if self._signal is not None:  # the second signal: stop at once
            raise KeyboardInterrupt
        self._signal = number
        self.telemetry.say(f"{signal.Signals(number).name}: finishing this step, then saving (again to stop at once)")
