"""Plots of a sweep, as PNG: its numbers against a swept field, and its training curves, with every seed to be seen."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator, NullLocator

from ibq_jax.report.curves import COLOURS, DASHES, FEW, LEGEND_ROW, PANELS, SIZE, STYLE, plain, scale, titled_axes
from ibq_jax.sweep.results import Row
from ibq_jax.sweep.table import field_words, short_names

FOLDER = "plots"
PNG = STYLE | {"savefig.transparent": False, "savefig.facecolor": "white", "savefig.dpi": 160}
FITTING = 60  # letters of a legend beside its line, in the width of a plot
WIDE = 8  # greatest over least of a field's values, from which on its axis is logarithmic


def draw(folder: Path, rows: Sequence[Row], metrics: Sequence[str]) -> list[str]:
    """Writes the plots that there is something for under the sweep's `folder`; returns their places in it."""
    (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    field, written = numeric_field([row.values for row in rows]), []
    for metric in metrics:
        figures = {}
        with rc_context(PNG):
            if field is not None:
                figures[f"over_{short_names(list(rows[0].values))[field]}"] = _over_field(rows, metric, field)
            figures["over_steps"] = _over_steps(rows, metric)
            for ending, figure in figures.items():
                if figure is not None:
                    written.append(f"{FOLDER}/{metric.replace('/', '_')}_{ending}.png")
                    _write(figure, folder / written[-1])
    return written


def numeric_field(settings: Sequence[Mapping[str, object]]) -> str | None:
    """The first field that has at least two values, all of them numbers."""
    for field in settings[0]:
        values = {setting[field] for setting in settings}
        if len(values) > 1 and all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
            return field
    return None


def _over_field(rows: Sequence[Row], metric: str, field: str) -> Figure | None:
    """A line for each setting of the other fields; bars from the least to the greatest of the seeds."""
    lines: dict[str, list[tuple]] = {}
    for row in rows:
        others = field_words({name: value for name, value in row.values.items() if name != field})
        spread = row.spread(metric)
        if spread is not None:
            lines.setdefault(others, []).append((row.values[field], spread))
    if not lines:
        return None
    figure, axes = _axes_of(metric, len(lines))
    for i, points in enumerate(lines.values()):
        points.sort(key=lambda point: point[0])
        low, mean, high = (np.asarray([getattr(s, part) for _, s in points]) for part in ("low", "mean", "high"))
        colour, dash = COLOURS[i % len(COLOURS)], DASHES[i // len(COLOURS) % len(DASHES)]
        style = {"color": colour, "linestyle": dash, "linewidth": 1.4, "marker": "o", "markersize": 3, "capsize": 3}
        axes.errorbar([x for x, _ in points], mean, (mean - low, high - mean), **style)
    spreads = [spread for points in lines.values() for _, spread in points]
    _scale_up(axes, metric, min(spread.low for spread in spreads), max(spread.high for spread in spreads))
    several = any(spread.seeds > 1 for spread in spreads)
    axes.set_xlabel(f"{field}; mean of seeds, bars: least to greatest" if several else field)
    ticks = sorted({x for points in lines.values() for x, _ in points})
    if ticks[0] > 0 and ticks[-1] / ticks[0] >= WIDE:
        axes.set_xscale("log")
    axes.set_xticks(ticks)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(plain))
    _legend(figure, axes.containers, list(lines))
    return figure


def _over_steps(rows: Sequence[Row], metric: str) -> Figure | None:
    """A colour for each setting, a line for each seed; of points that are not at their end, too."""
    lines = {
        field_words(row.values): [result.history[metric] for result in row.results if metric in result.history]
        for row in rows
    }
    lines = {words: seeds for words, seeds in lines.items() if seeds}
    if not lines:
        return None
    figure, axes = _axes_of(metric, len(lines))
    first = []
    for i, seeds in enumerate(lines.values()):
        for series in seeds:
            style = {"color": COLOURS[i % len(COLOURS)], "linestyle": DASHES[i // len(COLOURS) % len(DASHES)]}
            marker = "o" if len(series.steps) < FEW else ""
            drawn = axes.plot(series.steps, series.values, **style, linewidth=1.2, marker=marker, markersize=2.5)
            first += drawn if series is seeds[0] else []
    every = np.concatenate([series.values for seeds in lines.values() for series in seeds])
    _scale_up(axes, metric, every.min(), every.max())
    several = any(len(seeds) > 1 for seeds in lines.values())
    axes.set_xlabel("step; a line a seed" if several else "step")
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    _legend(figure, first, list(lines))
    return figure


def _axes_of(metric: str, lines: int) -> tuple[Figure, Axes]:
    panel = _panel(metric)
    figure, axes = titled_axes(panel.title if panel else metric, SIZE[1] + (lines if lines > 1 else 0) * LEGEND_ROW)
    axes.set_ylabel(metric)
    return figure, axes


def _panel(metric: str):
    return next((panel for panels in PANELS.values() for panel in panels if metric in panel.names), None)


def _scale_up(axes: Axes, metric: str, lowest: float, highest: float) -> None:
    panel = _panel(metric)
    scale(axes.yaxis, lowest, highest, log=panel is not None and panel.log and lowest > 0)


def _legend(figure: Figure, drawn: Sequence, labels: Sequence[str]) -> None:
    if len(labels) > 1:
        fontsize = 8 * min(1.0, FITTING / max(map(len, labels)))
        figure.legend(drawn, labels, loc="outside lower left", fontsize=fontsize, handlelength=1.6)


def _write(figure: Figure, path: Path) -> None:
    out = io.BytesIO()  # a bucket takes no file handle
    figure.savefig(out, format="png")
    path.write_bytes(out.getvalue())
