"""Training of a sweep's points, each in its own process, so that the failure of one does not end the others.

The process may also be a launch script. Its output goes to log.txt in the point's folder. The process holds a lock on
that file as long as it runs, even if the sweep is killed meanwhile.
"""

import fcntl
import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

from ibq_jax.base.errors import Interrupted, one_line
from ibq_jax.base.files import is_remote, write_text
from ibq_jax.base.supervise import handling
from ibq_jax.report.history import read_history, stopped_by_itself
from ibq_jax.sweep.grid import Point
from ibq_jax.sweep.results import DONE, ENDED, FAILED, OUTCOME, STOPPED, read_result

LOG = "log.txt"
LOGS = Path("runs/logs")  # of a sweep in a bucket, whose files cannot be appended to
MAX_SHOWN = 60  # characters of the log's last line, in the progress bar
TAIL_BYTES = 2**16  # of a log, searched for the reason that a process ended
# The line that __main__ prints for an error, or the last line of a Python traceback.
ERROR_LINE = re.compile(r"^(?:ibq_jax train: |(?=[\w.]*(?:Error|Exception)\b))(.+)$", re.MULTILINE)


class PointTrainer:
    """Trains points one after the other.

    Every SIGTERM and Ctrl-C is passed on to the running point as SIGTERM, and no other point is started.

    Attributes:
        folder: of the sweep.
        spec: the config, FILE.py:PRESET.
        launcher: the command to run with the arguments that follow `python -m ibq_jax`.
    """

    def __init__(self, folder: Path, spec: str, launcher: Sequence[str]):
        self._folder, self._spec, self._launcher = folder, spec, launcher
        self._child: subprocess.Popen | None = None
        self._asked: int | None = None

    def train(self, points: Sequence[Point]) -> None:
        """Trains all points that have not ended.

        Raises:
            Interrupted: a signal came.
        """
        handlers: dict[int, Callable] = dict.fromkeys((signal.SIGTERM, signal.SIGINT), self._on_signal)
        with handling(handlers), tqdm(total=len(points), unit="point", disable=None, dynamic_ncols=True) as bar:
            for point in points:
                status = read_result(self._folder, point).status
                if status in ENDED:
                    _say(f"{point.name}: {status} already")
                elif self._asked is not None:
                    raise self._interrupted(f"{point.name} was not started")
                else:
                    self._train(point, bar)
                bar.update()

    def _train(self, point: Point, bar: tqdm) -> None:
        workdir, log = self._folder / point.name, self._log(point)
        workdir.mkdir(parents=True, exist_ok=True)
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the child inherits the lock with its output
            except BlockingIOError:
                _say(f"{point.name}: another process is training it")
                return
            _say(f"{point.name}: training; its output goes to {log}")
            (workdir / OUTCOME).unlink(missing_ok=True)
            begin = file.tell()
            code = self._run(point, file, log, bar)
            status, reason = self._outcome(code, workdir, _tail(log, begin))
            write_text(workdir / OUTCOME, json.dumps({"status": status, "reason": reason}) + "\n")
        _say(f"{point.name}: {status}{': ' if reason else ''}{reason}")

    def _log(self, point: Point) -> Path:
        return (LOGS / self._folder.name if is_remote(self._folder) else self._folder) / point.name / LOG

    def _run(self, point: Point, file: BinaryIO, log: Path, bar: tqdm) -> int:
        """Runs the process of a point and returns its exit code."""
        arguments = ["train", f"--config={self._spec}", f"--workdir={self._folder / point.name}", *point.overrides]
        self._child = subprocess.Popen(
            [*self._launcher, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # or Ctrl-C would reach it twice, and a second signal ends it without saving
        )
        if self._asked is not None:  # a signal came before the child existed
            self._child.send_signal(signal.SIGTERM)
        while True:
            try:
                return self._child.wait(timeout=1)
            except subprocess.TimeoutExpired:
                if not bar.disable:
                    bar.set_postfix_str(f"{point.name}: {_last_line(_tail(log))[:MAX_SHOWN]}")

    def _outcome(self, code: int, workdir: Path, said: str) -> tuple[str, str]:
        """Returns (status, reason). Raises Interrupted if a signal stopped the process, with everything saved."""
        number = -code if code < 0 else code - 128
        if code == 0:
            return DONE, ""
        if number in (signal.SIGTERM, signal.SIGINT):
            self._asked = self._asked or number  # sent by another program, such as Slurm
            raise self._interrupted(f"{workdir.name} was stopped")
        if number in {*signal.Signals}:
            hint = ", possibly because memory ran out" if number == signal.SIGKILL else ""
            return FAILED, f"ended by {signal.Signals(number).name}{hint}"
        words = ERROR_LINE.findall(said)
        if words and words[-1] == stopped_by_itself(workdir, read_history(workdir / "metrics.jsonl").last_step):
            return STOPPED, words[-1]
        last = f"exit code {code}: {_last_line(said)}"
        return FAILED, one_line(RuntimeError(words[-1] if words else last))

    def _interrupted(self, words: str) -> Interrupted:
        number = self._asked or signal.SIGTERM
        return Interrupted(number, f"{signal.Signals(number).name}: {words}; the same command continues")

    def _on_signal(self, number: int, _frame) -> None:
        self._asked = self._asked or number
        if self._child is not None:
            self._child.send_signal(signal.SIGTERM)


def _say(words: str) -> None:
    tqdm.write(words)
    sys.stdout.flush()


def _last_line(text: str) -> str:
    return text.strip().rpartition("\n")[2]


def _tail(log: Path, begin: int = 0) -> str:
    """Returns the end of a log, at most what follows byte `begin`."""
    with log.open("rb") as file:
        file.seek(max(begin, log.stat().st_size - TAIL_BYTES))
        return file.read().decode("utf-8", errors="replace")
