"""The tables of a sweep: one row per setting of the swept fields, with the mean and the range over seeds.

Written as table.md to read, table.csv to load, and results.json, which has the numbers of every point too.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from ibq_jax.base.files import write_text
from ibq_jax.evaluate.feature_nets import small_sample_caveats
from ibq_jax.sweep.grid import field_words
from ibq_jax.sweep.results import DONE, ENDED, EVALUATION, STATUSES, Result

DEFAULT_METRICS = (  # shown if any point has logged them
    "validation/psnr",
    "validation/rFID",
    "validation/FD-EfficientNetLite0",
    "validation/usage",
    "validation/perplexity",
    "validation/loss",
    "validation/next_token",
    "validation/next_token_relative",
    "codebook/usage",
    "codebook/perplexity",
)
FORMATS = {"psnr": "{:.2f}", "usage": "{:.1%}", "perplexity": "{:,.1f}"}  # by the last part of a metric's name
MEASURED = {  # of every point: heading and format
    "steps": ("steps", "{:,.0f}".format),
    "seconds": ("time", tqdm.format_interval),
    "images_per_second": ("images/s", "{:,.1f}".format),
}
STATISTICS = {"mean": "mean", "min": "low", "max": "high", "count": "seeds"}  # pandas' names -> those in results.json
SPREAD = "mean (least..greatest) over the seeds that are done or stopped"
LEGEND = (
    "`validation/`: on the validation split, with the averaged (EMA) weights. `codebook/`: over the latest codes of "
    "training. `evaluation/`: by the command evaluate, under the protocol that is named. Each number is the last one "
    "of its run."
)


@dataclass(frozen=True)
class Table:
    """The `results` of a sweep's points, with columns for `metrics` (names of logged scalars)."""

    results: Sequence[Result]
    metrics: Sequence[str]

    @cached_property
    def settings(self) -> dict[str, list[Result]]:
        """The results that differ in their seed alone, by the values of the swept fields in words."""
        groups: dict[str, list[Result]] = {}
        for result in self.results:
            groups.setdefault(field_words(result.point.values), []).append(result)
        return groups

    @cached_property
    def spread(self) -> pd.DataFrame:
        """Each setting's mean, low, high and number of seeds; the columns are (metric or MEASURED, statistic).

        Points that have not ended do not count.
        """
        names = list(dict.fromkeys([*self.metrics, *MEASURED]))
        numbers = pd.DataFrame(
            [_numbers(result, self.metrics) if result.status in ENDED else {} for result in self.results],
            index=[field_words(result.point.values) for result in self.results],
            columns=names,
            dtype=float,
        )
        return numbers.groupby(level=0, sort=False).agg([*STATISTICS]).rename(columns=STATISTICS, level=1)

    def markdown(self, title: str, plots: Sequence[str]) -> str:
        """Returns the table as Markdown, with notes and `plots` (paths relative to the file)."""
        cells = self._fields().map(str)
        for name in self.spread.columns.unique(level=0):
            heading, form = MEASURED.get(name, (name, _format(name)))
            cells[heading] = [_words(form, row) for _, row in self.spread[name].iterrows()]
        cells = cells.map(lambda cell: cell.replace("|", "\\|"))
        table = cells.to_markdown(index=False, disable_numparse=True)
        several = any(len(results) > 1 for results in self.settings.values())
        lines = [f"# {title}", "", table, "", *([f"Numbers are the {SPREAD}."] if several else []), LEGEND]
        notes = [*self._unfinished(), *self._caveats(), *self._never_logged()]
        lines += ["", *(f"- {note}" for note in notes)] if notes else []
        lines += ["", *(f"![{plot}]({plot})" for plot in plots)] if plots else []
        return "\n".join(lines) + "\n"

    def csv(self) -> str:
        """Returns the table as CSV, with the least and the greatest value of each number in columns of their own."""
        spread = self.spread.drop(columns="seeds", level=1)
        endings = {"mean": "", "low": " least", "high": " greatest"}
        spread.columns = [name + endings[statistic] for name, statistic in spread.columns]
        return self._fields().join(spread).to_csv(index=False, lineterminator="\n")

    def json(self) -> str:
        """Returns {"spread": what the numbers are, "rows": as in the table, "points": the newest of all scalars}."""
        spreads: list[Any] = [row for _, row in self.spread.iterrows()]
        rows = [
            {
                "values": dict(results[0].point.values),
                "statuses": _statuses(results),
                "metrics": {
                    name: spread[name].astype(object).to_dict() | {"seeds": int(spread[name]["seeds"])}
                    for name in self.metrics
                    if spread[name]["seeds"]
                },
            }
            for results, spread in zip(self.settings.values(), spreads, strict=True)
        ]
        points = [_point(result) for results in self.settings.values() for result in results]
        return json.dumps({"spread": SPREAD, "rows": rows, "points": points}, indent=2) + "\n"

    def _fields(self) -> pd.DataFrame:
        """The swept fields and the status of each setting."""
        rows = []
        for results in self.settings.values():
            counts = _statuses(results)
            words = ", ".join(f"{count} {status}" for status, count in counts.items())
            rows.append({**results[0].point.values, "status": words if len(results) > 1 else results[0].status})
        return pd.DataFrame(rows, index=list(self.settings), dtype=object)

    def _unfinished(self) -> Iterator[str]:
        """Yields why a point is not done, and how old its numbers are."""
        for result in (result for results in self.settings.values() for result in results if result.status != DONE):
            series = result.history.series
            step = f" at step {result.history.last_step:,}" if series else ""
            measured = [int(scalar.steps[-1]) for name, scalar in series.items() if name.startswith("validation/")]
            last = f" (validated at step {max(measured):,})" if measured else ""
            yield f"{result.point.name}: {result.status}{step}{last}{': ' if result.reason else ''}{result.reason}"

    def _caveats(self) -> Iterable[str]:
        name = "validation/images"
        images = [r.history[name].last for r in self.results if r.status in ENDED and name in r.history]
        names = [metric.removeprefix("validation/") for metric in self.metrics]
        return small_sample_caveats(names, int(min(images))) if images else []

    def _never_logged(self) -> list[str]:
        logged = set().union(*(result.history.series for result in self.results))
        return [f"no point has logged {name}" for name in self.metrics if name not in logged]


