"""Restores a tokenizer from a run."""

from pathlib import Path

from ibq_jax.base.checkpoint import WEIGHTS_ONLY, Restored
from ibq_jax.base.saved_run import SavedRun
from ibq_jax.base.sharding import create_sharded, make_mesh
from ibq_jax.tokenizer.step import TokenizerTrainer


def restore_run(path: Path, with_optimizer: bool = False) -> tuple[TokenizerTrainer, Restored]:
    """Returns the trainer and the restored state of a run, on all devices of this process, whatever mesh the run had.

    Args:
        path: the run's folder (its newest intact checkpoint is restored), or one step's folder under `checkpoints/`.
        with_optimizer: also restores the optimizers' moments.

    Raises:
        UsageError: there is no tokenizer's run, or nothing is saved yet.
    """
    saved = SavedRun.find(path, "tokenizer", needed="a tokenizer")
    trainer = TokenizerTrainer(saved.config, make_mesh({"data": -1}), steps_per_epoch=1)
    return trainer, saved.restore(trainer.create_state, trainer.mesh, with_optimizer)


def restore_whole_run(path: Path) -> tuple[TokenizerTrainer, Restored]:
    """Returns the same with all leaves; those that a checkpoint of weights only lacks have their initial values."""
    trainer, restored = restore_run(path, with_optimizer=True)
    state = restored.completed(lambda: create_sharded(trainer.create_state, trainer.mesh, trainer.config.seed))
    metadata = {name: value for name, value in restored.metadata.items() if name != WEIGHTS_ONLY}
    return trainer, Restored(restored.step, state, metadata)
