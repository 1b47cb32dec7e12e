"""The tokenizer's parts, which can be loaded by themselves, and frozen or trained at rates of their own.

A part is named as in the config's group `finetune`; it consists of some of the modules at the top of the parameters.
"""

from collections.abc import Mapping

import jax
import optax
from ml_collections import ConfigDict

from ibq_jax.base.errors import UsageError

PARTS = {
    "encoder": ("encoder", "quant_conv"),
    "codebook": ("quantize",),
    "decoder": ("post_quant_conv", "decoder"),
}
ALL = tuple(PARTS)
DECIDING = ("encoder", "codebook")  # the parts that decide which codes an image gets
DECODING = ("codebook", "decoder")  # the parts that decide which image codes stand for


def frozen_parts(config: ConfigDict) -> tuple[str, ...]:
    """Returns the parts that finetune.freeze names. Raises UsageError for an unknown part, or if all are named."""
    names = tuple(name.strip() for name in config.finetune.freeze.split(",") if name.strip())
    check_parts(names, f"finetune.freeze={config.finetune.freeze}")
    if set(names) == set(PARTS):
        raise UsageError(f"finetune.freeze={config.finetune.freeze} leaves nothing to train; {_known()}")
    return names


def keeps_codes(config: ConfigDict) -> bool:
    """Returns whether training leaves the codes of every image as they are."""
    return set(DECIDING) <= set(frozen_parts(config))


def check_parts(parts: tuple[str, ...], setting: str) -> None:
    """Raises UsageError unless all of `parts` are names of parts; `setting` is what named them, as NAME=VALUE."""
    for name in parts:
        if name not in PARTS:
            raise UsageError(f"{setting}: there is no part {name!r}; {_known()}")


def modules_of(parts: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the modules of some parts."""
    return tuple(module for part in parts for module in PARTS[part])


def without(params: Mapping, modules: tuple[str, ...]) -> dict:
    """Returns the parameters of all modules but some."""
    return {name: leaves for name, leaves in params.items() if name not in modules}


def only(params: Mapping, modules: tuple[str, ...]) -> dict:
    """Returns the parameters of some modules."""
    return {name: leaves for name, leaves in params.items() if name in modules}


def learning_rates(config: ConfigDict) -> dict[str, float]:
    """Returns what multiplies the learning rate of each module of a part; that of others is not multiplied."""
    return {module: config.finetune[f"{part}_rate"] for part, modules in PARTS.items() for module in modules}


def at_rates(optimizer: optax.GradientTransformation, rates: Mapping[str, float]) -> optax.GradientTransformation:
    """Returns an optimizer whose steps are multiplied by a number for each module; its state is that of `optimizer`."""

    def scaled(path, leaf: jax.Array) -> jax.Array:
        return rates.get(jax.tree_util.keystr(path[:1], simple=True), 1.0) * leaf

    def update(updates, state, params=None):
        updates, state = optimizer.update(updates, state, params)
        return jax.tree_util.tree_map_with_path(scaled, updates), state

    return optax.GradientTransformation(optimizer.init, update)


def _known() -> str:
    return f"the parts are {', '.join(PARTS)}"
