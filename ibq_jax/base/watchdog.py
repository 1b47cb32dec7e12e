"""Watches a run from a thread beside it: what takes far longer than usual is said, with every thread's stack."""

import faulthandler
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from ibq_jax.base import processes
from ibq_jax.base.timing import PhaseTimer


class Watchdog(threading.Thread):
    """Says once of every wait that it is long, and ends the process, exit code 1, when it has lasted too long.

    Args:
        timer: what the run is doing.
        stacks: the file for the stacks of all threads, appended to.
        factor: how many times its usual (median) duration a part may take,
        seconds: and at least how long, before it is said.
        hang_seconds: after which the process ends, whatever the part's usual duration; 0: never.
        say: says a line.
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
        self._parts, self._stacks, self._say = timer, stacks, say
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
        told, last = False, 0.0
        while not self._stopped.wait(min(1.0, min(limits) / 4)):
            part, lasted = self._parts.now
            told, last = told and lasted > last, lasted  # a shorter wait than at the last look is another one
            usual = self._parts.usual(part)
            if not told and usual is not None and lasted > max(self._seconds, self._factor * usual):
                self._say(f"{self._words(part, lasted, usual)}; stacks in {self._dump(part)}")
                told = True
            if self._hang_seconds and lasted > self._hang_seconds:
                words = f"{self._words(part, lasted, usual)}; stacks in {self._dump(part)}"
                self._end(f"{words}; ended, the same command continues")

    def _words(self, part: str, lasted: float, usual: float | None) -> str:
        often = "" if usual is None else f", usually {usual:.3g} s"
        return f"watchdog: {lasted:.0f} s in {part!r}{often}"

    def _dump(self, part: str) -> Path:
        with self._stacks.open("a") as file:
            file.write(f"in {part!r}\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        return self._stacks

    def _end(self, message: str) -> None:
        print(message, file=sys.stderr)
        processes.fail(message, 1)
