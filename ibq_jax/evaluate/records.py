"""Evaluation records: the numbers of one evaluation with all that is needed to compare them; printed and saved as JSON.

RUN/evaluations/STEP-WEIGHTS-PROTOCOL-SPLIT.json is one record: {"stage", "run", "step", "weights", "split", "images",
"protocol": {"name", "description", "images"}, "marks": caveats, such as why it is not comparable, "metrics"}.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import jax

from ibq_jax.evaluate.protocols import Protocol

FOLDER = "evaluations"  # of a run

# How metrics are printed: label and format.
FORMATS = {
    "psnr": ("PSNR", "{:.2f} dB"),
    "ssim": ("SSIM", "{:.4f}"),
    "l1": ("L1", "{:.4f}"),
    "lpips_vgg16": ("LPIPS (VGG)", "{:.4f}"),
    "lpips_alexnet": ("LPIPS (AlexNet)", "{:.4f}"),
    "loss": ("loss", "{:.4f} nats per code"),
    "usage": ("usage", "{:.1%} of the codebook"),
    "perplexity": ("perplexity", "{:.1f}"),
    "entropy": ("entropy", "{:.3f} nats"),
    "order_0": ("unigram entropy of the codes", "{:.4f} nats"),
    "uniform": ("uniform, log K", "{:.4f} nats"),
    "inception_score": ("Inception Score", "{:.2f}"),
    "inception_score_deviation": ("  standard deviation over groups", "{:.2f}"),
}
OTHER_FORMAT = "{:.4g}"


def make_record(
    *,
    stage: str,
    run: Path | None,
    step: int | None,
    weights: str,
    split: str,
    protocol: Protocol | Mapping,
    caveats: Sequence[str],
    metrics: Mapping[str, float],
    **details,
) -> dict:
    """Returns an evaluation record; `metrics` includes the number of "images", and `details` are stored unchanged."""
    if isinstance(protocol, Protocol):
        protocol = {"name": protocol.name, "description": protocol.describe(), "images": protocol.num_images}
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
        "marks": list(caveats),  # the key that records have always had
        "metrics": metrics,
        **details,
    }


def print_record(record: Mapping) -> None:
    """Prints an evaluation record."""
    step = "" if record["step"] is None else f", step {record['step']}, {record['weights']} weights"
    print(f"{record['split']}: {record['images']:,} images{step}")
    print(f"protocol {record['protocol']['name']}: {record['protocol']['description']}")
    metrics = list(format_metrics(record))
    width = max(len(label) for label, _ in metrics)
    for label, value in metrics:
        print(f"  {label:<{width}}  {value}")
    for caveat in record["marks"]:
        print(f"  {caveat}")


def print_table(records: Sequence[Mapping]) -> None:
    """Prints evaluation records of the same weights under several protocols: a table, then what each protocol is."""
    first = records[0]
    print(f"{first['split']}: {first['images']:,} images, step {first['step']}, {first['weights']} weights")
    rows = [("protocol", *(label for label, _ in format_metrics(first)))]
    rows += [(record["protocol"]["name"], *(value for _, value in format_metrics(record))) for record in records]
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    for row in rows:
        print(
            "  ".join(
                cell.rjust(width) if i else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
        )
    for record in records:
        print(f"{record['protocol']['name']}: {record['protocol']['description']}")
        for caveat in record["marks"]:
            print(f"  {caveat}")


def format_metrics(record: Mapping) -> Iterator[tuple[str, str]]:
    """Yields (label, formatted value) of every metric of an evaluation record."""
    order = list(FORMATS)
    for name in sorted(record["metrics"], key=lambda name: order.index(name) if name in FORMATS else len(order)):
        value = record["metrics"][name]
        label, form = FORMATS.get(name, (name, OTHER_FORMAT))
        yield label, form.format(value) if math.isfinite(value) else str(value)


def save_records(records: Sequence[Mapping], workdir: Path, file: Path | None) -> None:
    """Writes evaluation records into the run's folder `workdir`, and as one list to `file`, unless it is None."""
    for record in records:
        save_record(record, workdir, None)
    if file is not None and not jax.process_index():
        file.write_text(json.dumps(records, indent=2) + "\n")
        print(f"wrote {file}")


def save_record(record: Mapping, workdir: Path | None, file: Path | None) -> None:
    """Writes an evaluation record into the run's folder `workdir`, and to `file`, unless they are None.

    Only the first of several processes writes.
    """
    if jax.process_index():
        return
    text = json.dumps(record, indent=2) + "\n"
    if workdir is not None:
        folder = workdir / FOLDER
        folder.mkdir(exist_ok=True)
        evaluated = f"{record['protocol']['name']}-{record['split'].removesuffix('.npz')}"
        name = re.sub(r"[^\w.-]+", "_", f"{record['step']:07}-{record['weights']}-{evaluated}")
        (folder / f"{name}.json").write_text(text)
    if file is not None:
        file.write_text(text)
        print(f"wrote {file}")
