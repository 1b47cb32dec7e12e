"""Writes a folder for the Hugging Face hub: model.safetensors, config.json, a model card and torch_model.py."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ibq_jax.base.config import upgraded
from ibq_jax.base.files import atomic_folder
from ibq_jax.interop import torch_model
from ibq_jax.interop.hub import OURS
from ibq_jax.pretrained.tensor_files import write_tensors

STRUCTURED = ("architecture", "config", "metrics")  # JSON in a file's metadata

# How the numbers on the card were measured.
PROTOCOLS = {
    "tokenizer": "validation split, averaged weights, images rounded to 8 bits, mean over images",
    "autoregressive": "validation codes, averaged weights if kept, nats per code, mean over codes",
}
CARD = """---
license: other
library_name: ibq-jax
tags: [image-tokenizer, vector-quantization, jax, pytorch]
---

# {kind} {preset}

A {noun} of Index Backpropagation Quantization ([arXiv 2412.02692](https://arxiv.org/abs/2412.02692)): {description}.
The weights are from {origin} and were exported by IBQ-JAX ({revision}). Their licence depends on the training data;
fill it in above.

## Use

In PyTorch, with `torch_model.py` from this folder:

```python
{example}
```

In JAX, `python -m ibq_jax convert --in=model.safetensors --out=runs/mine` makes a run of it that can be evaluated and
trained further.

## Data

{data}

## Recipe

{recipe}

## Numbers

{numbers}
"""
EXAMPLES = {
    "tokenizer": """from torch_model import load
tokenizer = load("model.safetensors")
codes = tokenizer.encode(images)  # float [B, 3, H, W] in [-1, 1] -> [B, h, w]
reconstructions = tokenizer.decode(codes).clamp(-1, 1)""",
    "autoregressive": """from torch_model import load
generator = load("model.safetensors")
codes = generator.sample(labels, cfg_scale=2.0)  # [B] -> [B, h, w], for decode of its tokenizer""",
}


def write_hub_folder(folder: Path, tensors: Mapping[str, np.ndarray], about: Mapping[str, str]) -> None:
    """Writes `folder` with the tensors and the metadata that `to_file.export` returns.

    Raises UsageError if the folder exists.
    """
    fields: dict[str, Any] = {name: json.loads(text) if name in STRUCTURED else text for name, text in about.items()}
    if "config" in fields:  # the file may be of an earlier version
        fields["config"] = upgraded(fields["config"])
    with atomic_folder(folder) as partial:
        write_tensors(partial / OURS, tensors, about)
        (partial / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
        (partial / "README.md").write_text(_card(fields))
        shutil.copyfile(torch_model.__file__, partial / "torch_model.py")


def _card(about: Mapping) -> str:
    stage = about["stage"]
    from_run = "config" in about
    return CARD.format(
        kind="Tokenizer" if stage == "tokenizer" else "Generator",
        noun="tokenizer" if stage == "tokenizer" else "generator",
        preset=about["preset"],
        description=about["description"],
        origin=f"step {about['step']} of a run" if from_run else f"the file {about['source']}",
        revision=about["revision"],
        example=EXAMPLES[stage],
        data=_data(stage, about["config"]) if from_run else "The file does not say what it was trained on.",
        recipe=_recipe(about["config"]) if from_run else "The file does not say how it was trained.",
        numbers=_numbers(stage, about["metrics"]) if from_run and about["metrics"] else "None is recorded.",
    )


def _data(stage: str, config: Mapping) -> str:
    if stage == "tokenizer":
        data = config["data"]
        return f"Data set `{data['name']}`, split `{data['train_split']}`, {data['image_size']} pixels."
    return f"Codes of the token cache `{config['token_cache']}`."


def _recipe(config: Mapping) -> str:
    optimizer = config["optimizer"]
    return (
        f"{config['data']['batch_size']} images per step, peak learning rate {optimizer['learning_rate']:g}, betas "
        f"{optimizer['beta1']:g} and {optimizer['beta2']:g}, {config['dtype']}, seed {config['seed']}. "
        "`config.json` has every field of the run's config."
    )


def _numbers(stage: str, metrics: Mapping[str, float]) -> str:
    rows = [f"| {name.removeprefix('validation/')} | {value:.4g} |" for name, value in sorted(metrics.items())]
    return "\n".join(["| metric | value |", "|---|---|", *rows, "", f"Protocol: {PROTOCOLS[stage]}."])
