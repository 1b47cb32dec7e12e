"""Checks a tokenizer's config before anything is written or computed."""

from jax.sharding import Mesh
from ml_collections import ConfigDict

from ibq_jax.base.config import check_choices, check_positive, check_seed_and_length, flatten
from ibq_jax.base.errors import UsageError
from ibq_jax.base.precision import PRECISIONS
from ibq_jax.base.sharding import check_batch
from ibq_jax.base.state import check_moments
from ibq_jax.pretrained.frozen_nets import CLASSIFIERS, NETS, TRANSFORMERS
from ibq_jax.tokenizer.autoencoder import NORM_GROUPS
from ibq_jax.tokenizer.diff_augment import augmentations
from ibq_jax.tokenizer.discriminators import DISCRIMINATORS, NONE, frozen_net, has_discriminator
from ibq_jax.tokenizer.feature_discriminator import MAPS, TOKENS
from ibq_jax.tokenizer.losses import ADVERSARIAL_LOSSES, DISCRIMINATOR_LOSSES
from ibq_jax.tokenizer.model import downsampling, latent_dim
from ibq_jax.tokenizer.parts import PARTS, frozen_parts
from ibq_jax.tokenizer.quantizers import QUANTIZERS, check_settings, has_entropy_loss

CHOICES = {
    "dtype": ("float32", "bfloat16"),
    "codebook.implementation": ("streamed", "dense"),
    "model.remat": ("none", "blocks"),
    "quantizer.name": tuple(QUANTIZERS),
    "quantizer.beta_on": ("codebook", "commitment"),
    "quantizer.entropy_logits": ("own", "dot", "distance"),
    "quantizer.precision": PRECISIONS,
    "quantizer.gradient_precision": PRECISIONS,
    "encode.precision": PRECISIONS,
    "discriminator.name": (*DISCRIMINATORS, NONE),
    "discriminator.loss": tuple(DISCRIMINATOR_LOSSES),
    "discriminator.net": tuple(NETS),
    "discriminator.heads": (MAPS, TOKENS),
    "optimizer.moment_dtype": ("float32", "bfloat16"),
    "loss.adversarial": tuple(ADVERSARIAL_LOSSES),
    "loss.features_net": tuple(NETS),
    "loss.logits_net": CLASSIFIERS,
    "alignment.net": tuple(NETS),
    "alignment.of": ("latents", "decoder"),
}
POSITIVE = (
    "data.image_size",
    "model.channels",
    "model.z_channels",
    "codebook.size",
    "codebook.dim",
    "quantizer.entropy_temperature",
    "quantizer.logit_temperature",
    "discriminator.channels",
    "discriminator.r1_every",
)
NOT_NEGATIVE = (
    "codebook.init_scale",
    "model.num_res_blocks",
    "discriminator.ramp_steps",
    "discriminator.r1_weight",
    "discriminator.net_side",
    "loss.features_weight",
    "loss.logits_weight",
    "loss.adaptive_limit",
    "alignment.weight",
    "alignment.adaptive_limit",
    "optimizer.weight_decay",
)


def check_config(config: ConfigDict, mesh: Mesh) -> None:
    """Raises UsageError for values out of range, and for fields that contradict each other or the mesh."""
    check_choices(config, CHOICES)
    check_positive(config, POSITIVE)
    _check_not_negative(config)
    check_seed_and_length(config)
    _check_images(config)
    _check_batch(config, mesh)
    _check_codebook(config, mesh)
    _check_finetuning(config)
    check_moments(config.optimizer.beta1, config.optimizer.beta2, config.optimizer.moment_dtype)
    augmentations(config.discriminator.augment)  # raises UsageError for an unknown one
    _check_crops(config)
    _check_heads(config)
    _check_alignment(config)


def _check_not_negative(config: ConfigDict) -> None:
    fields = flatten(config)
    for name in NOT_NEGATIVE:
        if fields[name] < 0:
            raise UsageError(f"{name}={fields[name]} is negative; it must be at least 0")


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
    multipliers = config.model.channel_multipliers
    if config.model.num_res_blocks == 0 and set(multipliers) != {1}:
        raise UsageError(
            "model.num_res_blocks=0 leaves no block in which the channels could change, and "
            f"model.channel_multipliers={multipliers} asks for it; write num_res_blocks=1, or multipliers of 1"
        )


def _check_batch(config: ConfigDict, mesh: Mesh) -> None:
    check_batch(config.data.batch_size, mesh, config.train.grad_accum_steps, "data.batch_size")
    micro = config.data.batch_size // config.train.grad_accum_steps
    tokens = micro * (config.data.image_size // downsampling(config)) ** 2
    entropy_group, norm_group = config.quantizer.entropy_group_tokens, config.discriminator.norm_group
    if has_entropy_loss(config.quantizer) and entropy_group and tokens % entropy_group:
        raise UsageError(
            f"quantizer.entropy_group_tokens={entropy_group} does not divide the {tokens} tokens of a micro-batch"
        )
    if has_discriminator(config) and norm_group and micro % norm_group:
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
    if finetune.discriminator_warmup_steps and not has_discriminator(config):
        why = "discriminator.name is none" if config.loss.adversarial_weight else "loss.adversarial_weight is 0"
        raise UsageError(f"finetune.discriminator_warmup_steps needs a discriminator, and {why}")
    for part in PARTS:
        rate = finetune[f"{part}_rate"]
        if rate < 0 or (not rate and part not in frozen):
            raise UsageError(f"finetune.{part}_rate={rate} is not positive; finetune.freeze={part} leaves it as it is")


def _check_crops(config: ConfigDict) -> None:
    settings, size = config.discriminator, config.data.image_size
    if not 0 <= settings.crop_probability <= 1:
        raise UsageError(f"discriminator.crop_probability={settings.crop_probability} is not in 0..1; 0: no crops")
    if settings.crop_probability and frozen_net(config) is None:
        raise UsageError(
            f"discriminator.crop_probability={settings.crop_probability} is for discriminator.name=dino, not for "
            f"{settings.name}; set it to 0"
        )
    if settings.crop_probability and not 0 < settings.net_side < size:
        raise UsageError(
            f"discriminator.crop_probability={settings.crop_probability} needs images larger than the pieces that are "
            f"looked at; data.image_size={size}, discriminator.net_side={settings.net_side}"
        )


def _check_heads(config: ConfigDict) -> None:
    net = frozen_net(config)
    if net is not None and config.discriminator.heads == TOKENS and net not in TRANSFORMERS:
        raise UsageError(
            f"discriminator.heads={TOKENS} reads the tokens of a vision transformer, and discriminator.net={net} has "
            f"none; choose one of {', '.join(TRANSFORMERS)}, or discriminator.heads={MAPS}"
        )


def _check_alignment(config: ConfigDict) -> None:
    settings = config.alignment
    if not settings.weight:
        return
    part = {"latents": "encoder", "decoder": "decoder"}[settings.of]
    if part in frozen_parts(config):
        raise UsageError(
            f"alignment.of={settings.of} trains the {part}, which finetune.freeze={config.finetune.freeze} "
            "leaves as it is; set alignment.weight=0"
        )
    if settings.adaptive_limit and settings.of != "latents":
        raise UsageError(
            f"alignment.adaptive_limit={settings.adaptive_limit} compares gradients at the encoder's last layer and "
            f"needs alignment.of=latents; with alignment.of={settings.of} set it to 0"
        )
