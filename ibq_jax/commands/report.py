"""python -m ibq_jax report: one HTML page of a run, or of several side by side, to read anywhere."""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import jax
import numpy as np

from ibq_jax.autoregressive.run import find_tokenizer
from ibq_jax.autoregressive.run import restore_run as restore_generator
from ibq_jax.base.checkpoint import Restored
from ibq_jax.base.config import flatten
from ibq_jax.base.errors import UsageError
from ibq_jax.base.files import PARTIAL
from ibq_jax.base.run import SavedRun, total_steps
from ibq_jax.commands.arguments import Parser, output_file, underscored
from ibq_jax.commands.evaluations import class_samples, validation_evaluator
from ibq_jax.commands.records import FOLDER, words_of
from ibq_jax.evaluate.curves import PANELS, colour_errors, plot, plot_grid, plot_ranks
from ibq_jax.evaluate.doctor import diagnose
from ibq_jax.evaluate.history import History, read_history
from ibq_jax.evaluate.page import png_uri, render, shown
from ibq_jax.tokenizer.run import restore_run as restore_tokenizer
from ibq_jax.tokenizer.train import Trainer, to_uint8

PICTURES = 8  # originals beside reconstructions
CODES_SHOWN = 16  # of the most used, and of the least
CODES_AROUND = 5  # codes a side of the patch that a code is decoded in, so that the middle has no border near
ERROR_FACTOR = 4
WIDE = 96  # pixels of a small picture's side once it is enlarged
KEY = {  # scalars at the head of a page: what they are called there, and how they are written
    "validation/psnr": ("PSNR, validation", "{:.2f} dB"),
    "validation/ssim": ("SSIM, validation", "{:.3f}"),
    "validation/loss": ("loss, validation", "{:.3f} nats"),
    "validation/perplexity": ("perplexity, validation", "{:,.1f}"),
    "codebook/usage": ("of the codebook in use", "{:.1%}"),
}


@dataclass(frozen=True)
class Run:
    """What a run's folder tells without its weights."""

    name: str
    folder: Path  # as it was given
    saved: SavedRun
    history: History
    evaluations: tuple[dict, ...]

    @property
    def stage(self) -> str:
        return self.saved.config.stage


def main(argv: list[str]) -> None:
    """Runs the command; `argv` is what follows the word "report".

    Raises:
        UsageError: wrong flags, a folder that is no run, runs of both stages, or a page that is there already.
    """
    flags = _parser().parse_args(underscored(argv))
    folders = [Path(folder) for folder in flags.workdir.split(",") if folder]
    if not folders:
        raise UsageError("--workdir names no run")
    runs = [_read(folder) for folder in folders]
    if len({run.stage for run in runs}) > 1:
        raise UsageError(f"--workdir={flags.workdir}: tokenizers and generators have no numbers in common")
    out = flags.out or runs[0].saved.workdir / "report.html"
    if out.exists() and not flags.overwrite:
        raise UsageError(f"--out={out} exists already; give --overwrite to replace it")
    html = _one(runs[0], say=print) if len(runs) == 1 else _several(runs)
    partial = out.with_name(out.name + PARTIAL)
    partial.write_text(html)
    partial.replace(out)
    print(f"wrote {out}: open it in a browser")


def _read(folder: Path) -> Run:
    saved = SavedRun.find(folder)
    files = sorted((saved.workdir / FOLDER).glob("*.json"))
    history = read_history(saved.workdir / "metrics.jsonl")
    return Run(saved.workdir.name, folder, saved, history, tuple(_evaluation(file) for file in files))


def _evaluation(path: Path) -> dict:
    try:
        found = json.loads(path.read_text())
        _card(found)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UsageError(f"{path}: not an evaluation that `evaluate` wrote; remove it") from error
    return found


