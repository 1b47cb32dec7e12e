"""Checks a generator's config before anything is written or computed."""

from jax.sharding import Mesh
from ml_collections import ConfigDict

from ibq_jax.autoregressive.generate import LogitFilter
from ibq_jax.autoregressive.layers import cudnn_applies
from ibq_jax.autoregressive.model import REMAT, check_layout
from ibq_jax.autoregressive.sample_codes import Guidance
from ibq_jax.base.config import check_choices, check_positive, check_seed_and_length, flatten
from ibq_jax.base.errors import UsageError
from ibq_jax.base.sharding import check_batch
from ibq_jax.base.state import check_moments

CHOICES = {
    "dtype": ("float32", "bfloat16"),
    "model.attention": ("auto", "xla", "cudnn"),
    "model.remat": tuple(REMAT),
    "loss.implementation": ("streamed", "dense"),
    "optimizer.moment_dtype": ("float32", "bfloat16"),
}
POSITIVE = (
    "model.vocab_size",
    "model.num_layers",
    "model.num_heads",
    "model.num_kv_heads",
    "model.embed_dim",
)
FRACTIONS = (
    "model.dropout",
    "loss.class_dropout",
    "optimizer.beta1",
    "optimizer.beta2",
    "optimizer.warmup_fraction",
    "optimizer.hold_fraction",
    "optimizer.ema_decay",
)
NOT_NEGATIVE = (
    "model.unroll",
    "loss.block_size",
    "optimizer.init_lr_factor",
    "optimizer.end_lr_factor",
    "optimizer.weight_decay",
    "optimizer.weight_decay_end",
    "optimizer.gradient_clip",
)


def check_config(config: ConfigDict, mesh: Mesh) -> None:
    """Raises UsageError for values out of range, and for fields that contradict each other or the mesh."""
    check_choices(config, CHOICES)
    check_positive(config, POSITIVE)
    check_seed_and_length(config)
    fields = flatten(config)
    for name in FRACTIONS:
        if not 0 <= fields[name] < 1:
            raise UsageError(f"{name}={fields[name]} is not a fraction of at least 0 and below 1")
    for name in NOT_NEGATIVE:
        if fields[name] < 0:
            raise UsageError(f"{name}={fields[name]} is negative")
    check_moments(config.optimizer.beta1, config.optimizer.beta2, config.optimizer.moment_dtype)
    _check_model(config.model, mesh)
    channels = config.model.embed_dim // config.model.num_heads
    if config.model.attention == "cudnn" and not cudnn_applies(mesh.devices.flat[0], config.dtype, channels):
        raise UsageError(
            "model.attention=cudnn is for NVIDIA GPUs of compute capability 8 and more, dtype=bfloat16 and heads of at "
            "most 128 channels, a multiple of 8; use auto"
        )
    check_batch(config.data.batch_size, mesh, config.train.grad_accum_steps, "data.batch_size")
    check_batch(config.evaluate.batch_size, mesh, 1, "evaluate.batch_size")
    sample = config.sample
    Guidance(sample.cfg_scale)
    LogitFilter(sample.top_k, sample.top_p)
    if sample.temperature < 0:
        raise UsageError(f"sample.temperature={sample.temperature} is negative; 0 takes the most likely code")


def _check_model(model: ConfigDict, mesh: Mesh) -> None:
    grid = model.grid
    if len(grid) != 2 or not all(isinstance(side, int) and side > 0 for side in grid) or grid == (1, 1):
        raise UsageError(f"model.grid={grid} is not the rows and columns of an image's codes, such as (16, 16)")
    if model.num_classes < 0:
        raise UsageError(f"model.num_classes={model.num_classes} is negative; 0 is for a data set without classes")
    if model.use_pretrained_codebook and model.codebook_dim <= 0:
        raise UsageError(f"model.codebook_dim={model.codebook_dim} is not positive")
    check_layout(model.embed_dim, model.num_heads, model.num_kv_heads)
    if model.vocab_size % mesh.shape["codebook"]:
        raise UsageError(
            f"model.vocab_size={model.vocab_size} does not divide over mesh.codebook={mesh.shape['codebook']}"
        )
