"""The one training loop of both stages.

A stage brings its compiled step and what to do every so often; the loop brings order: it queues a step, examines the
one before, evaluates, saves, and stops cleanly on SIGTERM or Ctrl-C. No step whose numbers were not examined is ever
saved, so every checkpoint is a healthy one.
"""

import contextlib
import json
import math
import signal
import threading
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import jax
import numpy as np

from ibq_jax.base.checkpoint import Checkpoints
from ibq_jax.base.errors import Failed
from ibq_jax.base.sharding import global_batch
from ibq_jax.base.telemetry import Telemetry


class TrainingStopped(Failed):
    """Training went wrong by itself (a collapse, a non-finite loss); the message says what was seen and what to try."""


class Interrupted(RuntimeError):
    """A SIGTERM or Ctrl-C (`signal`) was honoured: everything is saved, and the same command continues."""

    def __init__(self, number: int, message: str):
        super().__init__(message)
        self.signal = number


class Stage(Protocol):
    """What the loop asks of a stage. `state` is its whole pytree; metrics are scalars on the devices."""

    def step(self, state, batch: Mapping[str, jax.Array]) -> tuple[object, dict[str, jax.Array]]: ...

    def examine(self, step: int, metrics: Mapping[str, float]) -> None:
        """Raises TrainingStopped when the logged numbers say that going on is no use."""

    def describe(self, metrics: Mapping[str, float]) -> str:
        """The logged numbers as words of one console line."""

    def evaluate(self, state) -> dict[str, float | np.ndarray]:
        """Numbers by name; those of a picture's places are arrays [h, w], at least 0."""

    def pictures(self, state) -> dict[str, np.ndarray]:
        """By name, uint8 [H, W, 3]: what the state produces, to look at."""


@dataclass
class Pace:
    """Steps between things, and the last step."""

    total_steps: int
    log_every: int
    images_every: int
    evaluate_every: int
    checkpoint_every: int


@dataclass
class Loop:
    stage: Stage
    mesh: jax.sharding.Mesh
    pace: Pace
    checkpoints: Checkpoints
    telemetry: Telemetry
    workdir: Path
    metadata: dict
    _pending: tuple | None = field(default=None, init=False)
    _signal: int | None = field(default=None, init=False)

    def run(self, state, batches: Generator[Mapping[str, np.ndarray]], start_step: int):
        """Trains from `start_step` to the end and returns the last state, saved.

        Raises TrainingStopped (nothing unhealthy saved; the batch's indices under workdir) or Interrupted (saved).
        """
        with self._signals(), contextlib.closing(batches):
            for step in range(start_step + 1, self.pace.total_steps + 1):
                batch = next(batches)
                indices = batch["index"]
                arrays = {name: rows for name, rows in batch.items() if name != "index"}
                state, metrics = self.stage.step(state, global_batch(arrays, self.mesh))
                self._examine_pending()
                self._pending = (step, metrics, indices)
                self._occasionally(step, state)
            self._examine_pending()
        return state

    def _occasionally(self, step: int, state) -> None:
        pace, last = self.pace, step == self.pace.total_steps
        stopping = self._signal is not None
        metrics = None
        if last or step % pace.evaluate_every == 0:
            self._examine_pending()
            with self.telemetry.aside():
                measured = self.stage.evaluate(state)
            metrics = {name: value for name, value in measured.items() if np.ndim(value) == 0}
            self.telemetry.scalars(step, metrics)
            for name in measured.keys() - metrics.keys():
                self.telemetry.grid(step, name, measured[name])
            self.telemetry.say(f"step {step}  " + "  ".join(f"{name} {value:.4g}" for name, value in metrics.items()))
        if last or step % pace.images_every == 0:
            with self.telemetry.aside():
                for name, picture in self.stage.pictures(state).items():
                    self.telemetry.images(step, name, picture)
        if last or stopping or step % pace.checkpoint_every == 0:
            self._examine_pending()
            with self.telemetry.aside():
                self.checkpoints.save(step, state, self.metadata | {"step": step}, metrics)
                if last or stopping:
                    self.checkpoints.wait()
        if stopping and not last:
            name = signal.Signals(self._signal).name
            message = f"{name}: saved step {step} of {pace.total_steps}; the same command continues from it"
            raise Interrupted(self._signal, message)

    def _examine_pending(self) -> None:
        """Waits for the last queued step (not for the one being queued), and looks at its numbers."""
        if self._pending is None:
            return
        step, metrics, indices = self._pending
        self._pending = None
        due = step % self.pace.log_every == 0 or step == self.pace.total_steps
        try:
            if not bool(metrics["finite"]):
                numbers = {name: float(value) for name, value in metrics.items()}
                bad = ", ".join(name for name, value in numbers.items() if not math.isfinite(value))
                raise TrainingStopped(
                    f"step {step}: {bad or 'a gradient'} is not finite; no later step was saved. Try a lower "
                    "optimizer.learning_rate, optimizer.gradient_clip=1.0, or dtype=float32"
                )
            if due:
                values = {name: float(value) for name, value in jax.device_get(metrics).items() if name != "finite"}
                self.telemetry.scalars(step, values)
                self.telemetry.line(step, self.stage.describe(values))
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
        """SIGTERM and Ctrl-C ask for a save, while a run goes on. Only a main thread may say so."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = (signal.SIGTERM, signal.SIGINT)
        previous = {number: signal.signal(number, self._on_signal) for number in numbers}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, _frame) -> None:
        if self._signal is not None:  # asked twice: the person means now
            raise KeyboardInterrupt
        self._signal = number
        self.telemetry.say(f"{signal.Signals(number).name}: finishing this step, then saving (again to stop at once)")
