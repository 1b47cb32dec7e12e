"""What a run logged: `metrics.jsonl` read back as a series a name."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np


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
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else ():
        try:
            row = json.loads(line)
            step = int(row.pop("step"))
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


def _grid(rows: list) -> np.ndarray:
    values = np.asarray(rows, np.float64)
    if values.ndim != 2:
        raise ValueError(f"a grid has rows and columns, not {values.ndim} dimensions")
    return values


def _series(points: dict[int, float]) -> Series:
    steps = sorted(points)
    return Series(np.asarray(steps), np.asarray([points[step] for step in steps]))
