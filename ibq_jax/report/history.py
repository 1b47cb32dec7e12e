"""The scalars that a run logged: metrics.jsonl, read back as one series per name."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ibq_jax.base.json_files import parse_json, read_json

MAX_STEP = 2**53  # the largest integers that float64, and so a plot, represents exactly
MAX_LINE_BYTES = 2**22

# Names that earlier versions logged -> today's. A run that an earlier version began has both in one file.
RENAMED = {
    "adversary/discriminator": "discriminator/loss",
    "codebook/average_entropy": "codebook/batch_entropy",
    "gradient_norm": "optimizer/gradient_norm",
}
RENAMED_PREFIX = ("adversary/", "discriminator/")


@dataclass(frozen=True)
class Series:
    """The `values` [n] of one scalar at the rising `steps` [n]."""

    steps: np.ndarray
    values: np.ndarray

    @property
    def last(self) -> float:
        """The newest value."""
        return float(self.values[-1])

    def tail(self, share: float) -> "Series":
        """Returns the last `share` of the steps, with at least the last two values."""
        keep = self.steps >= self.steps[-1] - share * (self.steps[-1] - self.steps[0])
        keep[-2:] = True
        return Series(self.steps[keep], self.values[keep])


@dataclass(frozen=True)
class History:
    """Everything that a run logged.

    Attributes:
        series: the finite values of each scalar, by name.
        grids: the newest value [h, w] of each logged array, by name.
        unreadable: how many lines could not be read.
        not_finite: the newest step at which a scalar was NaN or infinite, by name.
    """

    series: dict[str, Series]
    grids: dict[str, np.ndarray]
    unreadable: int = 0
    not_finite: dict[str, int] = field(default_factory=dict)

    @property
    def last_step(self) -> int:
        """The newest step with a finite scalar; 0 if there is none."""
        return max((int(series.steps[-1]) for series in self.series.values()), default=0)

    def __contains__(self, name: str) -> bool:
        return name in self.series

    def __getitem__(self, name: str) -> Series:
        return self.series[name]


def read_history(path: Path) -> History:
    """Reads a metrics.jsonl; the history is empty if the file does not exist.

    Lines that cannot be read, such as one that a kill cut short, are counted and left out. If a step was logged twice,
    because a restart repeated it, the newer value counts. Names of earlier versions become today's.
    """
    found: dict[str, dict[int, float]] = {}
    grids, unreadable, not_finite = {}, 0, {}
    for line in _lines(path) if path.is_file() else ():
        try:
            row = parse_json(line)
            step = int(row.pop("step"))
            if abs(step) > MAX_STEP or len(line) > MAX_LINE_BYTES:
                raise ValueError("out of range")
            for logged, value in row.items():
                name = _current_name(logged)
                if isinstance(value, list):
                    grids[name] = _grid(value)
                elif math.isfinite(value):
                    found.setdefault(name, {})[step] = float(value)
                else:
                    not_finite[name] = step
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError):
            unreadable += 1
    return History({name: _series(points) for name, points in found.items()}, grids, unreadable, not_finite)


def stopped_by_itself(workdir: Path, last_step: int) -> str:
    """Returns the reason that the training loop gave when it stopped by itself; "" if training continued after that."""
    for path in workdir.glob("stopped_step*_process0.json"):
        try:
            found = read_json(path)
            if found["step"] >= last_step:
                return str(found["reason"])
        except (ValueError, TypeError, KeyError):
            continue  # cut short by a kill
    return ""


def _current_name(name: str) -> str:
    old, new = RENAMED_PREFIX
    return RENAMED.get(name) or (new + name.removeprefix(old) if name.startswith(old) else name)


def _lines(path: Path) -> Iterator[bytes]:
    """Yields the lines one by one, and an endless line in pieces of bounded size."""
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
