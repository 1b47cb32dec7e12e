"""Restores a joint run."""

from pathlib import Path

from ibq_jax.base.checkpoint import Restored
from ibq_jax.base.saved_run import SavedRun
from ibq_jax.base.sharding import make_mesh
from ibq_jax.joint.step import JointTrainer


def restore_run(path: Path) -> tuple[JointTrainer, Restored]:
    """Returns the trainer and the restored state of a run, on all devices of this process, without the moments.

    Args:
        path: the run's folder (its newest intact checkpoint is restored), or one step's folder under `checkpoints/`.

    Raises:
        UsageError: there is no joint run, or nothing is saved yet.
    """
    saved = SavedRun.find(path, "joint", needed="a joint run")
    trainer = JointTrainer(saved.config, make_mesh({"data": -1}), steps_per_epoch=1)
    return trainer, saved.restore(trainer.create_state, trainer.mesh)
