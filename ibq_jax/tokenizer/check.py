"""Checks a tokenizer's config before anything is written or computed."""

from jax.sharding import Mesh
from ml_collections import ConfigDict

from ibq_jax.base.config import check_choices, check_positive, check_seed_and_length
from ibq_jax.base.errors import UsageError
from ibq_jax.base.precision import PRECISIONS
from ibq_jax.base.sharding import check_batch
from ibq_jax.tokenizer.autoencoder import NORM_GROUPS
from ibq_jax.tokenizer.model import downsampling, latent_dim
from ibq_jax.tokenizer.parts import PARTS, frozen_parts
from ibq_jax.tokenizer.quantizers import QUANTIZERS, WITH_ENTROPY, check_settings

CHOICES = {
    "dtype": ("float32", "bfloat16"),
    "codebook.implementation": ("streamed", "dense"),
    "model.remat": ("none", "blocks"),
    "quantizer.name": tuple(QUANTIZERS),
    "quantizer.beta_on": ("codebook", "commitment"),
    "quantizer.precision": PRECISIONS,
    "quantizer.gradient_precision": PRECISIONS,
    "encode.precision": PRECISIONS,
}
POSITIVE = (
    "data.image_size",
    "model.channels",
    "model.num_res_blocks",
    "model.z_channels",
    "codebook.size",
    "codebook.dim",
    "codebook.init_scale",
    "quantizer.entropy_temperature",
    "quantizer.logit_temperature",
)


def check_config(config: ConfigDict, mesh: Mesh) -> None:
    """Raises UsageError for values out of range, and for fields that contradict each other or the mesh."""
    check_choices(config, CHOICES)
    check_positive(config, POSITIVE)
    check_seed_and_length(config)
    _check_images(config)
    _check_batch(config, mesh)
    _check_codebook(config, mesh)
    _check_finetuning(config)


def _check_images(config: ConfigDict) -> None:
    data, factor, channels = config.data, downsampling(config), config.model.channels
    if data.image_size % factor:
        near = max(1, round(data.image_size / factor)) * factor
        raise UsageError(
            f"data.image_size={data.image_size} is not a multiple of the downsampling {factor}; try {near}"
        )
    if data.resize < data.image_size:
        raise UsageError(f"data.resize={data.resize} is smaller than data.image_size={data.image_size}; no crop fits")
    if channels % NORM_GROUPS:
        raise UsageError(f"model.channels={channels} is not a multiple of {NORM_GROUPS}, the number of norm groups")


def _check_batch(config: ConfigDict, mesh: Mesh) -> None:
    check_batch(config.data.batch_size, mesh, config.train.grad_accum_steps, "data.batch_size")
    micro = config.data.batch_size // config.train.grad_accum_steps
    tokens = micro * (config.data.image_size // downsampling(config)) ** 2
    entropy_group, norm_group = config.quantizer.entropy_group_tokens, config.discriminator.norm_group
    if config.quantizer.name in WITH_ENTROPY and entropy_group and tokens % entropy_group:
        raise UsageError(
            f"quantizer.entropy_group_tokens={entropy_group} does not divide the {tokens} tokens of a micro-batch"
        )
    if config.loss.adversarial_weight and norm_group and micro % norm_group:
        raise UsageError(f"discriminator.norm_group={norm_group} does not divide the micro-batch of {micro} images")


def _check_codebook(config: ConfigDict, mesh: Mesh) -> None:
    check_settings(config.quantizer.name, config.quantizer)
    latent_dim(config)  # raises UsageError for sizes that the quantizer cannot have
    codebook, parts = config.codebook, mesh.shape["codebook"]
    block = codebook.block_size or 1
    if codebook.size % parts or codebook.size // parts % block:
        raise UsageError(
            f"codebook.size={codebook.size} does not divide over mesh.codebook={parts} "
            f"in blocks of codebook.block_size={codebook.block_size}"
        )


def _check_finetuning(config: ConfigDict) -> None:
    frozen, finetune = frozen_parts(config), config.finetune
    if finetune.discriminator_warmup_steps < 0:
        raise UsageError(f"finetune.discriminator_warmup_steps={finetune.discriminator_warmup_steps} is negative")
    if finetune.discriminator_warmup_steps and not config.loss.adversarial_weight:
        raise UsageError("finetune.discriminator_warmup_steps needs a discriminator, and loss.adversarial_weight is 0")
    for part in PARTS:
        rate = finetune[f"{part}_rate"]
        if rate < 0 or (not rate and part not in frozen):
            raise UsageError(f"finetune.{part}_rate={rate} is not positive; finetune.freeze={part} leaves it as it is")
