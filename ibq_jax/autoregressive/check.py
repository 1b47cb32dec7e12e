"""What can be wrong with a generator's config, said before anything is written or computed."""

from jax.sharding import Mesh
from ml_collections import ConfigDict

from ibq_jax.autoregressive.decode import Filter
from ibq_jax.autoregressive.model import REMAT, check_layout
from ibq_jax.autoregressive.sample import Guidance
from ibq_jax.base.config import check_choices, check_positive, check_seed_and_length, flatten
from ibq_jax.base.errors import UsageError
from ibq_jax.base.sharding import check_batch

CHOICES = {
    "dtype": ("float32", "bfloat16"),
    "model.attention": ("xla", "cudnn"),
    "model.remat": tuple(REMAT),
    "loss.implementation": ("streamed", "dense"),
}
POSITIVE = (
    "data.batch_size",
    "model.vocabulary",
    "model.layers",
    "model.heads",
    "model.kv_heads",
    "model.width",
    "optimizer.learning_rate",
    "train.accumulate",
    "log.every",
    "log.images_every",
    "log.images",
    "evaluate.every",
    "evaluate.batch_size",
    "checkpoint.every",
    "checkpoint.keep_last",
)
SHARES = ("model.dropout", "loss.class_dropout", "optimizer.warmup", "optimizer.flat", "optimizer.ema_decay")


def check_config(config: ConfigDict, mesh: Mesh) -> None:
    """Raises UsageError for values out of range, and for fields that contradict each other or the mesh."""
    check_choices(config, CHOICES)
    check_positive(config, POSITIVE)
    check_seed_and_length(config)
    for name in SHARES:
        value = flatten(config)[name]
        if not 0 <= value < 1:
            raise UsageError(f"{name}={value} is not a share: at least 0, and below 1")
    grid = config.model.grid
    if len(grid) != 2 or not all(isinstance(side, int) and side > 0 for side in grid) or grid == (1, 1):
        raise UsageError(f"model.grid={grid} is not rows and columns of a picture's codes, such as (16, 16)")
    if config.model.num_classes < 0:
        raise UsageError(f"model.num_classes={config.model.num_classes} is negative; 0 is a data set without classes")
    check_layout(config.model.width, config.model.heads, config.model.kv_heads)
    check_batch(config.data.batch_size, mesh, config.train.accumulate, "data.batch_size")
    check_batch(config.evaluate.batch_size, mesh, 1, "evaluate.batch_size")
    if config.model.vocabulary % mesh.shape["codebook"]:
        raise UsageError(
            f"model.vocabulary={config.model.vocabulary} does not divide over mesh.codebook={mesh.shape['codebook']}"
        )
    sample = config.sample
    Guidance(sample.cfg_scale)
    Filter(sample.top_k, sample.top_p)
    if sample.temperature < 0:
        raise UsageError(f"sample.temperature={sample.temperature} is negative; 0 takes the likeliest code")
