"""Plots of a run as SVG: text stays text, colours suit a light page and a dark one."""

import io
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from ibq_jax.evaluate.history import History

INK, COLOURS = "#7a828c", ("#3b82f6", "#f59e0b", "#10b981", "#ef4444", "#a855f7", "#14b8a6", "#ec4899", "#84cc16")
SIZE = (4.6, 2.7)  # inches; the page scales it
STYLE = {
    "svg.fonttype": "none",  # text as text, in the page's font
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
    """One plot: what it shows, the scalars drawn in it, and whether its axis is logarithmic."""

    title: str
    names: tuple[str, ...]
    log: bool = False


PANELS = {
    "tokenizer": (
        Panel("PSNR on validation images, dB", ("validation/psnr",)),
        Panel("SSIM on validation images", ("validation/ssim",)),
        Panel("Distance on validation images", ("validation/rFID", "validation/FD-EfficientNetLite0"), log=True),
        Panel("Share of the codebook in use", ("codebook/usage", "validation/usage")),
        Panel("Perplexity of the codes", ("codebook/perplexity", "validation/perplexity"), log=True),
        Panel("Loss of the pictures", ("loss/l1", "loss/lpips", "loss/nll")),
        Panel("Loss of the quantizer", ("loss/quantizer",), log=True),
        Panel("Likeliest code's probability", ("codebook/max_probability",)),
        Panel("Discriminator's hinge loss (1: knows nothing)", ("adversary/hinge",)),
        Panel("Discriminator's answers", ("adversary/logits_real", "adversary/logits_fake")),
        Panel("Norm of the gradients", ("gradient_norm", "adversary/gradient_norm"), log=True),
    ),
    "autoregressive": (
        Panel("Loss, nats a code", ("loss/total", "validation/loss")),
        Panel("Perplexity", ("loss/perplexity", "validation/perplexity"), log=True),
        Panel("Norm of the gradients", ("optimizer/gradient_norm",), log=True),
        Panel("Learning rate", ("optimizer/learning_rate",)),
    ),
}


def plot(panel: Panel, runs: Mapping[str, History], levels: Mapping[str, float] | None = None) -> str:
    """A panel over training steps, of one run or several by name, as SVG; "" where none has its scalars. `levels`:
    horizontal lines by name."""
    lines = [
        (f"{run} {name}".strip() if len(runs) > 1 else name, history[name])
        for run, history in runs.items()
        for name in panel.names
        if name in history and history[name].values.any()  # a loss that is off is 0 all the time
    ]
    if not lines:
        return ""
    with rc_context(STYLE):
        figure = Figure(SIZE, layout="constrained")
        axes = figure.add_subplot()
        for i, (label, series) in enumerate(lines):
            marker = "o" if len(series.steps) < 40 else ""
            colour = COLOURS[i % len(COLOURS)]
            style = {"color": colour, "marker": marker, "markersize": 2.5, "linewidth": 1.4}
            axes.plot(series.steps, series.values, label=label, **style)
        for i, (name, level) in enumerate(sorted((levels or {}).items(), key=lambda item: item[1])):
            axes.axhline(level, color=INK, linewidth=1, linestyle="--")
            side = "bottom" if i else "top"  # the lowest one's name goes under its line, so that two stay apart
            axes.annotate(name, (1, level), xycoords=("axes fraction", "data"), ha="right", va=side)
        axes.set_title(panel.title, loc="left", fontsize=9.5)
        axes.set_xlabel("step")
        positive = all((series.values > 0).all() for _, series in lines)
        axes.set_yscale("log" if panel.log and positive else "linear")
        if len(lines) > 1:
            axes.legend(fontsize=8)
        return _svg(figure, panel.title)


def plot_ranks(counts: np.ndarray) -> str:
    """Codes by rank: how often each is chosen, counts float [K], the most frequent first; as SVG."""
    counts = np.sort(counts[counts > 0])[::-1]
    with rc_context(STYLE):
        figure = Figure(SIZE, layout="constrained")
        axes = figure.add_subplot()
        axes.plot(np.arange(1, len(counts) + 1), counts / counts.sum(), color=COLOURS[0], linewidth=1.4)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("rank of the code")
        axes.set_title("Share of all tokens, by rank", loc="left", fontsize=9.5)
        return _svg(figure, "share of tokens by rank of the code")


def plot_grid(values: np.ndarray, title: str) -> str:
    """A number [h, w] a place of the picture, as SVG."""
    with rc_context(STYLE | {"axes.grid": False}):
        figure = Figure(SIZE, layout="constrained")
        axes = figure.add_subplot()
        figure.colorbar(axes.imshow(values, cmap="viridis"), ax=axes)
        axes.set_title(title, loc="left", fontsize=9.5)
        return _svg(figure, title)


def colour_errors(errors: np.ndarray) -> np.ndarray:
    """Errors in [0, 1], any shape -> uint8 [..., 3], dark where there is none."""
    return np.uint8(colormaps["inferno"](errors)[..., :3] * 255)


def _svg(figure: Figure, label: str) -> str:
    FigureCanvasSVG(figure)
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None, "Title": label})
    text = out.getvalue()
    return text[text.index("<svg") :]
