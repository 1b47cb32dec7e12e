"""The table of a sweep: a row for each setting of its fields, with the mean and the spread over seeds.

Written as table.md to read, table.csv to load, and results.json, which has every point's numbers too.
"""

import csv
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from ibq_jax.evaluate.feature_nets import few_images
from ibq_jax.report.history import Series
from ibq_jax.sweep.results import DONE, Result, Row, Spread

DEFAULT_METRICS = (  # those of them that a point has
    "validation/psnr",
    "validation/rFID",
    "validation/FD-EfficientNetLite0",
    "validation/usage",
    "validation/perplexity",
    "validation/loss",
    "codebook/usage",
    "codebook/perplexity",
)
FORMS = {"psnr": "{:.2f}", "usage": "{:.1%}", "perplexity": "{:,.1f}"}  # by the last part of a name
SPREAD = "mean (least..greatest) over the seeds that are done or stopped"
LEGEND = (
    "validation/...: on the validation split, of the averaged (EMA) weights; codebook/...: over the last codes of "
    "training. Each number is the last that its run logged."
)


def chosen_metrics(asked: Sequence[str], results: Iterable[Result]) -> list[str]:
    """Those asked for, or the default ones that any point has."""
    logged = set().union(*(result.history.series for result in results))
    return list(asked) or [name for name in DEFAULT_METRICS if name in logged]


def field_words(values: Mapping[str, object]) -> str:
    """size=256, name=ibq: a setting in short, each field under the last part of its name where that is its own."""
    return ", ".join(f"{label}={values[name]}" for name, label in short_names(list(values)).items())


def short_names(fields: Sequence[str]) -> dict[str, str]:
    """size of codebook.size, unless another field ends so."""
    leaves = [field.rpartition(".")[2] for field in fields]
    return {field: leaf if leaves.count(leaf) == 1 else field for field, leaf in zip(fields, leaves, strict=True)}


def markdown(title: str, rows: Sequence[Row], metrics: Sequence[str], plots: Sequence[str]) -> str:
    """`plots`: their places, relative to the table's."""
    several = any(len(row.results) > 1 for row in rows)
    header = [*rows[0].values, "status", *metrics, "steps", "time", "images/s"]
    cells = [
        [
            *map(str, row.values.values()),
            _statuses(row),
            *(_words(row.spread(name), _form(name)) for name in metrics),
            _words(row.steps(), "{:,.0f}".format),
            _words(row.seconds(), tqdm.format_interval),
            _words(row.images_per_second(), "{:,.1f}".format),
        ]
        for row in rows
    ]
    lines = [f"# {title}", "", _line(header), _line(["---"] * len(header)), *map(_line, cells), ""]
    lines += [*([f"Numbers are the {SPREAD}."] if several else []), LEGEND]
    logged = set().union(*(result.history.series for row in rows for result in row.results))
    absent = [f"no point has logged {name}" for name in metrics if name not in logged]
    notes = [*_unfinished(rows), *_marks(rows, metrics), *absent]
    lines += ["", *(f"- {note}" for note in notes)] if notes else []
    lines += ["", *(f"![{plot}]({plot})" for plot in plots)] if plots else []
    return "\n".join(lines) + "\n"


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _statuses(row: Row) -> str:
    if len(row.results) == 1:
        return row.results[0].status
    return ", ".join(f"{count} {status}" for status, count in row.statuses().items())


def _form(metric: str) -> Callable[[float], str]:
    return FORMS.get(metric.rpartition("/")[2], "{:.4g}").format


def _words(spread: Spread | None, form: Callable[[float], str]) -> str:
    if spread is None:
        return ""
    mean, low, high = form(spread.mean), form(spread.low), form(spread.high)
    return mean if low == high else f"{mean} ({low}..{high})"


def _unfinished(rows: Iterable[Row]) -> Iterable[str]:
    """Why a point did not come to its end, and how old its numbers are."""
    for result in (result for row in rows for result in row.results if result.status != DONE):
        history = result.history
        step = f" at step {history.last_step:,}" if history.series else ""
        measured = [int(series.steps[-1]) for name, series in history.series.items() if name.startswith("validation/")]
        last = f" (validated at step {max(measured):,})" if measured else ""
        yield f"{result.point.name}: {result.status}{step}{last}{': ' if result.reason else ''}{result.reason}"


def _marks(rows: Iterable[Row], metrics: Sequence[str]) -> Iterable[str]:
    images = [row.spread("validation/images") for row in rows]
    fewest = min((int(spread.low) for spread in images if spread), default=0)
    return few_images([name.removeprefix("validation/") for name in metrics], fewest) if fewest else []


def comma_separated(rows: Sequence[Row], metrics: Sequence[str]) -> str:
    """As the Markdown table, with the spread in columns of its own."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    numbers = [*metrics, "steps", "seconds", "images_per_second"]
    writer.writerow(
        [*rows[0].values, "status", *(f"{name}{end}" for name in numbers for end in ("", " least", " greatest"))]
    )
    for row in rows:
        spreads = [*map(row.spread, metrics), row.steps(), row.seconds(), row.images_per_second()]
        columns = [(spread.mean, spread.low, spread.high) if spread else ("", "", "") for spread in spreads]
        writer.writerow([*row.values.values(), _statuses(row), *(cell for three in columns for cell in three)])
    return out.getvalue()


def as_json(rows: Sequence[Row], metrics: Sequence[str]) -> str:
    """{"spread": which it is, "rows": as in the table, "points": all that each logged last}."""
    found = {
        "spread": SPREAD,
        "rows": [
            {
                "values": dict(row.values),
                "statuses": row.statuses(),
                "metrics": {name: asdict(spread) for name in metrics if (spread := row.spread(name))},
            }
            for row in rows
        ],
        "points": [_point(result) for row in rows for result in row.results],
    }
    return json.dumps(found, indent=2) + "\n"


def _point(result: Result) -> dict:
    def measured(series: Series) -> dict:
        return {"step": int(series.steps[-1]), "value": series.last}

    return {
        "name": result.point.name,
        "values": dict(result.point.values),
        "seed": result.point.config.seed,
        "status": result.status,
        "reason": result.reason,
        "step": result.history.last_step,
        "seconds": result.seconds,
        "images_per_second": result.images_per_second,
        "metrics": {name: measured(series) for name, series in sorted(result.history.series.items())},
    }


def write_table(folder: Path, title: str, rows: Sequence[Row], metrics: Sequence[str], plots: Sequence[str]) -> str:
    """Writes the three files, and returns the Markdown without the plots."""
    (folder / "table.md").write_text(markdown(title, rows, metrics, plots))
    (folder / "table.csv").write_text(comma_separated(rows, metrics))
    (folder / "results.json").write_text(as_json(rows, metrics))
    return markdown(title, rows, metrics, ())
