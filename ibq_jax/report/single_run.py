"""The page of one run: key figures, diagnosis, evaluations, images, curves and config."""

import math
from collections.abc import Iterator, Mapping

from ml_collections import ConfigDict

from ibq_jax.base.config import flatten
from ibq_jax.base.errors import UsageError
from ibq_jax.base.saved_run import total_steps
from ibq_jax.joint.parts import generator_part, tokenizer_part
from ibq_jax.report.baseline import Baseline
from ibq_jax.report.curves import PANELS, Band, plot, plot_grid
from ibq_jax.report.images import images_of
from ibq_jax.report.page import render
from ibq_jax.report.published import published_for
from ibq_jax.report.run import Run, evaluation_card
from ibq_jax.tokenizer.model import latent_dim

KEY_FIGURES = {  # scalars at the top of the page: their labels there, and their formats
    "validation/psnr": ("validation PSNR", "{:.2f} dB"),
    "validation/ssim": ("validation SSIM", "{:.3f}"),
    "validation/loss": ("validation loss", "{:.3f} nats"),
    "validation/perplexity": ("validation perplexity", "{:,.1f}"),
    "validation/next_token": ("validation next-token loss", "{:.3f} nats"),
    "codebook/usage": ("codebook usage", "{:.1%}"),
}


def single_run_page(run: Run, baseline: Baseline | None = None) -> tuple[str, list[str]]:
    """Returns the HTML page of a run, and sentences on what could not be shown (no checkpoint, no data).

    The page contains these sentences too. The curves of `baseline` are drawn behind those of the run.
    """
    missing, sections, step, steps = run.missing, {}, None, run.config.train.steps
    workdir, chosen = run.saved.workdir, run.saved.step
    try:
        restored, sections, absent = images_of(
            workdir if chosen is None else workdir / "checkpoints" / str(chosen), run.stage
        )
        missing += absent
        step, steps = restored.step, total_steps(run.config, restored.metadata.get("steps_per_epoch", 0))
    except UsageError as error:
        missing.append(f"no images: {error}")
    codes = sections.pop("codes", {"words": "", "ranks": "", "groups": []})
    behind = baseline.bands if baseline else {}
    plots = {codebook: list(_plots(run, codebook, behind)) for codebook in (False, True)}
    html = render(
        title=run.name,
        subtitle=", ".join([_describe(run.config), str(run.folder), *([] if step is None else [f"step {step:,}"])]),
        key=[
            (label, form.format(run.history[name].last))
            for name, (label, form) in KEY_FIGURES.items()
            if name in run.history
        ],
        published=[found.words() for found in published_for(flatten(run.config))],
        missing=missing,
        findings=[finding | {"run": ""} for finding in run.findings(steps)],
        numbers=[evaluation_card(evaluation) for evaluation in run.evaluations],
        baseline=baseline.words() if baseline else "",
        plots=[svg for svg in plots[False] if svg],
        codebook=codes | {"plots": [svg for svg in (*plots[True], codes["ranks"]) if svg]},
        configs=[(run.name, run.config.to_json_best_effort(indent=2))],
        **sections,
    )
    return html, missing


def _plots(run: Run, codebook: bool, behind: Mapping[str, Band]) -> Iterator[str]:
    """Yields the curves of the codebook, or all others, as SVG; "" for a panel without data."""
    levels = {}
    for found in published_for(flatten(run.config)):
        levels |= found.levels
    if run.unigram_entropy is not None:
        levels["loss/total"] = {"unigram entropy": run.unigram_entropy, "log K": math.log(run.config.model.vocab_size)}
    for panel in PANELS[run.stage]:
        if panel.codebook == codebook:
            yield plot(panel, {run.name: run.history}, levels.get(panel.names[0]), behind)
    if not codebook:
        for name, values in run.history.grids.items():
            title = name.removeprefix("validation/").replace("_", " ")
            yield plot_grid(values, title[:1].upper() + title[1:])


def _describe(config: ConfigDict) -> str:
    """Returns a line on what was trained."""
    if config.stage == "joint":
        return f"{_describe(tokenizer_part(config))}; {_describe(generator_part(config))}"
    if config.stage == "tokenizer":
        data, quantizer = config.data, config.quantizer.name
        codes = f"{config.codebook.size:,} codes of {latent_dim(config)} dimensions"
        named = "" if quantizer == "ibq" else f" ({quantizer})"
        return f"tokenizer of {codes}{named}, {data.name} at {data.image_size} px"
    model = config.model
    rows, columns = model.grid
    size = f"{model.num_layers} layers of width {model.embed_dim}"
    return f"generator of {rows}x{columns} of {model.vocab_size:,} codes, {size}"