def chosen_metrics(asked: Sequence[str], results: Iterable[Result]) -> list[str]:
    """Returns the metrics asked for, or those of DEFAULT_METRICS that any point has logged and what was evaluated."""
    logged = set().union(*(result.history.series for result in results))
    later = sorted(name for name in logged if name.startswith(f"{EVALUATION}/"))
    return list(asked) or [*(name for name in DEFAULT_METRICS if name in logged), *later]


def write_table(folder: Path, table: Table, plots: Sequence[str]) -> str:
    """Writes table.md, table.csv and results.json, and returns the Markdown without the plots."""
    write_text(folder / "table.md", table.markdown(folder.name, plots))
    write_text(folder / "table.csv", table.csv())
    write_text(folder / "results.json", table.json())
    return table.markdown(folder.name, ())


def _numbers(result: Result, metrics: Sequence[str]) -> dict[str, float]:
    rate = np.nan if result.images_per_second is None else result.images_per_second
    measured = {"steps": result.history.last_step, "seconds": result.seconds, "images_per_second": rate}
    return {name: result.history[name].last for name in metrics if name in result.history} | measured


def _statuses(results: Sequence[Result]) -> dict[str, int]:
    """Returns how many results have each status."""
    found = [result.status for result in results]
    return {status: found.count(status) for status in STATUSES if status in found}


def _format(metric: str) -> Callable[[float], str]:
    return FORMATS.get(metric.rpartition("/")[2], "{:.4g}").format


def _words(form: Callable[[float], str], spread: Any) -> str:
    if not spread["seeds"]:
        return ""
    mean, low, high = form(spread["mean"]), form(spread["low"]), form(spread["high"])
    return mean if low == high else f"{mean} ({low}..{high})"


def _point(result: Result) -> dict:
    return {
        "name": result.point.name,
        "values": dict(result.point.values),
        "seed": result.point.config.seed,
        "status": result.status,
        "reason": result.reason,
        "step": result.history.last_step,
        "seconds": result.seconds,
        "images_per_second": result.images_per_second,
        "metrics": {
            name: {"step": int(series.steps[-1]), "value": series.last}
            for name, series in sorted(result.history.series.items())
        },
    }
