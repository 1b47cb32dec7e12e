"""Trains a config of either stage: the library's one call, which the command makes too."""

import os
from collections.abc import Callable

from ml_collections import ConfigDict

from ibq_jax.base.errors import UsageError
from ibq_jax.base.files import as_path
from ibq_jax.base.saved_run import SavedRun
from ibq_jax.training.generator import train_generator
from ibq_jax.training.tokenizer import train_tokenizer

STAGES: dict[str, Callable] = {"tokenizer": train_tokenizer, "autoregressive": train_generator}


def train(config: ConfigDict, workdir: str | os.PathLike[str], profile: range = range(0)) -> SavedRun:
    """Trains `config` in the folder `workdir` to its last step, or continues the run that is there.

    Args:
        config: a config of either stage, such as `ibq_jax.load_config("configs/tokenizer.py:openmoji32")`.
        workdir: the run's folder, on this machine or gs://; made where it does not exist.
        profile: steps whose trace is written to `workdir/profile`.

    Returns:
        the run: `.workdir`, `.config` and `.restore(...)`; `Tokenizer.load(run.workdir)` reads its weights.

    Raises:
        UsageError: a value or a file is not as it should be; the message says which and what would be right.
        TrainingStopped: a loss was not finite, or the codebook collapsed.
        Interrupted: SIGTERM or Ctrl-C came; the step was saved, and the same call continues.
    """
    if config.stage not in STAGES:
        raise UsageError(f"the config is of stage {config.stage!r}; the stages are {', '.join(STAGES)}")
    workdir = as_path(workdir)
    STAGES[config.stage](config, workdir, profile)
    return SavedRun.find(workdir)
