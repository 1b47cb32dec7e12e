"""Restores a generator from the run that training left, and finds the tokenizer of its codes.

Beside what every run's folder holds, `codes.json` is the manifest of the token cache that it was trained on.
"""

from collections.abc import Mapping
from pathlib import Path

from ml_collections import ConfigDict

from ibq_jax.autoregressive.step import GeneratorTrainer
from ibq_jax.base.checkpoint import Restored
from ibq_jax.base.errors import UsageError
from ibq_jax.base.saved_run import SavedRun
from ibq_jax.base.sharding import make_mesh
from ibq_jax.data.token_cache import TokenCacheSplit, check_manifest, read_fields
from ibq_jax.tokenizer.model import TokenizerModel
from ibq_jax.tokenizer.restore import restore_run as restore_tokenizer
from ibq_jax.tokenizer.tokenize import fingerprint

CODES = "codes.json"

TokenizerWeights = tuple[TokenizerModel, Mapping]  # a tokenizer: its model and parameters


def restore_run(path: Path) -> tuple[GeneratorTrainer, Restored, dict]:
    """The trainer, the newest whole state of a run's folder (or the state of one step's folder under its
    `checkpoints/`), and the manifest of its codes. On all devices, whatever mesh the run had; without moments.

    Raises UsageError when there is no run, or nothing saved yet.
    """
    saved = SavedRun.find(path, "autoregressive", needed="a generator")
    trainer = GeneratorTrainer(saved.config, make_mesh({"data": -1}), steps_per_epoch=1)
    return trainer, saved.restore(trainer.create_state, trainer.mesh), read_fields(saved.workdir / CODES)


def find_tokenizer(path: str, manifest: Mapping, needed: bool) -> TokenizerWeights | None:
    """The tokenizer that made the codes, from `path`, or where that is empty from where the manifest says it was.

    None when it is not there and not `needed`. Raises UsageError when it is another tokenizer.
    """
    made = manifest["tokenizer"]
    where = Path(path or made["path"])
    if not path and not made["path"] and needed:
        raise UsageError("which tokenizer made this imported generator's codes is not known; give --tokenizer=RUN")
    if not path and not needed and not (where / "config.json").is_file():
        print(f"no pictures: the codes' tokenizer is not in {where} any more; tell where with --config.tokenizer=RUN")
        return None
    if not path and made["step"] is not None:
        step = where / "checkpoints" / str(made["step"])
        where = step if step.is_dir() else where
    trainer, restored = restore_tokenizer(where)
    params = restored.state.weights(made["weights"])
    if made["fingerprint"]:
        check_manifest(
            {"tokenizer": {"fingerprint": made["fingerprint"]}},
            {"tokenizer.fingerprint": fingerprint(trainer.model, params)},
            where="of these codes",
            asker=f"the tokenizer in {where}",
        )
    elif trainer.model.codebook_size != manifest["codes"]:
        raise UsageError(
            f"the tokenizer in {where} has {trainer.model.codebook_size} codes, the generator draws {manifest['codes']}"
        )
    return trainer.model, params


def check_fit(config: ConfigDict, source: TokenCacheSplit) -> None:
    """Raises UsageError unless these are codes of the kind that the config's model draws."""
    model, classes = config.model, len(source.manifest["data"]["class_names"])
    asked = {
        "model.vocab_size": (model.vocab_size, source.codebook_size),
        "model.grid": (tuple(model.grid), source.grid),
        "model.num_classes": (model.num_classes, classes),
    }
    wrong = [f"{name}={value}, the codes have {has}" for name, (value, has) in asked.items() if value != has]
    if wrong:
        raise UsageError(f"{source} does not fit the config: {'; '.join(wrong)}; override the config's fields")
