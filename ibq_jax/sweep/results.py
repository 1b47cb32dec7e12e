"""The results of a sweep's points, read from their folders.

A point's folder is a run's folder (see `ibq_jax.base.saved_run`) with outcome.json, {"status", "reason"}, which says
how its process ended. Validation scalars are those of the averaged weights, as training logs them.

What `evaluate` measured later counts as a scalar too, named evaluation/PROTOCOL/METRIC for the averaged weights and the
validation split; other weights and splits stand between protocol and metric.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ibq_jax.autoregressive.token_sizes import open_sizes
from ibq_jax.base.config import differences, read_config
from ibq_jax.base.json_files import read_json
from ibq_jax.base.timing import read_timeline
from ibq_jax.report.history import History, Series, read_history
from ibq_jax.report.run import read_evaluations
from ibq_jax.sweep.grid import Point

DONE, STOPPED, FAILED, PENDING = STATUSES = ("done", "stopped", "failed", "pending")
ENDED = (DONE, STOPPED)  # training again would give the same result
OUTCOME = "outcome.json"
EVALUATION = "evaluation"
NOT_TRAINING = ("evaluation", "images", "pictures", "checkpoint")  # phases of `ibq_jax.base.loop`; "pictures" until 0.1
COMPILING = "first step"


@dataclass(frozen=True)
class Result:
    """The state of a point.

    Attributes:
        point: the point.
        status: "done"; "stopped" by itself, after a collapse or a non-finite loss; "failed"; or "pending", which means
            not started or not finished.
        reason: for the status, in a sentence; may be empty.
        history: what its run logged, and its evaluations.
        seconds: the time that its processes ran.
        images_per_second: while training; None before the first step that did not compile.
    """

    point: Point
    status: str
    reason: str
    history: History
    seconds: float
    images_per_second: float | None


def read_result(folder: Path, point: Point) -> Result:
    """Reads the result of a point from the sweep's folder.

    Raises:
        UsageError: its config.json or an evaluation is damaged.
    """
    workdir = folder / point.name
    status, reason = _outcome(workdir / OUTCOME)
    if not (workdir / "config.json").exists():
        return Result(point, FAILED if status == FAILED else PENDING, reason, History({}, {}), 0.0, None)
    changed = differences(read_config(workdir / "config.json"), point.config, ignore=open_sizes(point.config))
    if changed:
        if status != FAILED:
            status, reason = PENDING, f"its folder holds a run of another config ({'; '.join(changed)})"
        return Result(point, status, reason, History({}, {}), 0.0, None)
    rows = read_timeline(workdir / "timing.jsonl")
    return Result(
        point,
        status,
        reason,
        history=_with_evaluations(read_history(workdir / "metrics.jsonl"), read_evaluations(workdir)),
        seconds=sum(sum(row["seconds"].values()) for row in rows),
        images_per_second=_images_per_second(rows, point.config.data.batch_size),
    )


def _with_evaluations(history: History, records: Iterable[Mapping]) -> History:
    found: dict[str, dict[int, float]] = {}
    for record in records:
        others = [
            word for word, usual in ((record["split"], "validation"), (record["weights"], "ema")) if word != usual
        ]
        place = "/".join([EVALUATION, record["protocol"]["name"], *others])
        for name, value in record["metrics"].items():
            if np.isfinite(value):
                found.setdefault(f"{place}/{name}", {})[record["step"]] = value
    series = {
        name: Series(np.asarray(sorted(values)), np.asarray([values[step] for step in sorted(values)]))
        for name, values in found.items()
    }
    return replace(history, series=history.series | series)


def _outcome(path: Path) -> tuple[str, str]:
    try:
        found = read_json(path)
        status, reason = found["status"], str(found["reason"])
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return PENDING, ""
    return (status, reason) if status in STATUSES else (PENDING, "")


def _images_per_second(rows: Iterable[Mapping], batch_size: int) -> float | None:
    """Returns the rate of training alone, without evaluations, checkpoints and intervals that include compilation."""
    steps, seconds, last = 0, 0.0, 0
    for row in rows:
        if not row["start"] and COMPILING not in row["seconds"]:
            steps += row["step"] - last
            seconds += sum(value for phase, value in row["seconds"].items() if phase not in NOT_TRAINING)
        last = row["step"]
    return batch_size * steps / seconds if seconds else None
