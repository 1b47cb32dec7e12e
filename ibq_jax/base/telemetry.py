"""What a run says while it trains: scalars, pictures, a progress line. Written by process 0 only.

Scalars go to TensorBoard event files and to `metrics.jsonl` (one JSON object a line: step, then names). The loop reads
them from the devices one step late, so that the host queues the next step before it waits for the last.
"""

import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from tensorboardX import SummaryWriter
from tqdm import tqdm

from ibq_jax.base.files import is_remote
from ibq_jax.base.timing import Timeline, goodput, shares

METRICS, TIMING = APPENDED = ("metrics.jsonl", "timing.jsonl")
GRID_PIXELS = 16  # of a value's square in a grid's picture


class Telemetry:
    """Writes under `workdir`. On a resumed run what was logged after `start_step` is dropped: it is computed again."""

    def __init__(self, workdir: Path, start_step: int, total_steps: int, enabled: bool = True):
        self._enabled = enabled
        self._clock, self._clock_step = time.monotonic(), start_step
        self.total_steps = total_steps
        if not enabled:
            return
        self._workdir, local = workdir, workdir
        if is_remote(workdir):  # where nothing can be appended to
            self._spool = tempfile.TemporaryDirectory(prefix="ibq_jax_")
            local = Path(self._spool.name)
            for name in APPENDED:
                if (workdir / name).exists():
                    (local / name).write_text((workdir / name).read_text())
        self._local = local
        _keep_until(local / METRICS, start_step)
        self._file = (local / METRICS).open("a")
        self._events = SummaryWriter(str(local / "events"), purge_step=start_step + 1, flush_secs=10)
        self._timeline = Timeline(local / TIMING)
        self._timeline.add(start_step, {}, start=True)
        self._bar = tqdm(total=total_steps, initial=start_step, unit="step", disable=None, dynamic_ncols=True)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        if not self._enabled:
            return
        values = {name: float(value) for name, value in values.items()}
        self._file.write(json.dumps({"step": step} | values) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._events.add_scalar(name, value, step)

    def grid(self, step: int, name: str, values: np.ndarray) -> None:
        """`values`: floats [h, w], at least 0; a row of metrics.jsonl, and a picture, brighter where larger."""
        if not self._enabled:
            return
        self._file.write(json.dumps({"step": step, name: np.round(values.astype(float), 6).tolist()}) + "\n")
        self._file.flush()
        shades = np.uint8(255 * values / max(float(np.max(values)), 1e-9))
        self.images(step, name, np.repeat(shades.repeat(GRID_PIXELS, 0).repeat(GRID_PIXELS, 1)[..., None], 3, axis=2))

    def images(self, step: int, name: str, picture: np.ndarray) -> None:
        """`picture`: uint8 [H, W, 3]."""
        if self._enabled:
            self._events.add_image(name, picture, step, dataformats="HWC")

    def advance(self, step: int) -> None:
        if self._enabled and not self._bar.disable:
            self._bar.update(step - self._bar.n)

    def line(self, step: int, words: str) -> None:
        """One console line: the step, its rate since the last line, the time left, then `words`."""
        now = time.monotonic()
        rate = (step - self._clock_step) / max(now - self._clock, 1e-9)
        self._clock, self._clock_step = now, step
        left = tqdm.format_interval((self.total_steps - step) / rate) if rate > 0 else "?"
        self.say(f"step {step}/{self.total_steps}  {rate:.2f} steps/s  {left} left  {words}")

    def time(self, step: int, seconds: Mapping[str, float]) -> None:
        """`seconds` by part of the run, since the last call: to timing.jsonl, and as shares to TensorBoard."""
        if not self._enabled:
            return
        self._timeline.add(step, seconds)
        for name, share in shares(self._timeline.rows[-1:]).items():
            self._events.add_scalar(f"time/{name}", share, step)

    def goodput(self, step: int) -> None:
        """To TensorBoard; takes a look at every row of timing.jsonl."""
        if self._enabled:
            self._events.add_scalar("time/goodput", goodput(self._timeline.rows), step)

    def sum_up(self) -> None:
        """Says where the time went, over all starts of the run."""
        if not self._enabled or not shares(self._timeline.rows):
            return
        words = ", ".join(f"{name} {share:.1%}" for name, share in shares(self._timeline.rows).items())
        starts = sum(row["start"] for row in self._timeline.rows)
        self.say(f"time: {words}; goodput {goodput(self._timeline.rows):.1%} over {starts} start(s)")

    @contextlib.contextmanager
    def paused(self):
        """What happens inside (an evaluation, a checkpoint) does not count in the rate of the steps."""
        start = time.monotonic()
        yield
        self._clock += time.monotonic() - start

    def say(self, words: str) -> None:
        if self._enabled:
            tqdm.write(words, file=sys.stdout)
            sys.stdout.flush()

    def sync(self) -> None:
        """Copies what was written to a work folder in a bucket; called whenever a checkpoint is. One here has it."""
        if not self._enabled or self._local is self._workdir:
            return
        self._events.flush()
        for path in (*(self._local / name for name in APPENDED), *(self._local / "events").iterdir()):
            copy = self._workdir / path.relative_to(self._local)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())

    def close(self) -> None:
        if self._enabled:
            self._bar.close()
            self._file.close()
            self._events.close()
            self.sync()


def _keep_until(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:  # a line that a kill cut short
            continue
        if entry["step"] <= step:
            kept.append(line + "\n")
    partial = path.with_suffix(".partial")
    partial.write_text("".join(kept))
    partial.replace(path)
