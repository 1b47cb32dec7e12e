"""Checks a joint config before anything is written or computed."""

from jax.sharding import Mesh
from ml_collections import ConfigDict

from ibq_jax.autoregressive.check import check_config as check_generator
from ibq_jax.base.config import check_choices
from ibq_jax.base.errors import UsageError
from ibq_jax.joint.hidden_alignment import POSITIONS
from ibq_jax.joint.parts import generator_part, naming_fields_of, tokenizer_part
from ibq_jax.pretrained.frozen_nets import NETS
from ibq_jax.tokenizer.check import check_config as check_tokenizer

CHOICES = {"joint.hidden_alignment.net": tuple(NETS), "joint.hidden_alignment.position": POSITIONS}


def check_config(config: ConfigDict, mesh: Mesh) -> None:
    """Raises UsageError for values out of range, and for fields that contradict each other or the mesh.

    The config is resolved (`ibq_jax.joint.parts.resolve`).
    """
    _check_joint(config)
    with naming_fields_of("tokenizer", config):
        check_tokenizer(tokenizer_part(config), mesh)
    with naming_fields_of("generator", config):
        check_generator(generator_part(config), mesh)
    _check_hidden_alignment(config)


def _check_joint(config: ConfigDict) -> None:
    joint, quantizer = config.joint, config.tokenizer.quantizer.name
    if joint.next_token_weight <= 0:
        raise UsageError(
            f"joint.next_token_weight={joint.next_token_weight} is not positive; joint.next_token_gradient=False keeps "
            "the next-token loss from the tokenizer"
        )
    if joint.prediction_weight < 0:
        raise UsageError(f"joint.prediction_weight={joint.prediction_weight} is negative; 0 switches it off")
    if quantizer != "ibq" and (joint.next_token_gradient or joint.prediction_weight):
        raise UsageError(
            "joint.next_token_gradient and joint.prediction_weight need tokenizer.quantizer.name=ibq; with "
            f"{quantizer} set them to False and 0"
        )
    if config.generator.model.use_pretrained_codebook:
        raise UsageError(
            "generator.model.use_pretrained_codebook=True is for stage two, whose codebook stays as it is; the joint "
            "stage needs False"
        )


def _check_hidden_alignment(config: ConfigDict) -> None:
    check_choices(config, CHOICES)
    settings, layers = config.joint.hidden_alignment, config.generator.model.num_layers
    for name in ("temperature", "projector_channels"):
        if settings[name] <= 0:
            raise UsageError(f"joint.hidden_alignment.{name}={settings[name]} is not positive")
    if settings.weight < 0:
        raise UsageError(f"joint.hidden_alignment.weight={settings.weight} is negative; 0 switches it off")
    if not 0 <= settings.layer <= layers:
        raise UsageError(
            f"joint.hidden_alignment.layer={settings.layer} is not one of the generator's layers, 1 to {layers}; "
            "0 stands for a third of them"
        )
    quantizer = config.tokenizer.quantizer.name
    if settings.weight and settings.gradient and quantizer != "ibq":
        raise UsageError(
            f"joint.hidden_alignment.gradient needs tokenizer.quantizer.name=ibq; with {quantizer} set it to False"
        )
