"""Restores a generator from a run, and finds the tokenizer of its codes.

Besides what every run's folder holds, `token_cache.json` is the manifest of the token cache that it was trained on.
"""

from collections.abc import Mapping
from pathlib import Path

from ibq_jax.autoregressive.step import GeneratorTrainer
from ibq_jax.base.checkpoint import Restored
from ibq_jax.base.errors import UsageError
from ibq_jax.base.precision import compute_dtype
from ibq_jax.base.saved_run import SavedRun
from ibq_jax.base.sharding import make_mesh
from ibq_jax.data.token_cache import check_manifest, read_run_manifest
from ibq_jax.tokenizer.model import TokenizerModel
from ibq_jax.tokenizer.restore import restore_run as restore_tokenizer
from ibq_jax.tokenizer.tokenize import fingerprint

TokenizerWeights = tuple[TokenizerModel, Mapping]  # a tokenizer: its model and parameters


def restore_run(path: Path) -> tuple[GeneratorTrainer, Restored, dict]:
    """Returns the trainer and the restored state of a run, and the manifest of its token cache.

    The state is on all devices of this process, whatever mesh the run had, and lacks the optimizer's moments.

    Args:
        path: the run's folder (its newest intact checkpoint is restored), or one step's folder under `checkpoints/`.

    Raises:
        UsageError: there is no generator's run, or nothing is saved yet.
    """
    saved = SavedRun.find(path, "autoregressive", needed="a generator")
    trainer = GeneratorTrainer(saved.config, make_mesh({"data": -1}), steps_per_epoch=1)
    return trainer, saved.restore(trainer.create_state, trainer.mesh), read_run_manifest(saved.workdir)


def find_tokenizer(path: str, manifest: Mapping, needed: bool) -> TokenizerWeights | None:
    """Returns the tokenizer that made a token cache's codes, at the precision at which it made them.

    Args:
        path: the tokenizer's run; if empty, the run that the manifest names.
        manifest: of the token cache.
        needed: if False, returns None if the run that the manifest names no longer exists.

    Raises:
        UsageError: there is no such run, or it holds another tokenizer.
    """
    made = manifest["tokenizer"]
    where = Path(path or made["path"])
    if not path and not made["path"] and needed:
        raise UsageError("this imported generator does not say which tokenizer made its codes; give --tokenizer=RUN")
    if not path and not needed and not (where / "config.json").is_file():
        print(f"no samples will be logged: the codes' tokenizer is no longer in {where}; give --config.tokenizer=RUN")
        return None
    if not path and made["step"] is not None:
        step = where / "checkpoints" / str(made["step"])
        where = step if step.is_dir() else where
    trainer, restored = restore_tokenizer(where)
    model, params = trainer.model, restored.state.weights(made["weights"])
    precision = manifest.get("precision", trainer.config.encode.precision)  # an imported run's manifest has none
    if made["fingerprint"]:
        check_manifest(
            {"tokenizer": {"fingerprint": made["fingerprint"]}},
            {"tokenizer.fingerprint": fingerprint(_as_made(model, manifest), params)},
            where="of these codes",
            asker=f"the tokenizer in {where}",
        )
    elif model.codebook_size != manifest["codebook_size"]:
        raise UsageError(
            f"the tokenizer in {where} has {model.codebook_size} codes, the generator draws {manifest['codebook_size']}"
        )
    return _for_decoding(model, precision), params


def _as_made(model: TokenizerModel, manifest: Mapping) -> TokenizerModel:
    """Returns the model as it was when `manifest` got its fingerprint, so that only the weights can differ."""
    if "machine" not in manifest:  # of an earlier version, or imported: codes were computed as in training
        return model
    precision = manifest["precision"]
    return model.clone(dtype=compute_dtype(precision), precision=precision)


def _for_decoding(model: TokenizerModel, precision: str) -> TokenizerModel:
    """Returns the model at a precision, or at float32 if this machine lacks it; codes may come from another machine."""
    try:
        return model.for_encoding(precision)
    except UsageError:
        return model.for_encoding("float32")
