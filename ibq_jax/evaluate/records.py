"""What an evaluation found, with all that it takes to compare it: printed, and kept in the run's folder.

RUN/evaluations/STEP-WEIGHTS-WHAT.json is one evaluation: {"stage", "run", "step", "weights", "split", "images",
"protocol": {"name", "description", "images"}, "marks": what to mind, such as why these are not comparable, "metrics"}.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import jax

from ibq_jax.evaluate.protocols import Protocol

FOLDER = "evaluations"

# What a metric is called in print, and how its value is written.
SHOWN = {
    "psnr": ("PSNR", "{:.2f} dB"),
    "ssim": ("SSIM", "{:.4f}"),
    "l1": ("L1", "{:.4f}"),
    "lpips_vgg16": ("LPIPS (VGG)", "{:.4f}"),
    "lpips_alexnet": ("LPIPS (AlexNet)", "{:.4f}"),
    "loss": ("loss", "{:.4f} nats a code"),
    "usage": ("usage", "{:.1%} of the codebook"),
    "perplexity": ("perplexity", "{:.1f}"),
    "entropy": ("entropy", "{:.3f} nats"),
    "order_0": ("order 0, the codes alone", "{:.4f} nats"),
    "uniform": ("uniform, log of the number of codes", "{:.4f} nats"),
    "inception_score": ("Inception Score", "{:.2f}"),
    "inception_score_deviation": ("  between its groups", "{:.2f}"),
}
DISTANCE = "{:.4g}"


def record(
    *,
    stage: str,
    run: Path | None,
    step: int | None,
    weights: str,
    split: str,
    protocol: Protocol | Mapping,
    marks: Sequence[str],
    metrics: Mapping[str, float],
    **more,
) -> dict:
    """An evaluation as it is kept; `metrics` has "images" among its numbers. `more` goes in as it is."""
    if isinstance(protocol, Protocol):
        protocol = {"name": protocol.name, "description": protocol.describe(), "images": protocol.images}
    metrics = dict(metrics)
    images = int(metrics.pop("images"))
    return {
        "stage": stage,
        "run": str(run or ""),
        "step": step,
        "weights": weights,
        "split": split,
        "images": images,
        "protocol": dict(protocol),
        "marks": list(marks),
        "metrics": metrics,
        **more,
    }


def show(found: Mapping) -> None:
    """Prints an evaluation."""
    step = "" if found["step"] is None else f", step {found['step']}, {found['weights']} weights"
    print(f"{found['split']}: {found['images']:,} images{step}")
    print(f"protocol {found['protocol']['name']}: {found['protocol']['description']}")
    words = list(words_of(found))
    width = max(len(label) for label, _ in words)
    for label, value in words:
        print(f"  {label:<{width}}  {value}")
    for mark in found["marks"]:
        print(f"  {mark}")


def words_of(found: Mapping) -> Iterator[tuple[str, str]]:
    """Yields (what a metric is called, its value) of an evaluation."""
    order = list(SHOWN)
    for name in sorted(found["metrics"], key=lambda name: order.index(name) if name in SHOWN else len(order)):
        value = found["metrics"][name]
        label, form = SHOWN.get(name, (name, DISTANCE))
        yield label, form.format(value) if math.isfinite(value) else str(value)


def save(found: Mapping, run: Path | None, what: str, file: Path | None) -> None:
    """Writes an evaluation into its run's folder, where there is one, and to `file` where one was asked for.

    Of several processes the first one does.
    """
    if jax.process_index():
        return
    text = json.dumps(found, indent=2) + "\n"
    if run is not None:
        folder = run / FOLDER
        folder.mkdir(exist_ok=True)
        name = re.sub(r"[^\w.-]+", "_", f"{found['step']:07}-{found['weights']}-{what}")
        (folder / f"{name}.json").write_text(text)
    if file is not None:
        file.write_text(text)
        print(f"wrote {file}")
