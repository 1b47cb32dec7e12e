"""python -m ibq_jax report: one HTML page of a run, or of several side by side, to read anywhere."""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from ibq_jax.autoregressive.restore import CODES
from ibq_jax.base.config import flatten
from ibq_jax.base.errors import UsageError
from ibq_jax.base.files import PARTIAL
from ibq_jax.base.saved_run import SavedRun, total_steps
from ibq_jax.base.state import drop_schedule
from ibq_jax.commands.arguments import Parser, output_file
from ibq_jax.data.token_cache import read_fields
from ibq_jax.evaluate.records import FOLDER, words_of
from ibq_jax.report.curves import PANELS, plot, plot_grid
from ibq_jax.report.doctor import diagnose
from ibq_jax.report.history import History, Series, read_history, stopped_by_itself
from ibq_jax.report.images import pictures_of
from ibq_jax.report.page import render
from ibq_jax.tokenizer.model import latent_dim

NO_CURVES = "metrics.jsonl is not there or empty: there are no curves."
KEY = {  # scalars at the head of a page: what they are called there, and how they are written
    "validation/psnr": ("PSNR, validation", "{:.2f} dB"),
    "validation/ssim": ("SSIM, validation", "{:.3f}"),
    "validation/loss": ("loss, validation", "{:.3f} nats"),
    "validation/perplexity": ("perplexity, validation", "{:,.1f}"),
    "codebook/usage": ("of the codebook in use", "{:.1%}"),
}


@dataclass(frozen=True)
class Run:
    """What a run's folder tells without its weights. `stopped`: why training stopped itself, if that was the last it
    did; `order_0`: nats, the entropy of a generator's validation codes alone, None where that is not known."""

    name: str
    folder: Path  # as it was given
    saved: SavedRun
    history: History
    evaluations: tuple[dict, ...]
    stopped: str
    order_0: float | None

    @property
    def config(self) -> ConfigDict:
        return self.saved.config

    @property
    def stage(self) -> str:
        return self.config.stage

    def findings(self, ends_at: int) -> list[dict]:
        found = diagnose(self.history, self.config, ends_at, self.order_0, self.stopped)
        return [asdict(finding) for finding in found]


def main(argv: list[str]) -> None:
    """Runs the command; `argv` is what follows the word "report".

    Raises:
        UsageError: wrong flags, a folder that is no run, runs of both stages, or a page that is there already.
    """
    flags = parser().parse_args(argv)
    folders = [Path(folder) for folder in flags.workdir.split(",") if folder]
    if not folders:
        raise UsageError("--workdir names no run")
    runs = [_read(folder) for folder in folders]
    if len({run.stage for run in runs}) > 1:
        raise UsageError(f"--workdir={flags.workdir}: tokenizers and generators have no numbers in common")
    if len({run.saved.workdir for run in runs}) < len(runs):
        raise UsageError(f"--workdir={flags.workdir}: a run is named twice; a run beside itself shows nothing")
    out = flags.out or runs[0].saved.workdir / "report.html"
    if out.exists() and not flags.overwrite:
        raise UsageError(f"--out={out} exists already; give --overwrite to replace it")
    html = _one(runs[0], say=print) if len(runs) == 1 else _several(runs, say=print)
    partial = out.with_name(out.name + PARTIAL)
    partial.write_text(html, encoding="utf-8", errors="replace")
    partial.replace(out)
    print(f"wrote {out}: open it in a browser")


def _read(folder: Path) -> Run:
    saved = SavedRun.find(folder)
    stage = flatten(saved.config).get("stage")
    if stage not in PANELS:
        raise UsageError(f"{saved.workdir / 'config.json'}: stage is {stage!r}, not one of {', '.join(PANELS)}")
    history = read_history(saved.workdir / "metrics.jsonl")
    return Run(
        name=saved.workdir.name,
        folder=folder,
        saved=saved,
        history=history,
        evaluations=tuple(_evaluation(file) for file in sorted((saved.workdir / FOLDER).glob("*.json"))),
        stopped=stopped_by_itself(saved.workdir, history.last_step),
        order_0=_order_0(saved.workdir / CODES),
    )


