"""Time accounting for a run: seconds per phase, and goodput over all starts of the run.

`timing.jsonl`, next to metrics.jsonl, has one row each time scalars are logged: {"step", "wall": seconds since 1970,
"start": whether a process began here, "seconds": {phase: seconds since the previous row}}. Phases are measured with a
monotonic clock; `wall` serves only to find how long the run lay idle between two starts.
"""

import contextlib
import json
import statistics
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

STEP = "step"  # queueing a step, and waiting for the devices to finish the previous one: the productive phase
OTHER = "other"  # outside every phase
REMEMBERED = 100  # durations of a phase, from which an unusually long one is recognized


class PhaseTimer:
    """A timer for the host's phases; while a nested phase runs, the outer one's clock stands still."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._names, self._since = [OTHER], clock()
        self._entered = self._since
        self._seconds: dict[str, float] = defaultdict(float)
        self._durations: dict[str, deque] = defaultdict(lambda: deque(maxlen=REMEMBERED))

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        outer_entered = self._entered
        self._add_elapsed()
        self._names.append(name)
        self._entered = self._since
        yield
        self._add_elapsed()
        self._durations[name].append(self._since - self._entered)
        self._names.pop()
        self._entered = outer_entered

    def _add_elapsed(self) -> None:
        now = self._clock()
        self._seconds[self._names[-1]] += now - self._since
        self._since = now

    @property
    def now(self) -> tuple[str, float]:
        """The current phase and how many seconds it has lasted. May be read from another thread."""
        return self._names[-1], self._clock() - self._entered

    def usual(self, name: str) -> float | None:
        """Returns the median duration of a phase in seconds, or None before its third run."""
        durations = list(self._durations[name])
        return statistics.median(durations) if len(durations) >= 3 else None

    def take(self) -> dict[str, float]:
        """Returns seconds per phase since the last call."""
        self._add_elapsed()
        taken, self._seconds = dict(self._seconds), defaultdict(float)
        return taken


class Timeline:
    """The rows of timing.jsonl over all starts of a run; with `enabled` False it stays empty and nothing is written."""

    def __init__(self, path: Path, enabled: bool = True):
        self._path, self._enabled = path, enabled
        self.rows = read_timeline(path) if enabled else []

    def add(self, step: int, seconds: Mapping[str, float], start: bool = False) -> None:
        """Appends a row to the file and to `rows`."""
        if not self._enabled:
            return
        row = {
            "step": step,
            "wall": time.time(),
            "start": start,
            "seconds": {n: round(s, 6) for n, s in seconds.items()},
        }
        self.rows.append(row)
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def read_timeline(path: Path) -> list[dict]:
    """Returns the rows of a timing.jsonl, without one that a kill cut short; [] if there is no file."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def shares(rows: Iterable[Mapping]) -> dict[str, float]:
    """Returns each phase's share of the processes' running time, the largest first."""
    seconds: dict[str, float] = defaultdict(float)
    for row in rows:
        for name, value in row["seconds"].items():
            seconds[name] += value
    total = sum(seconds.values())
    return {name: value / total for name, value in sorted(seconds.items(), key=lambda item: -item[1]) if total}


def goodput(rows: Iterable[Mapping]) -> float:
    """Returns the share of the time since the first start that went into steps which were not lost to a restart.

    That time is what processes ran, plus what passed between the last row of one and the start of the next.
    """
    total, kept, last_wall = 0.0, [], None  # kept: (first step, last step, productive seconds)
    step = 0
    for row in rows:
        if row["start"]:
            step = row["step"]
            kept = [_cut(piece, step) for piece in kept if piece[0] < step]
            total += max(0.0, row["wall"] - last_wall) if last_wall is not None else 0.0
        total += sum(row["seconds"].values())
        kept.append((step, row["step"], row["seconds"].get(STEP, 0.0)))
        step, last_wall = row["step"], row["wall"]
    return sum(piece[2] for piece in kept) / total if total else 0.0


def _cut(piece: tuple[int, int, float], step: int) -> tuple[int, int, float]:
    """Returns the part of a piece (first step, last step, seconds) that remains if the steps after `step` are lost."""
    first, last, seconds = piece
    return piece if last <= step else (first, step, seconds * (step - first) / (last - first))
