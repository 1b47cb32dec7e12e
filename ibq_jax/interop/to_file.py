"""Exports the weights of a run: a file under the published names that says what it holds.

The file's metadata (in a .safetensors; "metadata" next to "state_dict" in a pickled file), all as text: stage,
architecture (JSON, in the format of the published configurations), config (JSON, the run's), preset, description,
revision (of the code that wrote it), step, weights, metrics (JSON, of the last validation up to that step).
"""

import json
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from ibq_jax.autoregressive.restore import restore_run as restore_generator
from ibq_jax.base.checkpoint import Restored
from ibq_jax.base.revision import revision
from ibq_jax.base.saved_run import IMPORTED, SavedRun
from ibq_jax.interop import generator_names, tokenizer_names
from ibq_jax.interop.from_file import CARRIED
from ibq_jax.interop.recognize import TOKENIZER, Contents, check, describe, recognize, same_presets
from ibq_jax.interop.weights import holds_weights, open_weights
from ibq_jax.pretrained.tensor_files import read_tensors
from ibq_jax.tokenizer.restore import restore_run as restore_tokenizer

WEIGHTS = ("all", "ema", "raw")
FROZEN = ("loss.perceptual_loss.", generator_names.TOKENIZER_PREFIX)  # carried weights that training does not change


def export_run(run: Path, weights: str = "all") -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Returns the tensors of a run and the metadata that describes them.

    Args:
        run: the run's folder (its newest intact checkpoint is read), or one step's folder under `checkpoints/`.
        weights: for a tokenizer, "all" that a published file holds (raw weights, discriminator, averages of both), or
            only the averages ("ema") or the raw weights ("raw"), then under the plain names. A generator's file holds
            one set: the averages if the run keeps them, unless this is "raw".

    Raises:
        UsageError: there is no run, nothing is saved yet, or its quantizer is not IBQ's.
    """
    saved = SavedRun.find(run)
    origin = json.loads((saved.workdir / IMPORTED).read_text()) if (saved.workdir / IMPORTED).is_file() else {}
    if saved.config.stage == TOKENIZER:
        trainer, restored = restore_tokenizer(run)
        tokenizer_names.check_quantizer(trainer.model.quantizer)
        as_found = origin if restored.step == 0 else {}
        tensors = _tokenizer_tensors(restored, trainer.config, weights, as_found)
    else:
        trainer, restored, _ = restore_generator(run)
        params = restored.state.weights("raw" if weights == "raw" else "ema")
        prefix = origin.get("prefix", generator_names.PREFIX)
        tensors = generator_names.generator_to_torch(jax.device_get(params), prefix)
    if weights == "all":
        tensors |= _carried(saved.workdir, trained=restored.step > 0)
    return tensors, _metadata(Contents.from_config(trainer.config)) | {
        "config": json.dumps(trainer.config.to_dict()),
        "step": str(restored.step),
        "weights": weights,
        "metrics": json.dumps(_metrics(saved.workdir / "metrics.jsonl", restored.step)),
    }


def relabel_file(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Returns the tensors of a file or a folder of weights, unchanged, and metadata that describes them.

    Raises UsageError that names every tensor that is missing, unknown or of the wrong shape.
    """
    file = open_weights(path)
    contents = recognize(file.shapes, file.about, str(path))
    check(file.shapes, contents)
    about = _metadata(contents) | {"source": path.name} | file.about
    return {name: file.read(name) for name in file.shapes}, about


def export(source: Path, weights: str = "all") -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Returns the tensors and the metadata of a run (`export_run`), or of a file or folder of weights."""
    return relabel_file(source) if holds_weights(source) else export_run(source, weights)


def _metadata(contents: Contents) -> dict[str, str]:
    return {
        "stage": contents.stage,
        "architecture": json.dumps(contents.architecture),
        "preset": ", ".join(same_presets(contents)),
        "description": describe(contents),
        "revision": revision(),
    }


def _tokenizer_tensors(
    restored: Restored, config: ConfigDict, weights: str, as_found: Mapping
) -> dict[str, np.ndarray]:
    """Returns a tokenizer's tensors under their published names, with the discriminator if it is of the published kind.

    `as_found` is the origin of an imported run that was not trained since, {} otherwise: its tensors are then the
    file's, without additions.
    """
    state = jax.device_get(restored.state)
    if weights != "all":
        return tokenizer_names.tokenizer_to_torch(state.weights(weights))
    discriminator = None
    published_kind = tokenizer_names.has_published_discriminator(config)
    if state.discriminator is not None and jax.tree.leaves(state.discriminator.params) and published_kind:
        discriminator = {"params": state.discriminator.params, "batch_stats": state.discriminator.batch_stats}
    if as_found:
        ema = state.weights("ema") if as_found["averages"] else None
        return tokenizer_names.to_torch_arrays(
            tokenizer_names.published_tensors(state.params, ema, discriminator, stand_in=False)
        )
    return tokenizer_names.to_torch_arrays(
        tokenizer_names.published_tensors(state.params, state.weights("ema"), discriminator)
    ) | {
        "model_ema.decay": np.array(config.optimizer.ema_decay, np.float32),
        "model_ema.num_updates": np.array(restored.step, np.int32),
    }


def _carried(workdir: Path, trained: bool) -> dict[str, np.ndarray]:
    """Returns an imported run's other tensors; once it was trained, only those that training does not change."""
    if not (workdir / CARRIED).is_file():
        return {}
    carried = read_tensors(workdir / CARRIED)
    return {name: tensor for name, tensor in carried.items() if not trained or name.startswith(FROZEN)}


def _metrics(path: Path, step: int) -> dict[str, float]:
    """Returns the scalars of the last validation up to `step` that the run logged."""
    found: dict[str, float] = {}
    for line in path.read_text().splitlines() if path.is_file() else ():
        record = json.loads(line)
        if record["step"] <= step:
            found |= {
                name: value
                for name, value in record.items()
                if name.startswith("validation/") and isinstance(value, float | int)
            }
    return found
