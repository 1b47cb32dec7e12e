"""What the points of a sweep came to: read from their folders, and put together over seeds.

A point's folder is a run's (see `ibq_jax.base.saved_run`) with outcome.json, {"status", "reason"}: how its process
ended. A point's numbers are the last that its run logged, so those of validation are of the averaged weights.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ml_collections import ConfigDict

from ibq_jax.base.config import differences, read_config
from ibq_jax.base.json_files import read_json
from ibq_jax.base.timing import read_timeline
from ibq_jax.report.history import History, read_history

DONE, STOPPED, FAILED, PENDING = STATUSES = ("done", "stopped", "failed", "pending")
ENDED = (DONE, STOPPED)  # training again would give the same
OUTCOME = "outcome.json"
NOT_TRAINING = ("evaluation", "pictures", "checkpoint")  # parts of a run's time (see `ibq_jax.base.loop`)
COMPILING = "first step"


@dataclass(frozen=True)
class Point:
    """A run of the sweep. `name`: of its folder; `values`: of the swept fields; `overrides` make its `config`."""

    index: int
    name: str
    values: Mapping[str, object]
    config: ConfigDict
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Result:
    """`status`: done; stopped, by itself (a collapse, a number that is not finite); failed; or pending, which is both
    not started and not at its end. `seconds`: that its processes ran."""

    point: Point
    status: str
    reason: str
    history: History
    seconds: float
    images_per_second: float | None


def read_result(folder: Path, point: Point) -> Result:
    """Of a point in the sweep's folder. Raises UsageError where its config.json is none."""
    workdir = folder / point.name
    status, reason = _outcome(workdir / OUTCOME)
    if not (workdir / "config.json").exists():
        return Result(point, FAILED if status == FAILED else PENDING, reason, History({}, {}), 0.0, None)
    changed = differences(read_config(workdir / "config.json"), point.config)
    if changed:
        if status != FAILED:
            status, reason = PENDING, f"its folder holds a run of another config ({'; '.join(changed)})"
        return Result(point, status, reason, History({}, {}), 0.0, None)
    rows = read_timeline(workdir / "timing.jsonl")
    return Result(
        point,
        status,
        reason,
        history=read_history(workdir / "metrics.jsonl"),
        seconds=sum(sum(row["seconds"].values()) for row in rows),
        images_per_second=_images_per_second(rows, point.config.data.batch_size),
    )


def _outcome(path: Path) -> tuple[str, str]:
    try:
        found = read_json(path)
        status, reason = found["status"], str(found["reason"])
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return PENDING, ""
    return (status, reason) if status in STATUSES else (PENDING, "")


def _images_per_second(rows: Iterable[Mapping], batch_size: int) -> float | None:
    """While it trains: without evaluations, checkpoints and the rows in which it compiled; None where that is all."""
    steps, seconds, last = 0, 0.0, 0
    for row in rows:
        if not row["start"] and COMPILING not in row["seconds"]:
            steps += row["step"] - last
            seconds += sum(value for part, value in row["seconds"].items() if part not in NOT_TRAINING)
        last = row["step"]
    return batch_size * steps / seconds if seconds else None


@dataclass(frozen=True)
class Spread:
    """A number of `seeds` runs that differ in their seed alone."""

    mean: float
    low: float
    high: float
    seeds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread | None":
        """None where there is no value."""
        return cls(sum(values) / len(values), min(values), max(values), len(values)) if values else None


@dataclass(frozen=True)
class Row:
    """The results of points that differ in their seed alone."""

    values: Mapping[str, object]
    results: tuple[Result, ...]

    @property
    def ended(self) -> tuple[Result, ...]:
        """Those whose numbers are of a run at its end."""
        return tuple(result for result in self.results if result.status in ENDED)

    def statuses(self) -> dict[str, int]:
        """How many points there are of each status that occurs."""
        found = [result.status for result in self.results]
        return {status: found.count(status) for status in STATUSES if status in found}

    def spread(self, metric: str) -> Spread | None:
        return Spread.of([result.history[metric].last for result in self.ended if metric in result.history])

    def steps(self) -> Spread | None:
        return Spread.of([result.history.last_step for result in self.ended])

    def seconds(self) -> Spread | None:
        return Spread.of([result.seconds for result in self.ended])

    def images_per_second(self) -> Spread | None:
        rates = [result.images_per_second for result in self.ended]
        return Spread.of([rate for rate in rates if rate is not None])


def rows_of(results: Iterable[Result]) -> list[Row]:
    """In the order of the points."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(repr(sorted(result.point.values.items())), []).append(result)
    return [Row(group[0].point.values, tuple(group)) for group in groups.values()]
