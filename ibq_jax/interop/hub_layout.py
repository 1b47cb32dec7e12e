"""A folder as repositories on the Hugging Face hub have it: model.safetensors, config.json and a model card."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ibq_jax.base.files import atomic_folder
from ibq_jax.interop import torch_model
from ibq_jax.interop.hub import OURS
from ibq_jax.pretrained.tensor_files import write_tensors

STRUCTURED = ("architecture", "config", "metrics")  # JSON in a file's metadata

# What a number was measured by; every number on the card names its protocol.
PROTOCOLS = {
    "tokenizer": "validation split, averaged weights, images rounded to 8 bits, mean over images",
    "autoregressive": "validation codes, averaged weights where kept, nats a code, mean over codes",
}
CARD = """---
license: other
library_name: ibq-jax
tags: [image-tokenizer, vector-quantization, jax, pytorch]
---

# {kind} {preset}

It is {description}, as of Index Backpropagation Quantization ([arXiv 2412.02692](https://arxiv.org/abs/2412.02692)):
{origin}, written by IBQ-JAX (revision {revision}). The licence of the weights follows from their data; fill it in.

## Use

In PyTorch, with `torch_model.py` beside this file:

```python
{example}
```

In JAX, `python -m ibq_jax convert --in=model.safetensors --out=runs/mine` makes a run of it, to sample, evaluate and
train on.

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
pictures = tokenizer.decode(codes).clamp(-1, 1)""",
    "autoregressive": """from torch_model import load
generator = load("model.safetensors")
codes = generator.sample(labels, cfg_scale=2.0)  # [B] -> [B, h, w], for its tokenizer's decode""",
}


def write_hub_folder(folder: Path, tensors: Mapping[str, np.ndarray], about: Mapping[str, str]) -> None:
    """`tensors` and `about` as `export_run` or `relabel_file` gives them. Raises UsageError where the folder exists."""
    told = {name: json.loads(text) if name in STRUCTURED else text for name, text in about.items()}
    with atomic_folder(folder) as partial:
        write_tensors(partial / OURS, tensors, about)
        (partial / "config.json").write_text(json.dumps(told, indent=2) + "\n")
        (partial / "README.md").write_text(_card(told))
        shutil.copyfile(torch_model.__file__, partial / "torch_model.py")


def _card(about: Mapping) -> str:
    stage = about["stage"]
    of_run = "config" in about
    return CARD.format(
        kind="Tokenizer" if stage == "tokenizer" else "Generator",
        preset=about["preset"],
        description=about["description"],
        origin=f"step {about['step']} of a run" if of_run else f"the file {about['source']}",
        revision=about["revision"],
        example=EXAMPLES[stage],
        data=_data(stage, about["config"]) if of_run else "The file does not say what it was trained on.",
        recipe=_recipe(about["config"]) if of_run else "The file does not say how it was trained.",
        numbers=_numbers(stage, about["metrics"]) if of_run and about["metrics"] else "None is recorded.",
    )


def _data(stage: str, config: Mapping) -> str:
    if stage == "tokenizer":
        data = config["data"]
        return f"Data set `{data['name']}`, split `{data['train_split']}`, {data['image_size']} pixels."
    return f"Codes of the cache `{config['codes']}`."


def _recipe(config: Mapping) -> str:
    optimizer = config["optimizer"]
    return (
        f"{config['data']['batch_size']} pictures a step, peak learning rate {optimizer['learning_rate']:g}, betas "
        f"{optimizer['beta1']:g} and {optimizer['beta2']:g}, {config['dtype']}, seed {config['seed']}; every field "
        "of the run's config stands in `config.json`."
    )


def _numbers(stage: str, metrics: Mapping[str, float]) -> str:
    rows = [f"| {name.removeprefix('validation/')} | {value:.4g} |" for name, value in sorted(metrics.items())]
    return "\n".join(["| what | measured |", "|---|---|", *rows, "", f"Protocol: {PROTOCOLS[stage]}."])
