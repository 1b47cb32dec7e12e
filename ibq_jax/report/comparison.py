"""The page of several runs of one stage: where their configs and results differ, and their curves together."""

from collections.abc import Iterator, Mapping, Sequence

from ibq_jax.base.config import flatten
from ibq_jax.evaluate.records import format_metrics
from ibq_jax.report.curves import PANELS, plot
from ibq_jax.report.page import render
from ibq_jax.report.run import Run
from ibq_jax.report.single_run import KEY_FIGURES

PLURALS = {"tokenizer": "tokenizers", "autoregressive": "generators", "joint": "joint runs"}  # of each stage


def comparison_page(runs: Sequence[Run]) -> tuple[str, list[str]]:
    """Returns the HTML page of several runs, and sentences on what could not be shown, which are on the page too."""
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        names = [str(run.folder) for run in runs]
    named = dict(zip(names, runs, strict=True))
    missing = [f"{name}: {sentence}" for name, run in named.items() for sentence in run.missing]
    histories = {name: run.history for name, run in named.items()}
    html = render(
        title=", ".join(names),
        subtitle=f"{len(runs)} {PLURALS[runs[0].stage]} side by side",
        missing=missing,
        runs=names,
        findings=[
            finding | {"run": name}
            for name, run in named.items()
            for finding in run.findings(run.config.train.steps)
            if finding["severity"] != "fine"
        ],
        differences=_config_differences(runs),
        steps=[f"step {run.history.last_step:,}" for run in runs],
        comparison=_last_logged(runs),
        measured=list(_evaluations_side_by_side(runs)),
        plots=[svg for svg in (plot(panel, histories) for panel in PANELS[runs[0].stage]) if svg],
        configs=[(name, run.config.to_json_best_effort(indent=2)) for name, run in named.items()],
    )
    return html, missing


def _config_differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Returns (field, its value in each run) of the fields that differ."""
    flat = [flatten(run.config) for run in runs]
    fields = sorted(set().union(*flat))
    differing = [name for name in fields if len({repr(values.get(name)) for values in flat}) > 1]
    return [(name, [str(values.get(name, "")) for values in flat]) for name in differing]


def _last_logged(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Returns (scalar, its newest value in each run) of the validation scalars and key figures."""
    logged = sorted(set().union(*(run.history.series for run in runs)))
    return [
        (name, [f"{run.history[name].last:.4g}" if name in run.history else "" for run in runs])
        for name in logged
        if name.startswith("validation/") or name in KEY_FIGURES
    ]


def _evaluations_side_by_side(runs: Sequence[Run]) -> Iterator[dict]:
    """Yields one table per way of measuring (split, protocol, weights), with the latest evaluation of each run."""
    ways: dict[tuple, list[Mapping | None]] = {}
    for column, run in enumerate(runs):
        for found in sorted(run.evaluations, key=lambda evaluation: evaluation["step"]):
            way = found["split"], found["protocol"]["name"], found["weights"], found["protocol"]["description"]
            ways.setdefault(way, [None] * len(runs))[column] = found
    for (split, protocol, weights, description), cells in ways.items():
        words = [dict(format_metrics(found)) if found else {} for found in cells]
        labels = dict.fromkeys(label for column in words for label in column)
        yield {
            "title": f"{split}, {weights} weights",
            "protocol": protocol,
            "description": description,
            "of": [f"{found['images']:,} images, step {found['step']:,}" if found else "" for found in cells],
            "rows": [(label, [column.get(label, "") for column in words]) for label in labels],
            "marks": [found["marks"] if found else [] for found in cells],
        }