def _evaluation(path: Path) -> dict:
    try:
        found = json.loads(path.read_text())
        _card(found)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UsageError(f"{path}: not an evaluation that `evaluate` wrote; remove it") from error
    return found


def _order_0(manifest: Path) -> float | None:
    """Of an imported generator's codes it is not known."""
    if not manifest.is_file():
        return None
    found = flatten(read_fields(manifest)).get("splits.validation.entropy")
    return None if found is None else float(found)


def _one(run: Run, say: Callable[[str], None]) -> str:
    """The page of a run. What cannot be made (no checkpoint, no data) is said there instead."""
    missing = [] if run.history.series else [NO_CURVES]
    sections, step, ends_at = {}, None, run.config.train.steps
    where = run.saved.workdir if run.saved.step is None else run.saved.workdir / "checkpoints" / str(run.saved.step)
    try:
        restored, sections, absent = pictures_of(where, run.stage)
        missing += absent
        step, steps_per_epoch = restored.step, restored.metadata.get("steps_per_epoch", 0)
        ends_at = total_steps(run.config, steps_per_epoch)
        run = replace(run, history=_with_rate(run.history, run.config, steps_per_epoch))
    except UsageError as error:
        missing.append(f"no pictures: {error}")
    for sentence in missing:
        say(sentence)
    codes = sections.pop("codes", {"words": "", "ranks": "", "groups": []})
    plots = {about: list(_plots(run, about)) for about in (False, True)}
    return render(
        title=run.name,
        subtitle=", ".join([_what(run.config), str(run.folder), *([] if step is None else [f"step {step:,}"])]),
        key=[
            (label, form.format(run.history[name].last)) for name, (label, form) in KEY.items() if name in run.history
        ],
        missing=missing,
        findings=[finding | {"run": ""} for finding in run.findings(ends_at)],
        numbers=[_card(evaluation) for evaluation in run.evaluations],
        plots=[svg for svg in plots[False] if svg],
        codebook=codes | {"plots": [svg for svg in (*plots[True], codes["ranks"]) if svg]},
        configs=[(run.name, run.config.to_json_best_effort(indent=2))],
        **sections,
    )


def _with_rate(history: History, config: ConfigDict, steps_per_epoch: int) -> History:
    """A tokenizer logs no learning rate; where its config makes it change, it follows from there."""
    if config.stage != "tokenizer" or "optimizer/gradient_norm" not in history:
        return history
    optimizer = config.optimizer
    unknown = optimizer.drop_epochs and not steps_per_epoch  # of imported weights
    if unknown or not (optimizer.drop_epochs or optimizer.warmup_steps):
        return history
    drops = [epoch * steps_per_epoch for epoch in optimizer.drop_epochs]
    rate = drop_schedule(optimizer.learning_rate, optimizer.warmup_steps, drops, optimizer.drop_factor)
    steps = history["optimizer/gradient_norm"].steps
    rates = Series(steps, np.asarray([float(rate(step - 1)) for step in steps]))
    return replace(history, series=history.series | {"optimizer/learning_rate": rates})


def _plots(run: Run, about_codebook: bool) -> Iterator[str]:
    levels = {}
    if run.order_0 is not None:
        levels = {"codes alone": run.order_0, "log K": math.log(run.config.model.vocab_size)}
    for panel in PANELS[run.stage]:
        if panel.codebook == about_codebook:
            yield plot(panel, {run.name: run.history}, levels if "loss/total" in panel.names else None)
    if not about_codebook:
        for name, values in run.history.grids.items():
            title = name.removeprefix("validation/").replace("_", " ")
            yield plot_grid(values, title[:1].upper() + title[1:])