def _one(run: Run, say: Callable[[str], None]) -> str:
    """The page of a run. What cannot be made (no checkpoint, no data) is said there instead."""
    missing = [] if run.history.series else ["metrics.jsonl is not there or empty: there are no curves."]
    sections, step, ends_at, order_0 = {}, None, 0, _order_0(run)
    try:
        restore = _tokenizer_sections if run.stage == "tokenizer" else _generator_sections
        restored, sections, absent = restore(run)
        missing += absent
        step, ends_at = restored.step, total_steps(run.saved.config, restored.metadata.get("steps_per_epoch", 0))
    except UsageError as error:
        missing.append(f"no pictures: {error}")
    for sentence in missing:
        say(sentence)
    levels = {} if order_0 is None else {"codes alone": order_0, "log K": math.log(run.saved.config.model.vocabulary)}
    plots = [
        plot(panel, {run.name: run.history}, levels if "loss/total" in panel.names else None)
        for panel in PANELS[run.stage]
    ]
    stage = "tokenizer" if run.stage == "tokenizer" else "generator"
    return render(
        title=run.name,
        subtitle=f"{stage}, {run.folder}" + ("" if step is None else f", step {step:,}"),
        key=[
            (label, form.format(run.history[name].last)) for name, (label, form) in KEY.items() if name in run.history
        ],
        missing=missing,
        findings=_findings(run, ends_at, order_0),
        numbers=_numbers(run),
        plots=[svg for svg in (*plots, *_grids(run)) if svg],
        configs=[(run.name, run.saved.config.to_json_best_effort(indent=2))],
        **sections,
    )


def _several(runs: list[Run]) -> str:
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        names = [str(run.folder) for run in runs]
    fields = [flatten(run.saved.config) for run in runs]
    every = sorted(set().union(*fields))
    differing = [name for name in every if len({repr(field.get(name)) for field in fields}) > 1]
    logged = sorted(set().union(*(run.history.series for run in runs)))
    last = [name for name in logged if name.startswith("validation/") or name in KEY]
    comparison = [
        (name, [f"{run.history[name].last:.4g}" if name in run.history else "" for run in runs]) for name in last
    ]
    named = list(zip(names, runs, strict=True))
    histories = {name: run.history for name, run in named}
    return render(
        title=", ".join(names),
        subtitle=f"{len(runs)} runs of one stage",
        runs=names,
        findings=[
            finding | {"run": name}
            for name, run in named
            for finding in _findings(run, 0, _order_0(run))
            if finding["severity"] != "fine"
        ],
        differences=[(name, [str(field.get(name, "")) for field in fields]) for name in differing],
        comparison=comparison,
        numbers=[card | {"title": f"{name}: {card['title']}"} for name, run in named for card in _numbers(run)],
        plots=[svg for svg in (plot(panel, histories) for panel in PANELS[runs[0].stage]) if svg],
        configs=[(name, run.saved.config.to_json_best_effort(indent=2)) for name, run in named],
    )


def _findings(run: Run, ends_at: int, order_0: float | None) -> list[dict]:
    return [asdict(finding) | {"run": ""} for finding in diagnose(run.history, run.saved.config, ends_at, order_0)]


def _order_0(run: Run) -> float | None:
    """Of a generator's codes, as the newest evaluation has it."""
    found = [evaluation["metrics"]["order_0"] for evaluation in run.evaluations if "order_0" in evaluation["metrics"]]
    return found[-1] if found else None


def _numbers(run: Run) -> list[dict]:
    return [_card(evaluation) for evaluation in run.evaluations]


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


def _grids(run: Run) -> Iterator[str]:
    for name, values in run.history.grids.items():
        yield plot_grid(values, name.removeprefix("validation/").replace("_", " "))


