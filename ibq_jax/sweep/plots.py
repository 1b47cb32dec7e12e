"""Plots of a sweep, as PNG: metrics against a swept field, and training curves with one line per seed."""

import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator, NullLocator

from ibq_jax.report.curves import (
    COLOURS,
    DASHES,
    FEW_POINTS,
    LEGEND_ROW,
    PANELS,
    SIZE,
    STYLE,
    plain,
    scale,
    titled_axes,
)
from ibq_jax.sweep.grid import field_words, short_names
from ibq_jax.sweep.table import Table

FOLDER = "plots"
DATA_SET = "data.name"  # the field; numbers on different data are not compared in one plot
PNG: dict[Any, Any] = STYLE | {"savefig.transparent": False, "savefig.facecolor": "white", "savefig.dpi": 160}
LEGEND_WIDTH = 60  # characters of a legend entry that fit in a plot; longer ones are set smaller
WIDE = 8  # ratio of a field's largest value to its smallest from which its axis is logarithmic


def draw(folder: Path, table: Table) -> list[str]:
    """Writes plots of the table's metrics into the sweep's `folder`, and returns their paths relative to it.

    Plots without data are left out. If data sets are swept, each has plots of its own, whose names end in its name.
    """
    (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    field, written = numeric_field([results[0].point.values for results in table.settings.values()]), []
    for part, end in _by_data_set(table):
        for metric in table.metrics:
            figures = {}
            with rc_context(PNG):
                if field is not None:
                    short = short_names(list(table.results[0].point.values))[field]
                    figures[f"over_{short}"] = _over_field(part, metric, field)
                figures["over_steps"] = _over_steps(part, metric)
                for ending, figure in figures.items():
                    if figure is not None:
                        written.append(f"{FOLDER}/{metric.replace('/', '_')}_{ending}{end}.png")
                        _write(figure, folder / written[-1])
    return written


def _by_data_set(table: Table) -> Iterator[tuple[Table, str]]:
    """Yields the part of the table of each data set and the end of its plots' names."""
    names = list(dict.fromkeys(result.point.values.get(DATA_SET) for result in table.results))
    for name in names:
        part = Table([result for result in table.results if result.point.values.get(DATA_SET) == name], table.metrics)
        yield part, f"_{name}" if len(names) > 1 else ""


def numeric_field(settings: Sequence[Mapping[str, object]]) -> str | None:
    """Returns the first field with at least two values, all of them numbers; None if there is none."""
    for field in settings[0]:
        values = {setting[field] for setting in settings}
        if len(values) > 1 and all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
            return field
    return None


def _over_field(table: Table, metric: str, field: str) -> Figure | None:
    """Draws one line per setting of the other fields, with bars from the lowest to the highest seed."""
    settings = [results[0].point.values for results in table.settings.values()]
    spread = table.spread[metric].assign(
        x=[setting[field] for setting in settings],
        others=[field_words({name: value for name, value in each.items() if name != field}) for each in settings],
    )
    spread: Any = spread[spread["seeds"] > 0].sort_values(by=["x"], kind="stable")
    if spread.empty:
        return None
    lines: dict[str, Any] = {str(others): group for others, group in spread.groupby("others", sort=False)}
    figure, axes = _axes_of(metric, len(lines))
    for i, line in enumerate(lines.values()):
        colour, dash = COLOURS[i % len(COLOURS)], DASHES[i // len(COLOURS) % len(DASHES)]
        style = {"color": colour, "linestyle": dash, "linewidth": 1.4, "marker": "o", "markersize": 3, "capsize": 3}
        axes.errorbar(line["x"], line["mean"], (line["mean"] - line["low"], line["high"] - line["mean"]), **style)
    _scale_y(axes, metric, spread["low"].min(), spread["high"].max())
    several = bool((spread["seeds"] > 1).any())
    axes.set_xlabel(f"{field}; mean of seeds, bars: least to greatest" if several else field)
    ticks = sorted(set(spread["x"]))
    if ticks[0] > 0 and ticks[-1] / ticks[0] >= WIDE:
        axes.set_xscale("log")
    axes.set_xticks(ticks)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(plain))
    _legend(figure, axes.containers, list(lines))
    return figure


def _over_steps(table: Table, metric: str) -> Figure | None:
    """Draws one line per point, coloured by setting; points that have not ended are included."""
    lines = {
        words: [result.history[metric] for result in results if metric in result.history]
        for words, results in table.settings.items()
    }
    lines = {words: seeds for words, seeds in lines.items() if seeds}
    if not lines:
        return None
    figure, axes = _axes_of(metric, len(lines))
    first = []
    for i, seeds in enumerate(lines.values()):
        for series in seeds:
            colour, dash = COLOURS[i % len(COLOURS)], DASHES[i // len(COLOURS) % len(DASHES)]
            marker = "o" if len(series.steps) < FEW_POINTS else ""
            drawn = axes.plot(
                series.steps, series.values, color=colour, linestyle=dash, linewidth=1.2, marker=marker, markersize=2.5
            )
            first += drawn if series is seeds[0] else []
    every = np.concatenate([series.values for seeds in lines.values() for series in seeds])
    _scale_y(axes, metric, every.min(), every.max())
    several = any(len(seeds) > 1 for seeds in lines.values())
    axes.set_xlabel("step; one line per seed" if several else "step")
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


def _scale_y(axes: Axes, metric: str, lowest: float, highest: float) -> None:
    panel = _panel(metric)
    scale(axes.yaxis, lowest, highest, log=panel is not None and panel.log and lowest > 0)


def _legend(figure: Figure, drawn: Sequence, labels: Sequence[str]) -> None:
    if len(labels) > 1:
        fontsize = 8 * min(1.0, LEGEND_WIDTH / max(map(len, labels)))
        figure.legend(drawn, labels, loc="outside lower left", fontsize=fontsize, handlelength=1.6)


def _write(figure: Figure, path: Path) -> None:
    out = io.BytesIO()  # matplotlib cannot open a file in a bucket
    figure.savefig(out, format="png")
    path.write_bytes(out.getvalue())
