"""Restores a tokenizer from the run that training left."""

from pathlib import Path

from ibq_jax.base.checkpoint import WEIGHTS_ONLY, Restored
from ibq_jax.base.saved_run import SavedRun
from ibq_jax.base.sharding import create_sharded, make_mesh
from ibq_jax.tokenizer.step import TokenizerTrainer


def restore_run(path: Path, whole: bool = False) -> tuple[TokenizerTrainer, Restored]:
    """The trainer and the newest whole state of a run's folder, or of one step's folder under its `checkpoints/`.

    On all devices, whatever mesh the run had; unless wanted `whole`, without the optimizers' moments. Raises UsageError
    when there is no run, or nothing saved yet.
    """
    saved = SavedRun.find(path, "tokenizer", needed="a tokenizer")
    trainer = TokenizerTrainer(saved.config, make_mesh({"data": -1}), steps_per_epoch=1)
    return trainer, saved.restore(trainer.create_state, trainer.mesh, whole)


def restore_whole_run(path: Path) -> tuple[TokenizerTrainer, Restored]:
    """As `restore_run`, all of it; where weights alone were saved, the rest is as before the first step."""
    trainer, restored = restore_run(path, whole=True)
    state = restored.completed(lambda: create_sharded(trainer.create_state, trainer.mesh, trainer.config.seed))
    metadata = {name: value for name, value in restored.metadata.items() if name != WEIGHTS_ONLY}
    return trainer, Restored(restored.step, state, metadata)
