"""A thread that watches a run: it reports phases that take far longer than usual, and ends a process that hangs.

`faulthandler.dump_traceback_later` could end a hang, but knows no usual durations and leaves the other processes alone.
"""

import faulthandler
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from ibq_jax.base import processes
from ibq_jax.base.timing import PhaseTimer


class Watchdog(threading.Thread):
    """Reports each overlong phase once, with the stacks of all threads, and ends the process (exit code 1) on a hang.

    Args:
        timer: the run's phases.
        stacks: file to which the stacks of all threads are appended.
        factor: a phase is reported once it takes this many times its usual (median) duration,
        seconds: and at least this long.
        hang_seconds: the process ends when any phase takes this long; 0: never.
        say: prints a line.
    """

    def __init__(
        self,
        timer: PhaseTimer,
        stacks: Path,
        *,
        factor: float,
        seconds: float,
        hang_seconds: float,
        say: Callable[[str], None],
    ):
        super().__init__(name="watchdog", daemon=True)
        self._timer, self._stacks, self._say = timer, stacks, say
        self._factor, self._seconds, self._hang_seconds = factor, seconds, hang_seconds
        self._stopped = threading.Event()

    def __enter__(self) -> "Watchdog":
        self.start()
        return self

    def __exit__(self, *_) -> None:
        self._stopped.set()
        self.join()

    def run(self) -> None:
        limits = [limit for limit in (self._seconds, self._hang_seconds) if limit]
        reported, last = False, 0.0
        while not self._stopped.wait(min(1.0, min(limits) / 4)):
            phase, lasted = self._timer.now
            reported, last = reported and lasted > last, lasted  # less than at the last look: another phase
            usual = self._timer.usual(phase)
            if not reported and usual is not None and lasted > max(self._seconds, self._factor * usual):
                self._say(self._report(phase, lasted, usual))
                reported = True
            if self._hang_seconds and lasted > self._hang_seconds:
                self._end(f"{self._report(phase, lasted, usual)}; ended, the same command continues")

    def _report(self, phase: str, lasted: float, usual: float | None) -> str:
        usually = "" if usual is None else f", usually {usual:.3g} s"
        return f"watchdog: {lasted:.0f} s in {phase!r}{usually}; stacks in {self._dump(phase)}"

    def _dump(self, phase: str) -> Path:
        with self._stacks.open("a") as file:
            file.write(f"in {phase!r}\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        return self._stacks

    def _end(self, message: str) -> None:
        print(message, file=sys.stderr)
        processes.fail(message, 1)