def _what(config: ConfigDict) -> str:
    if config.stage == "tokenizer":
        data, quantizer = config.data, config.quantizer.name
        codes = f"{config.codebook.size:,} codes of {latent_dim(config)} dimensions"
        named = "" if quantizer == "ibq" else f" ({quantizer})"
        return f"tokenizer of {codes}{named}, {data.name} at {data.image_size} px"
    model = config.model
    rows, columns = model.grid
    size = f"{model.num_layers} layers of width {model.embed_dim}"
    return f"generator of {rows}x{columns} of {model.vocab_size:,} codes, {size}"


def _several(runs: list[Run], say: Callable[[str], None]) -> str:
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        names = [str(run.folder) for run in runs]
    fields = [flatten(run.config) for run in runs]
    every = sorted(set().union(*fields))
    differing = [name for name in every if len({repr(field.get(name)) for field in fields}) > 1]
    logged = sorted(set().union(*(run.history.series for run in runs)))
    last = [name for name in logged if name.startswith("validation/") or name in KEY]
    comparison = [
        (name, [f"{run.history[name].last:.4g}" if name in run.history else "" for run in runs]) for name in last
    ]
    named = list(zip(names, runs, strict=True))
    missing = [f"{name}: {NO_CURVES}" for name, run in named if not run.history.series]
    for sentence in missing:
        say(sentence)
    histories = {name: run.history for name, run in named}
    return render(
        title=", ".join(names),
        subtitle=f"{len(runs)} {'tokenizers' if runs[0].stage == 'tokenizer' else 'generators'} side by side",
        missing=missing,
        runs=names,
        findings=[
            finding | {"run": name}
            for name, run in named
            for finding in run.findings(run.config.train.steps)
            if finding["severity"] != "fine"
        ],
        differences=[(name, [str(field.get(name, "")) for field in fields]) for name in differing],
        steps=[f"step {run.history.last_step:,}" for run in runs],
        comparison=comparison,
        measured=list(_side_by_side(runs)),
        plots=[svg for svg in (plot(panel, histories) for panel in PANELS[runs[0].stage]) if svg],
        configs=[(name, run.config.to_json_best_effort(indent=2)) for name, run in named],
    )


def _card(evaluation: Mapping) -> dict:
    """An evaluation as the page shows it."""
    return {
        "title": evaluation["split"],
        "of": f"{evaluation['images']:,} images, step {evaluation['step']:,}, {evaluation['weights']} weights",
        "metrics": list(words_of(evaluation)),
        "protocol": evaluation["protocol"]["name"],
        "description": evaluation["protocol"]["description"],
        "marks": evaluation["marks"],
    }


def _side_by_side(runs: Sequence[Run]) -> Iterator[dict]:
    """A table for each way of measuring (split, protocol, weights): of every run the evaluation of its latest step."""
    ways: dict[tuple, list[Mapping | None]] = {}
    for column, run in enumerate(runs):
        for found in sorted(run.evaluations, key=lambda evaluation: evaluation["step"]):
            way = found["split"], found["protocol"]["name"], found["weights"], found["protocol"]["description"]
            ways.setdefault(way, [None] * len(runs))[column] = found
    for (split, protocol, weights, description), cells in ways.items():
        words = [dict(words_of(found)) if found else {} for found in cells]
        labels = dict.fromkeys(label for column in words for label in column)
        yield {
            "title": f"{split}, {weights} weights",
            "protocol": protocol,
            "description": description,
            "of": [f"{found['images']:,} images, step {found['step']:,}" if found else "" for found in cells],
            "rows": [(label, [column.get(label, "") for column in words]) for label in labels],
            "marks": [found["marks"] if found else [] for found in cells],
        }


def parser() -> Parser:
    parser = Parser("report", __doc__.partition(": ")[2])
    parser.add_argument("--workdir", required=True, metavar="RUN[,RUN...]", help="a run, or several to compare")
    parser.add_argument("--out", type=output_file, metavar="HTML", help="default: report.html in the (first) run")
    parser.add_argument("--overwrite", action="store_true", help="replace a page that is there")
    return parser
