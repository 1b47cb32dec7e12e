"""The results of a sweep's points, read from their folders.

A point's folder is a run's folder (see `ibq_jax.base.saved_run`) with outcome.json, {"status", "reason"}, which says
how its process ended. Validation scalars are those of the averaged weights, as training logs them.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ibq_jax.base.config import differences, read_config
from ibq_jax.base.json_files import read_json
from ibq_jax.base.timing import read_timeline
from ibq_jax.report.history import History, read_history
from ibq_jax.sweep.grid import Point

DONE, STOPPED, FAILED, PENDING = STATUSES = ("done", "stopped", "failed", "pending")
ENDED = (DONE, STOPPED)  # training again would give the same result
OUTCOME = "outcome.json"
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
        history: what its run logged.
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
        UsageError: its config.json is damaged.
    """
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
    """Returns the rate of training alone, without evaluations, checkpoints and intervals that include compilation."""
    steps, seconds, last = 0, 0.0, 0
    for row in rows:
        if not row["start"] and COMPILING not in row["seconds"]:
            steps += row["step"] - last
            seconds += sum(value for phase, value in row["seconds"].items() if phase not in NOT_TRAINING)
        last = row["step"]
    return batch_size * steps / seconds if seconds else None
