"""A file of weights made of a run: under the published names, and telling what it is.

What a file says of itself (a .safetensors' metadata, or "metadata" beside "state_dict"), all as text:
stage, architecture (JSON, as the published configurations are written), config (JSON, the run's), preset, revision (of
the code that wrote it), step, weights, metrics (JSON, of the last evaluation up to that step).
"""

import json
import subprocess
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import jax
import numpy as np

from ibq_jax.autoregressive.restore import restore_run as restore_generator
from ibq_jax.base.checkpoint import Restored
from ibq_jax.base.saved_run import IMPORTED, SavedRun
from ibq_jax.interop import generator_names, tokenizer_names
from ibq_jax.interop.from_file import CARRIED
from ibq_jax.interop.recognize import TOKENIZER, Contents, architecture, check, describe, recognize, same_presets
from ibq_jax.pretrained.tensor_files import open_tensors, read_tensors
from ibq_jax.tokenizer.restore import restore_run as restore_tokenizer

WEIGHTS = ("all", "ema", "raw")
FROZEN = ("loss.perceptual_loss.", generator_names.TOKENIZER_PREFIX)  # carried weights that training leaves as they are


def export_run(run: Path, weights: str = "all") -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """(tensors, what is said of them) of the newest whole checkpoint of a run, or of one step's folder.

    `weights`, of a tokenizer: "all" that a published file holds (the last weights, the discriminator, the averages of
    both), or under the plain names only the averages ("ema") or the last weights ("raw"). A generator's file holds one
    set: the averages where the run keeps them, unless "raw" is asked.
    """
    saved = SavedRun.find(run)
    origin = json.loads((saved.workdir / IMPORTED).read_text()) if (saved.workdir / IMPORTED).is_file() else {}
    if saved.config.stage == TOKENIZER:
        trainer, restored = restore_tokenizer(run)
        tokenizer_names.check_quantizer(trainer.model.quantizer)
        as_found = origin if restored.step == 0 else {}
        tensors = _tokenizer(restored, trainer.config.optimizer.ema_decay, weights, as_found)
    else:
        trainer, restored, _ = restore_generator(run)
        params = restored.state.params if weights == "raw" else restored.state.averaged
        prefix = origin.get("prefix", generator_names.PREFIX)
        tensors = generator_names.generator_to_torch(jax.device_get(params), prefix)
    if weights == "all":
        tensors |= _carried(saved.workdir, trained=restored.step > 0)
    contents = Contents(saved.config.stage, architecture(trainer.config))
    return tensors, {
        "stage": contents.stage,
        "architecture": json.dumps(contents.architecture),
        "config": json.dumps(trainer.config.to_dict()),
        "preset": ", ".join(same_presets(contents)),
        "description": describe(contents),
        "revision": _revision(),
        "step": str(restored.step),
        "weights": weights,
        "metrics": json.dumps(_metrics(saved.workdir / "metrics.jsonl", restored.step)),
    }


def relabel_file(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """(tensors, what is said of them) of a file of weights, its tensors as they are.

    Raises UsageError naming every tensor that is missing, unknown or misshapen.
    """
    file = open_tensors(path)
    contents = recognize(file.shapes, file.about, str(path))
    check(file.shapes, contents)
    about = {
        "stage": contents.stage,
        "architecture": json.dumps(contents.architecture),
        "preset": ", ".join(same_presets(contents)),
        "description": describe(contents),
        "revision": _revision(),
        "source": path.name,
    }
    return {name: file.read(name) for name in file.shapes}, about | file.about


def _tokenizer(restored: Restored, decay: float, weights: str, as_found: Mapping) -> dict[str, np.ndarray]:
    """`as_found`: of an imported run that was not trained on, what it came from; then no more is written than that."""
    state = jax.device_get(restored.state)
    if weights != "all":
        return tokenizer_names.tokenizer_to_torch(state.ema if weights == "ema" else state.params)
    discriminator = None
    if state.discriminator is not None and jax.tree.leaves(state.discriminator.params):
        discriminator = {"params": state.discriminator.params, "batch_stats": state.discriminator.batch_stats}
    if as_found:
        ema = state.ema if as_found["averages"] else None
        return tokenizer_names.to_host_async(
            tokenizer_names.published_tensors(state.params, ema, discriminator, stand_in=False)
        )
    return tokenizer_names.to_host_async(tokenizer_names.published_tensors(state.params, state.ema, discriminator)) | {
        "model_ema.decay": np.array(decay, np.float32),
        "model_ema.num_updates": np.array(restored.step, np.int32),
    }


def _carried(workdir: Path, trained: bool) -> dict[str, np.ndarray]:
    """What an imported run holds beside its state; once it has been trained, only what was frozen belongs to it."""
    if not (workdir / CARRIED).is_file():
        return {}
    carried = read_tensors(workdir / CARRIED)
    return {name: tensor for name, tensor in carried.items() if not trained or name.startswith(FROZEN)}


def _metrics(path: Path, step: int) -> dict[str, float]:
    """The last evaluation up to `step` that the run logged."""
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


def _revision() -> str:
    """Of the code: git's, or where there is no repository the package's version."""
    asked = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        said = subprocess.run(asked, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return f"ibq-jax {version('ibq-jax')}"
    return said.stdout.strip()
