"""What a run logged: `metrics.jsonl` read back as a series a name."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ibq_jax.base.json_files import parse_json, read_json

MAX_STEP = 2**53  # what a plot's float64 counts
MAX_LINE_BYTES = 2**22


@dataclass(frozen=True)
class Series:
    """`values` [n] of one name at `steps` [n], rising."""

    steps: np.ndarray
    values: np.ndarray

    @property
    def last(self) -> float:
        return float(self.values[-1])

    def tail(self, share: float) -> "Series":
        """Its last `share` of steps, of what was logged at least two values."""
        keep = self.steps >= self.steps[-1] - share * (self.steps[-1] - self.steps[0])
        keep[-2:] = True
        return Series(self.steps[keep], self.values[keep])


@dataclass(frozen=True)
class History:
    """`series` of scalars by name, without values that are not finite; the last step of such by name in `not_finite`;
    the last `grids` [h, w] by name; and how many lines could not be read."""

    series: dict[str, Series]
    grids: dict[str, np.ndarray]
    unreadable: int = 0
    not_finite: dict[str, int] = field(default_factory=dict)

    @property
    def last_step(self) -> int:
        return max((int(series.steps[-1]) for series in self.series.values()), default=0)

    def __contains__(self, name: str) -> bool:
        return name in self.series

    def __getitem__(self, name: str) -> Series:
        return self.series[name]


def read_history(path: Path) -> History:
    """Of a metrics.jsonl; empty where there is none. A line that a kill cut short is counted and left out."""
    found: dict[str, dict[int, float]] = {}
    grids, unreadable, not_finite = {}, 0, {}
    for line in _lines(path) if path.is_file() else ():
        try:
            row = parse_json(line)
            step = int(row.pop("step"))
            if abs(step) > MAX_STEP or len(line) > MAX_LINE_BYTES:
                raise ValueError("out of range")
            for name, value in row.items():
                if isinstance(value, list):
                    grids[name] = _grid(value)
                elif math.isfinite(value):
                    found.setdefault(name, {})[step] = float(value)  # the newest, where a step was taken again
                else:
                    not_finite[name] = step
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError):
            unreadable += 1
    return History({name: _series(points) for name, points in found.items()}, grids, unreadable, not_finite)


def stopped_by_itself(workdir: Path, last_step: int) -> str:
    """What the loop wrote when it stopped by itself; "" where training went on from before."""
    for path in workdir.glob("stopped_step*_process0.json"):
        try:
            found = read_json(path)
            if found["step"] >= last_step:
                return str(found["reason"])
        except (ValueError, TypeError, KeyError):
            continue  # cut short by a kill
    return ""


def _lines(path: Path) -> Iterator[bytes]:
    """One by one, and of a line without end no more than its first part."""
    with path.open("rb") as file:
        while line := file.readline(MAX_LINE_BYTES + 1):
            yield line


def _grid(rows: list) -> np.ndarray:
    values = np.asarray(rows, np.float64)
    if values.ndim != 2:
        raise ValueError(f"a grid has rows and columns, not {values.ndim} dimensions")
    if not values.size:
        raise ValueError("an empty grid")
    return values


def _series(points: dict[int, float]) -> Series:
    steps = sorted(points)
    return Series(np.asarray(steps), np.asarray([points[step] for step in steps]))
