"""Where the time of a run goes: parts of a step, and goodput over all starts of the run.

`timing.jsonl` beside metrics.jsonl has a row each time scalars are logged: {"step", "wall": seconds since 1970,
"start": whether a process began here, "seconds": {part: since the row before}}. PhaseTimer are measured by a clock that
nobody sets; `wall` serves only to know how long the run lay still between two starts.
"""

import contextlib
import json
import statistics
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

STEP = "step"  # queueing a step, and waiting for the devices to finish the one before: the productive part
BETWEEN = "other"  # what no part claims
REMEMBERED = 100  # durations of a part, by which a long one is known


class PhaseTimer:
    """What the host is doing, and how long it has done what; parts may lie inside others, which stand still then."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._names, self._since = [BETWEEN], clock()
        self._entered = self._since
        self._seconds: dict[str, float] = defaultdict(float)
        self._durations: dict[str, deque] = defaultdict(lambda: deque(maxlen=REMEMBERED))

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        outer_entered = self._entered
        self._turn()
        self._names.append(name)
        self._entered = self._since
        yield
        self._turn()
        self._durations[name].append(self._since - self._entered)
        self._names.pop()
        self._entered = outer_entered

    def _turn(self) -> None:
        now = self._clock()
        self._seconds[self._names[-1]] += now - self._since
        self._since = now

    @property
    def now(self) -> tuple[str, float]:
        """(the part, how many seconds it has lasted), for another thread to look at."""
        return self._names[-1], self._clock() - self._entered

    def usual(self, name: str) -> float | None:
        """Median seconds of the part, once there have been a few."""
        durations = list(self._durations[name])
        return statistics.median(durations) if len(durations) >= 3 else None

    def take(self) -> dict[str, float]:
        """Seconds by part since the last call."""
        self._turn()
        taken, self._seconds = dict(self._seconds), defaultdict(float)
        return taken


class Timeline:
    """The rows of `path`, over all starts of a run; written where `enabled`."""

    def __init__(self, path: Path, enabled: bool = True):
        self._path, self._enabled = path, enabled
        self.rows = read_timeline(path) if enabled else []

    def add(self, step: int, seconds: Mapping[str, float], start: bool = False) -> None:
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
    """The rows of a timing.jsonl, but for one that a kill cut short; none where there is no file."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def shares(rows: Iterable[Mapping]) -> dict[str, float]:
    """Of the time that processes ran: by part, the largest first."""
    seconds: dict[str, float] = defaultdict(float)
    for row in rows:
        for name, value in row["seconds"].items():
            seconds[name] += value
    total = sum(seconds.values())
    return {name: value / total for name, value in sorted(seconds.items(), key=lambda item: -item[1]) if total}


def goodput(rows: Iterable[Mapping]) -> float:
    """Productive time over all the time since the first start: what the steps took that were not lost to a restart.

    All the time is what processes ran, and what passed between the last row of one and the start of the next.
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
    """What is left of the seconds of some steps when those after `step` are lost."""
    first, last, seconds = piece
    return piece if last <= step else (first, step, seconds * (step - first) / (last - first))
