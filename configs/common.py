"""The config groups that both stages have: train, mesh, watchdog, log and checkpoint.

The config files load this one by path, from the folder of the shipped presets, so that a copy of them works anywhere:

    common = run_file(preset_folder() / "common.py")
"""

from ml_collections import ConfigDict


def add_common_groups(config: ConfigDict, *, epochs: int, images_every: int, best_metric: str) -> None:
    """Adds the groups to `config`, with the values of the ImageNet presets.

    Args:
        config: the stage's other groups.
        epochs: train.epochs.
        images_every: log.images_every.
        best_metric: checkpoint.best_metric.
    """
    config.train = ConfigDict()
    config.train.epochs = epochs  # passes over the training data
    config.train.steps = 0  # length of the run in steps; 0: train.epochs decides
    config.train.grad_accum_steps = 1  # micro-batches that a batch is split into, one in memory at a time
    config.train.compiler_options = ""  # XLA's for the step, NAME=VALUE,...: besides those of ibq_jax/base/compiler.py

    config.mesh = ConfigDict()  # devices along each axis; their product is the number of devices
    config.mesh.data = -1  # splits the batch only; -1: all devices that the other axes leave
    config.mesh.fsdp = 1  # splits the generator's matrices and their optimizer state too
    config.mesh.codebook = 1  # splits the rows of the codebook, or of the generator's vocabulary, too

    config.log = ConfigDict()
    config.log.every = 50  # steps between logged metrics
    config.log.images_every = images_every  # steps between logged images
    config.log.num_images = 8  # columns of reconstructions, or classes that samples are drawn of

    config.checkpoint = ConfigDict()
    config.checkpoint.every = 2_500  # steps between checkpoints
    config.checkpoint.keep_last = 3  # newest checkpoints to keep
    config.checkpoint.keep_best = 1  # best checkpoints to keep besides those
    config.checkpoint.best_metric = best_metric  # the metric that ranks them, higher is better; a "-" in front: lower

    config.watchdog = ConfigDict()
    config.watchdog.slow_factor = 10.0  # dumps all stacks if a part of a step takes this many times its usual duration
    config.watchdog.slow_seconds = 60.0  # and at least this many seconds
    config.watchdog.hang_seconds = 3600.0  # exits after this many seconds without progress, to be restarted; 0: never
