"""Trains a config of any stage in one library call, which the command `train` makes too."""

import os
from collections.abc import Callable, Mapping
from typing import NamedTuple

from ml_collections import ConfigDict

from ibq_jax.autoregressive.step import GeneratorTrainer
from ibq_jax.base.errors import UsageError
from ibq_jax.base.files import as_path
from ibq_jax.base.saved_run import SavedRun
from ibq_jax.joint.step import JointTrainer
from ibq_jax.tokenizer.step import TokenizerTrainer
from ibq_jax.training import generator, joint, tokenizer
from ibq_jax.training.fit import FieldRoles
from ibq_jax.training.generator import train_generator
from ibq_jax.training.joint import train_joint
from ibq_jax.training.tokenizer import train_tokenizer


class Stage(NamedTuple):
    """A stage's trainer, the function that trains its configs, and what their fields mean to a run."""

    trainer_class: type
    train: Callable
    roles: FieldRoles


STAGES = {
    "tokenizer": Stage(TokenizerTrainer, train_tokenizer, tokenizer.FIELD_ROLES),
    "autoregressive": Stage(GeneratorTrainer, train_generator, generator.FIELD_ROLES),
    "joint": Stage(JointTrainer, train_joint, joint.FIELD_ROLES),
}


def train(
    config: ConfigDict,
    workdir: str | os.PathLike[str],
    profile: range = range(0),
    trainer_class: type[TokenizerTrainer] | type[GeneratorTrainer] | type[JointTrainer] | None = None,
    initial: Callable[[], Mapping] | None = None,
) -> SavedRun:
    """Trains `config` in the folder `workdir` to its last step, or continues the run that is there.

    It can be called from a script, a notebook or any thread; only the main thread can save and stop on a signal. With
    reader processes (data.num_workers above 0), which import the calling script again, a script has to guard its entry
    point with `if __name__ == "__main__":`.

    Args:
        config: a config of any stage, such as `ibq_jax.load_config("configs/tokenizer.py:openmoji32")`.
        workdir: the run's folder, local or gs://, created if it does not exist.
        profile: steps whose trace is written to `workdir/profile`.
        trainer_class: a subclass of the stage's trainer (`TokenizerTrainer`, `GeneratorTrainer`, `JointTrainer`) that
            changes the step. The run does not record it: pass it again to continue.
        initial: returns the weights that a new run starts from, as `Tokenizer.load(path).params` are; a run that is
            continued does not call it. None: random ones.

    Returns:
        the run: `.workdir`, `.config` and `.restore(...)`; `Tokenizer.load(run.workdir)` loads its weights.

    Raises:
        UsageError: a field, a file or the folder is wrong; the message says which and what would be right.
        TrainingStopped: a loss was not finite, or the codebook collapsed.
        Interrupted: SIGTERM or Ctrl-C arrived; the step was saved, and the same call continues.
    """
    if config.stage not in STAGES:
        raise UsageError(f"the config is of stage {config.stage!r}; the stages are {', '.join(STAGES)}")
    stage_trainer, train_stage, _ = STAGES[config.stage]
    trainer_class = trainer_class or stage_trainer
    if not issubclass(trainer_class, stage_trainer):
        raise UsageError(
            f"trainer_class={trainer_class.__name__} does not fit stage {config.stage!r}; it must be a subclass of "
            f"{stage_trainer.__name__}"
        )
    workdir = as_path(workdir)
    train_stage(config, workdir, profile, trainer_class, initial)
    return SavedRun.find(workdir)
