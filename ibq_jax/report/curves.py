"""Plots of runs as SVG: text stays text, and the colours suit light and dark pages."""

import io
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from ibq_jax.report.history import History, Series

INK = "#7a828c"  # the page replaces it by its text colour
COLOURS = ("#3b82f6", "#f59e0b", "#10b981", "#ef4444", "#a855f7", "#14b8a6", "#ec4899", "#84cc16")
DASHES = ("-", "--", ":")
SIZE = (4.2, 2.5)  # inches; the page scales it
LEGEND_ROW = 0.18  # height in inches
LEGEND_COLUMN = 24  # labels up to this many characters fit in two columns
MAX_LABEL = 52  # characters of a label; longer ones lose their beginning
RANKS_DRAWN = 400  # about one per pixel
MAX_POINTS = 600  # values of a line; more are drawn as groups
FEW_POINTS = 15  # a line with fewer values has a marker at each
STYLE: Any = {
    "svg.fonttype": "none",  # text as text, in the page's font
    "text.parse_math": False,  # a run may be named a$b$
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": INK,
    "grid.alpha": 0.2,
    "legend.frameon": False,
    "savefig.transparent": True,
}


@dataclass(frozen=True)
class Panel:
    """One plot: its title, its scalars, whether its y axis is logarithmic, and whether it is about the codebook."""

    title: str
    names: tuple[str, ...]
    log: bool = False
    codebook: bool = False


@dataclass(frozen=True)
class Band:
    """A scalar of several runs, float64 [n] each: mean, least and greatest at `steps`."""

    steps: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


PANELS = {
    "tokenizer": (
        Panel("PSNR on validation images, dB", ("validation/psnr",)),
        Panel("SSIM on validation images", ("validation/ssim",)),
        Panel(
            "Fréchet distance on validation images", ("validation/rFID", "validation/FD-EfficientNetLite0"), log=True
        ),
        Panel("Reconstruction error", ("loss/l1", "validation/l1", "loss/lpips"), log=True),
        Panel("Quantizer loss", ("loss/quantizer",), log=True),
        Panel("Gradient norm", ("optimizer/gradient_norm", "discriminator/gradient_norm"), log=True),
        Panel("Discriminator hinge loss (1: no better than chance)", ("discriminator/hinge",)),
        Panel("Discriminator logits", ("discriminator/logits_real", "discriminator/logits_fake")),
        Panel("Learning rate", ("optimizer/learning_rate",)),
        Panel("Share of the codebook in use", ("codebook/usage", "validation/usage"), codebook=True),
        Panel("Codebook perplexity", ("codebook/perplexity", "validation/perplexity"), log=True, codebook=True),
        Panel("Mean probability of the most likely code", ("codebook/max_probability",), codebook=True),
    ),
    "autoregressive": (
        Panel("Loss, nats per code", ("loss/total", "validation/loss")),
        Panel("Perplexity", ("loss/perplexity", "validation/perplexity"), log=True),
        Panel("Gradient norm", ("optimizer/gradient_norm",), log=True),
        Panel("Learning rate", ("optimizer/learning_rate",)),
    ),
}
PANELS["joint"] = (
    Panel("Next-token loss, nats per code", ("loss/next_token", "validation/next_token")),
    Panel("Next-token loss / entropy of the codes", ("loss/next_token_relative", "validation/next_token_relative")),
    Panel("Squared error of decoded predictions", ("loss/prediction",), log=True),
    Panel("Alignment of the generator's hidden states, 1 - cosine", ("loss/hidden_alignment",)),
    Panel("Gradient norm of the generator", ("generator/gradient_norm",), log=True),
    Panel("Learning rate of the generator", ("generator/learning_rate",)),
    *PANELS["tokenizer"],
    Panel(
        "Gradient norms at the codebook",
        tuple(
            f"codebook/gradient_norm_{name}"
            for name in ("reconstruction", "next_token", "prediction", "hidden_alignment")
        ),
        log=True,
        codebook=True,
    ),
)


def plot(
    panel: Panel,
    runs: Mapping[str, History],
    levels: Mapping[str, float] | None = None,
    behind: Mapping[str, Band] | None = None,
) -> str:
    """Draws a panel over training steps.

    With one run, each scalar gets a colour; with several, each run does.

    Args:
        panel: what to draw.
        runs: histories by name.
        levels: horizontal lines by name.
        behind: bands by scalar, drawn behind the line of that scalar, in its colour.

    Returns:
        SVG; "" if no run has logged the panel's scalars.
    """
    several = len(runs) > 1
    lines = [
        (f"{run} {name}" if several else name, history[name], COLOURS[i % len(COLOURS)], DASHES[j if several else 0])
        for row, (run, history) in enumerate(runs.items())
        for j, name in enumerate(panel.names)
        for i in (row if several else j,)
        if name in history and history[name].values.any()  # a loss that is off is logged as 0
    ]
    if not lines:
        return ""
    with rc_context(STYLE | {"svg.hashsalt": panel.title}):
        labels = [label for label, *_ in lines]
        columns = 2 if max(map(len, labels)) <= LEGEND_COLUMN else 1
        rows = -(-len(lines) // columns) if len(lines) > 1 else 0
        figure, axes = titled_axes(panel.title, SIZE[1] + rows * LEGEND_ROW)
        drawn, bands = [], _draw_bands(axes, panel, lines, behind or {})
        for _, series, colour, dash in lines:
            marker = "o" if len(series.steps) < FEW_POINTS else ""
            style = {"color": colour, "linestyle": dash, "linewidth": 1.4, "marker": marker, "markersize": 2.5}
            steps, low, middle, high = _in_groups(series)
            drawn += axes.plot(steps, middle, **style)
            if len(steps) < len(series.steps):
                axes.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)
        for i, (name, level) in enumerate(sorted((levels or {}).items(), key=lambda item: item[1])):
            axes.axhline(level, color=INK, linewidth=1, linestyle="--")
            side = "bottom" if i else "top"  # below the lowest line, so that the labels of two lines stay apart
            axes.annotate(name, (1, level), xycoords=("axes fraction", "data"), ha="right", va=side)
        grouped = any(len(series.steps) > MAX_POINTS for _, series, *_ in lines)
        axes.set_xlabel("step; line: median of neighbouring values, shaded: their range" if grouped else "step")
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], integer=True))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        shown = [array for band in bands for array in (band.low, band.high)] + [
            series.values for _, series, *_ in lines
        ]
        lowest, highest = (f(f(values) for values in shown) for f in (min, max))
        scale(axes.yaxis, lowest, highest, log=panel.log and lowest > 0)
        if len(lines) > 1:
            short = [label if len(label) <= MAX_LABEL else f"…{label[-MAX_LABEL:]}" for label in labels]
            figure.legend(drawn, short, loc="outside lower left", ncols=columns, fontsize=8, handlelength=1.6)
        return _svg(figure, panel.title)