def _tokenizer_sections(run: Run) -> tuple[Restored, dict, list[str]]:
    trainer, restored = restore_tokenizer(_place(run))
    try:
        evaluator = validation_evaluator(trainer, trainer.config.evaluate.examples)
    except UsageError as error:
        return restored, {}, [f"no reconstructions and no use of codes: {error}"]
    params, side = restored.state.ema, trainer.config.data.image_size
    pairs = evaluator.picture(params, PICTURES)
    original, reconstruction = pairs[:side].astype(float), pairs[side:].astype(float)
    error = np.abs(original - reconstruction).mean(axis=-1) / 255 * ERROR_FACTOR
    picture = np.concatenate([pairs, colour_errors(np.minimum(error, 1.0))])
    caption = (
        "Validation images, their reconstructions, and the mean absolute error of the three colours: black is none, "
        f"the brightest is {255 // ERROR_FACTOR} grey levels and more."
    )
    counts = evaluator.histogram(params)
    return (
        restored,
        {
            "pictures": [shown(picture, caption, "Reconstructions", max(1, WIDE // side))],
            "codebook": _codebook(trainer, params, counts),
        },
        [],
    )


def _codebook(trainer: Trainer, params: Mapping, counts: np.ndarray) -> dict:
    """Which codes are used how often on validation images, and what the first and the last of them look like."""
    used = np.flatnonzero(counts)
    ranked = used[np.argsort(-counts[used], kind="stable")]
    groups = {"The most used codes": ranked[:CODES_SHOWN], "The least used ones that are used": ranked[-CODES_SHOWN:]}
    patches = _patches(trainer, params, np.concatenate(list(groups.values())))
    shown_groups = []
    for title, codes in groups.items():
        own, patches = patches[: len(codes)], patches[len(codes) :]
        shown_groups.append(
            {
                "title": title,
                "codes": [
                    {"number": int(code), "count": f"{counts[code] / counts.sum():.2%}", "uri": png_uri(patch)}
                    for code, patch in zip(codes, own, strict=True)
                ],
            }
        )
    words = (
        f"{len(used):,} of {len(counts):,} codes are chosen by {int(counts.sum()):,} tokens of validation images. A "
        f"code is shown as the middle of what {CODES_AROUND}x{CODES_AROUND} of it decode to, with its share of them."
    )
    return {"words": words, "ranks": plot_ranks(counts), "groups": shown_groups}


def _patches(trainer: Trainer, params: Mapping, codes: np.ndarray) -> np.ndarray:
    """uint8 [N, p, p, 3]: the middle of what a square of each code decodes to."""
    model = trainer.model.clone(mesh=None)
    grid = np.broadcast_to(codes[:, None, None], (len(codes), CODES_AROUND, CODES_AROUND)).astype(np.int32)
    decode = jax.jit(lambda params, codes: to_uint8(model.apply({"params": params}, codes, method="decode")))
    pictures = np.asarray(decode(jax.device_get(params), grid))
    patch = pictures.shape[1] // CODES_AROUND
    middle = slice(patch * (CODES_AROUND // 2), patch * (CODES_AROUND // 2 + 1))
    return pictures[:, middle, middle]


def _generator_sections(run: Run) -> tuple[Restored, dict, list[str]]:
    trainer, restored, manifest = restore_generator(_place(run))
    try:
        tokenizer = find_tokenizer(trainer.config.tokenizer, manifest, needed=True)
    except UsageError as error:
        return restored, {}, [f"no samples: {error}"]
    sheet = class_samples(trainer, restored.state.averaged, manifest, tokenizer)
    sample = trainer.config.sample
    caption = (
        f"Guidance {sample.cfg_scale:g}, temperature {sample.temperature:g}, seed {trainer.config.seed}, not chosen."
    )
    return restored, {"pictures": [shown(sheet, caption, "Samples by class")]}, []


def _place(run: Run) -> Path:
    step = run.saved.step
    return run.saved.workdir if step is None else run.saved.workdir / "checkpoints" / str(step)


def _parser() -> Parser:
    parser = Parser(prog="python -m ibq_jax report", description=__doc__.partition(": ")[2])
    parser.add_argument("--workdir", required=True, metavar="RUN[,RUN...]", help="a run, or several to compare")
    parser.add_argument("--out", type=output_file, metavar="HTML", help="default: report.html in the (first) run")
    parser.add_argument("--overwrite", action="store_true", help="replace a page that is there")
    return parser
