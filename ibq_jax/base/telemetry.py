"""The log of a run while it trains: scalars, images and console lines. Only process 0 writes it.

Scalars go to TensorBoard event files and to `metrics.jsonl` (one JSON object per line: the step, then the scalars by
name). The loop reads them from the devices one step late, so that the host queues a step before it waits for the
previous one.
"""

import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ibq_jax.base.files import is_remote, write_text
from ibq_jax.base.timing import Timeline, goodput, shares
from ibq_jax.base.unimported import unimported

with unimported("torch"):  # tensorboardX imports it if it can, and needs it only for PyTorch's tensors
    from tensorboardX import SummaryWriter

METRICS, TIMING = APPENDED = ("metrics.jsonl", "timing.jsonl")
GRID_PIXELS = 16  # side of the square that shows one value of a grid


class Telemetry:
    """The logger of a run in `workdir`. On a resumed run it drops what was logged after `start_step`.

    Those steps are computed again. With `enabled` False nothing is written or printed.
    """

    def __init__(self, workdir: Path, start_step: int, total_steps: int, enabled: bool = True):
        self._enabled = enabled
        self._clock, self._clock_step = time.monotonic(), start_step
        self.total_steps = total_steps
        if not enabled:
            return
        self._workdir, local = workdir, workdir
        if is_remote(workdir):  # a bucket cannot append to a file
            self._spool = tempfile.TemporaryDirectory(prefix="ibq_jax_")
            local = Path(self._spool.name)
            for name in APPENDED:
                if (workdir / name).exists():
                    (local / name).write_text((workdir / name).read_text())
        self._local = local
        known = start_step or -1  # a run that starts evaluates its first weights, as step 0, itself
        _drop_rows_after(local / METRICS, known)
        self._file = (local / METRICS).open("a")
        self._events = SummaryWriter(str(local / "events"), purge_step=known + 1, flush_secs=10)
        self._timeline = Timeline(local / TIMING)
        self._timeline.add(start_step, {}, start=True)
        self._bar = tqdm(total=total_steps, initial=start_step, unit="step", disable=None, dynamic_ncols=True)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Logs scalars by name."""
        if not self._enabled:
            return
        values = {name: float(value) for name, value in values.items()}
        self._file.write(json.dumps({"step": step} | values) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._events.add_scalar(name, value, step)

    def grid(self, step: int, name: str, values: np.ndarray) -> None:
        """Logs nonnegative values [h, w] to metrics.jsonl, and as an image that is brighter where they are larger."""
        if not self._enabled:
            return
        self._file.write(json.dumps({"step": step, name: np.round(values.astype(float), 6).tolist()}) + "\n")
        self._file.flush()
        shades = np.uint8(255 * values / max(float(np.max(values)), 1e-9))
        self.image(step, name, np.repeat(shades.repeat(GRID_PIXELS, 0).repeat(GRID_PIXELS, 1)[..., None], 3, axis=2))

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """Logs an image, uint8 [H, W, 3]."""
        if self._enabled:
            self._events.add_image(name, image, step, dataformats="HWC")

    def advance(self, step: int) -> None:
        """Moves the progress bar to `step`."""
        if self._enabled and not self._bar.disable:
            self._bar.update(step - self._bar.n)

    def line(self, step: int, words: str) -> None:
        """Prints the step, the rate since the last such line, the remaining time, and `words` as one line."""
        now = time.monotonic()
        rate = (step - self._clock_step) / max(now - self._clock, 1e-9)
        self._clock, self._clock_step = now, step
        left = tqdm.format_interval((self.total_steps - step) / rate) if rate > 0 else "?"
        self.say(f"step {step}/{self.total_steps}  {rate:.2f} steps/s  {left} left  {words}")

    def time(self, step: int, seconds: Mapping[str, float]) -> None:
        """Logs seconds per phase since the last call: to timing.jsonl, and as shares to TensorBoard."""
        if not self._enabled:
            return
        self._timeline.add(step, seconds)
        for name, share in shares(self._timeline.rows[-1:]).items():
            self._events.add_scalar(f"time/{name}", share, step)

    def goodput(self, step: int) -> None:
        """Logs the goodput to TensorBoard; its cost grows with the number of rows in timing.jsonl."""
        if self._enabled:
            self._events.add_scalar("time/goodput", goodput(self._timeline.rows), step)

    def report_time(self) -> None:
        """Prints how the time of all starts of the run divides into phases, and the goodput."""
        if not self._enabled or not shares(self._timeline.rows):
            return
        words = ", ".join(f"{name} {share:.1%}" for name, share in shares(self._timeline.rows).items())
        starts = sum(row["start"] for row in self._timeline.rows)
        self.say(f"time: {words}; goodput {goodput(self._timeline.rows):.1%} over {starts} start(s)")

    def report_gain(self) -> None:
        """Prints each validation metric before the first step and now, if a run began with trained weights."""
        if not self._enabled:
            return
        rows = [json.loads(line) for line in (self._local / METRICS).read_text().splitlines()]
        scalars = [
            row for row in rows if any(name.startswith("validation/") and np.isscalar(row[name]) for name in row)
        ]
        if len(scalars) < 2 or scalars[0]["step"] != 0:
            return
        first, last = scalars[0], scalars[-1]
        names = (first.keys() & last.keys()) - {"step", "validation/images"}  # a continued run may measure others
        gains = (f"{name} {first[name]:.4g} -> {last[name]:.4g}" for name in names)
        self.say(f"before and after {last['step']} steps: " + "  ".join(sorted(gains)))

    @contextlib.contextmanager
    def paused(self):
        """Excludes the time of the block (an evaluation, a checkpoint) from the rate that `line` prints."""
        start = time.monotonic()
        yield
        self._clock += time.monotonic() - start

    def say(self, words: str) -> None:
        """Prints a line above the progress bar."""
        if self._enabled:
            tqdm.write(words, file=sys.stdout)
            sys.stdout.flush()

    def sync(self) -> None:
        """Copies the log files to a work folder in a bucket, and does nothing for a local one.

        The loop calls it with every checkpoint.
        """
        if not self._enabled or self._local is self._workdir:
            return
        self._events.flush()
        for path in (*(self._local / name for name in APPENDED), *(self._local / "events").iterdir()):
            copy = self._workdir / path.relative_to(self._local)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())

    def close(self) -> None:
        """Closes all files; call it once, at the end."""
        if self._enabled:
            self._bar.close()
            self._file.close()
            self._events.close()
            self.sync()


def _drop_rows_after(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:  # the process was killed while it wrote this line
            continue
        if entry["step"] <= step:
            kept.append(line + "\n")
    write_text(path, "".join(kept))