def _draw_bands(axes: Axes, panel: Panel, lines: list[tuple], behind: Mapping[str, Band]) -> list[Band]:
    """Draws the bands of the lines' scalars and returns them."""
    found = [(behind[name], colour) for label, _, colour, _ in lines for name in panel.names if label == name in behind]
    for band, colour in found:
        axes.fill_between(band.steps, band.low, band.high, color=colour, alpha=0.18, linewidth=0)
        axes.plot(band.steps, band.mean, color=colour, linestyle=":", linewidth=0.9)
    return [band for band, _ in found]


def plot_ranks(counts: np.ndarray) -> str:
    """Draws how often each code is used (counts float [K]), the most frequent first, as SVG."""
    title = "Count of each code, by rank"
    counts = np.sort(counts[counts > 0])[::-1]
    with rc_context(STYLE | {"svg.hashsalt": title}):
        figure, axes = titled_axes(title)
        ranks = np.unique(np.linspace(1, len(counts), RANKS_DRAWN).round().astype(int))
        axes.fill_between(ranks, counts[ranks - 1], color=COLOURS[0], alpha=0.2, linewidth=0)
        axes.plot(ranks, counts[ranks - 1], color=COLOURS[0], linewidth=1.4)
        axes.set_xlabel("rank of the code")
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10], integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(plain))
        scale(axes.yaxis, counts.min(initial=np.inf), counts.max(initial=0), log=True)
        return _svg(figure, title)


def plot_grid(values: np.ndarray, title: str) -> str:
    """Draws values [h, w], one per token position, as SVG."""
    with rc_context(STYLE | {"axes.grid": False, "svg.hashsalt": title}):
        figure, axes = titled_axes(title)
        figure.colorbar(axes.imshow(values, cmap="viridis"), ax=axes)
        axes.set_xlabel("column")
        axes.set_ylabel("row")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(5, integer=True))
        return _svg(figure, title)


def colour_errors(errors: np.ndarray) -> np.ndarray:
    """Returns errors in [0, 1] of any shape as colours uint8 [..., 3]; no error is black."""
    return np.asarray(colormaps["inferno"](errors)[..., :3] * 255).astype(np.uint8)


def _in_groups(series: Series) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns (steps, minimum, median, maximum) of groups of neighbouring values; short series are not grouped."""
    if len(series.steps) <= MAX_POINTS:
        return series.steps, series.values, series.values, series.values
    steps, groups = (np.array_split(array, MAX_POINTS // 2) for array in (series.steps, series.values))
    low, middle, high = (np.asarray([f(group) for group in groups]) for f in (np.min, np.median, np.max))
    return np.asarray([group[-1] for group in steps]), low, middle, high


def titled_axes(title: str, height: float = SIZE[1]) -> tuple[Figure, Axes]:
    """Returns an empty figure with a title; call it inside rc_context(STYLE)."""
    figure = Figure((SIZE[0], height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=10)
    return figure, axes


def scale(axis: Axis, lowest: float, highest: float, log: bool) -> None:
    """Sets the scale of an axis, labelled with plain numbers, not powers of ten.

    A logarithmic axis has round ticks inside a decade, ticks at 1, 2 and 5 over up to three, and at 1 over more.
    """
    if log:
        axis.axes.set_yscale("log")
        decades = np.log10(highest / lowest) if highest > lowest else 0
        few = MaxNLocator(5, steps=[1, 2, 5, 10])
        axis.set_major_locator(few if decades < 1 else LogLocator(subs=(1, 2, 5) if decades < 3 else (1,)))
        axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(plain))


def plain(value: float, _position: int) -> str:
    """Formats a number at an axis (a matplotlib tick formatter)."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:g}"


def _svg(figure: Figure, label: str) -> str:
    """Returns a figure as SVG: the same text for the same plot, and no id that another plot of the page has."""
    FigureCanvasSVG(figure)
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None, "Title": label})
    text = out.getvalue()
    text = re.sub(r' id="[\w.]+_\d+"', "", text[text.index("<svg") :])
    return text.replace(INK, "currentColor").replace("<svg ", '<svg role="img" ', 1)
