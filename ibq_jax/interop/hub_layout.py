"""Writes a folder for the Hugging Face hub, which PyTorch and transformers load without this package.

It holds model.safetensors, config.json, a model card, torch_model.py, and modeling_ibq.py for
`AutoModel.from_pretrained(FOLDER, trust_remote_code=True)`; a tokenizer's also config.yaml, which loaders of published
tokenizers read.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ibq_jax.base.config import upgraded
from ibq_jax.base.files import atomic_folder
from ibq_jax.interop import torch_model
from ibq_jax.interop.generator_names import PREFIX, TOKENIZER_PREFIX
from ibq_jax.interop.hub import OURS
from ibq_jax.interop.tokenizer_names import ema_name
from ibq_jax.pretrained.tensor_files import write_tensors

HERE = Path(torch_model.__file__).parent
PACKAGE, NEIGHBOUR = "from ibq_jax.interop.torch_model import", "from .torch_model import"
CLASSES = {"tokenizer": "IbqTokenizer", "autoregressive": "IbqGenerator"}
OTHERS = ("loss.", ema_name(""), TOKENIZER_PREFIX)
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

With transformers, the same module:

```python
from transformers import AutoModel
model = AutoModel.from_pretrained(".", trust_remote_code=True)  # or the name of the repository
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

    Of all tensors of a training run or a published file, only those that a model computes with are written: the
    averages if there are any, under the plain names.

    Raises UsageError if the folder exists.
    """
    fields: dict[str, Any] = {name: json.loads(text) if name in STRUCTURED else text for name, text in about.items()}
    if "config" in fields:  # the file may be of an earlier version
        fields["config"] = upgraded(fields["config"])
    name = CLASSES[about["stage"]]
    for_transformers = {
        "model_type": "ibq",
        "architectures": [name],
        "auto_map": {"AutoConfig": "modeling_ibq.IbqConfig", "AutoModel": f"modeling_ibq.{name}"},
    }
    with atomic_folder(folder) as partial:
        write_tensors(partial / OURS, own_tensors(tensors), {**about, "format": "pt"})  # transformers asks for it
        (partial / "config.json").write_text(json.dumps(for_transformers | fields, indent=2) + "\n")
        if about["stage"] == "tokenizer":
            (partial / "config.yaml").write_text(yaml.safe_dump(fields["architecture"], sort_keys=False))
        (partial / "README.md").write_text(_card(fields))
        shutil.copyfile(HERE / "torch_model.py", partial / "torch_model.py")
        code = (HERE / "auto_model.py").read_text()
        (partial / "modeling_ibq.py").write_text(code.replace(PACKAGE, NEIGHBOUR))


def own_tensors(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns those tensors of a published file that a model computes with, under the plain names."""
    own = {name: tensor for name, tensor in tensors.items() if not name.startswith(OTHERS)}
    averages = {name: ema_name(name) for name in own}
    if all(name in tensors for name in averages.values()):
        own = {name: tensors[average] for name, average in averages.items()}
    return {name.removeprefix(PREFIX): tensor for name, tensor in own.items()}


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
