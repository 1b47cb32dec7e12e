"""The training loop, with a stage that only counts."""

import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ibq_jax.base.checkpoint import Checkpoints
from ibq_jax.base.loop import Interrupted, Intervals, Loop, TrainingStopped
from ibq_jax.base.sharding import make_mesh
from ibq_jax.base.telemetry import Telemetry


class CountingStage:
    """A stage whose state is the sum of its batches' means. `at` maps a step to a function of its loss."""

    def __init__(self, **at):
        self.at = {int(name.removeprefix("step")): action for name, action in at.items()}
        self.events = []

    def step(self, state, batch):
        step = int(state["step"]) + 1
        self.events.append(f"queue {step}")
        loss = jnp.mean(batch["image"])
        if step in self.at:
            loss = self.at[step](loss)
        state = {"step": jnp.asarray(step), "sum": state["sum"] + loss}
        return state, {"loss": loss, "finite": jnp.isfinite(loss)}

    def examine(self, step, metrics):
        self.events.append(f"examine {step}")
        if metrics["loss"] < 0:
            raise TrainingStopped("negative")

    def describe(self, metrics):
        return f"loss {metrics['loss']:.1f}"

    def evaluate(self, state):
        self.events.append(f"evaluate {int(state['step'])}")
        return {"validation/sum": float(state["sum"])}

    def images(self, state):
        return {"reconstructions": np.full((4, 4, 3), 7, np.uint8)}


class Run:
    """One work folder, and loops that run in it."""

    def __init__(self, workdir):
        self.workdir, self.mesh = workdir, make_mesh({"data": -1})
        self.intervals = Intervals(total_steps=6, log_every=1, images_every=3, evaluate_every=3, checkpoint_every=2)
        self.closed, self.profile = False, range(0)

    def batches(self, start):
        try:
            for step in range(start + 1, 1000):
                yield {"image": np.full((8, 2), step, np.float32), "index": np.arange(8) + 8 * step}
        finally:
            self.closed = True

    def __call__(self, stage):
        checkpoints = Checkpoints(self.workdir / "checkpoints", keep_last=10)
        state = {"step": jnp.asarray(0), "sum": jnp.asarray(0.0)}
        restored = checkpoints.restore(jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state))
        state, start = (restored.state, restored.step) if restored else (state, 0)
        telemetry = Telemetry(self.workdir, start, self.intervals.total_steps)
        loop = Loop(
            stage=stage,
            mesh=self.mesh,
            intervals=self.intervals,
            checkpoints=checkpoints,
            telemetry=telemetry,
            workdir=self.workdir,
            metadata={},
            profile=self.profile,
        )
        try:
            return loop.run(state, self.batches(start), start)
        finally:
            telemetry.close()
            checkpoints.close()
            self.steps = checkpoints.steps

    def logged(self):
        return [json.loads(line) for line in (self.workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path)


def test_a_run_logs_evaluates_and_saves_at_its_intervals(run):
    state = run(CountingStage())
    assert float(state["sum"]) == 1 + 2 + 3 + 4 + 5 + 6
    assert run.steps == [2, 4, 6]
    logged = run.logged()
    assert [(row["step"], row["loss"]) for row in logged if "loss" in row] == [(i, float(i)) for i in range(1, 7)]
    sums = [(row["step"], row["validation/sum"]) for row in logged if "validation/sum" in row]
    assert sums == [(3, 6.0), (6, 21.0)]
    assert run.closed


def test_numbers_are_read_after_the_next_step_is_queued(run):
    stage = CountingStage()
    run.intervals = Intervals(total_steps=4, log_every=1, images_every=9, evaluate_every=9, checkpoint_every=9)
    run(stage)
    assert stage.events[:6] == ["queue 1", "queue 2", "examine 1", "queue 3", "examine 2", "queue 4"]


def test_a_loss_that_is_not_finite_stops_the_run_and_names_its_batch(run):
    with pytest.raises(TrainingStopped, match=r"step 4: loss is not finite.*optimizer\.gradient_clip"):
        run(CountingStage(step4=lambda loss: loss * jnp.nan))
    assert run.steps == [2]  # the state after step 4, the next to be saved, is not
    record = json.loads((run.workdir / "stopped_step4_process0.json").read_text())
    assert record["indices"] == list(range(32, 40)) and "not finite" in record["reason"]
    assert run.closed


def test_what_the_stage_will_not_go_on_with_names_its_batch_too(run):
    with pytest.raises(TrainingStopped, match="negative"):
        run(CountingStage(step3=lambda loss: -loss))
    assert json.loads((run.workdir / "stopped_step3_process0.json").read_text())["indices"] == list(range(24, 32))


@pytest.mark.parametrize("profile", [range(2, 5), range(5, 100)])
def test_a_trace_of_some_steps_can_be_opened(run, profile, monkeypatch):
    examined, stage = [], CountingStage()
    stop_trace = jax.profiler.stop_trace
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: (examined.extend(stage.events), stop_trace()))
    run.profile = profile
    run(stage)
    (trace,) = run.workdir.glob("profile/plugins/profile/*/*.xplane.pb")
    planes = list(jax.profiler.ProfileData.from_file(str(trace)).planes)
    assert any(event.duration_ns for plane in planes for line in plane.lines for event in line.events)
    last = min(profile.stop - 1, run.intervals.total_steps)
    assert f"examine {last}" in examined and f"queue {last + 1}" not in examined


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_first_and_the_run_goes_on_from_there(run, number):
    def interrupt(loss):
        os.kill(os.getpid(), number)
        return loss

    handler = signal.getsignal(number)
    with pytest.raises(Interrupted, match="saved step 3 of 6") as caught:
        run(CountingStage(step3=interrupt))
    assert caught.value.signal == number and signal.getsignal(number) is handler
    assert run.steps == [2, 3]
    stage = CountingStage()
    assert float(run(stage)["sum"]) == 21.0
    assert stage.events[0] == "queue 4"
    assert [row["step"] for row in run.logged() if "loss" in row] == [1, 2, 3, 4, 5, 6]
