"""A joint config's two parts, as configs of the stages that they belong to.

A joint config has the fields of the run at its top; all others are in its groups `tokenizer` and `generator`. A part is
that group and the fields of the run: it has exactly the fields of that stage's config, and every function of the stage
takes it.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from ml_collections import ConfigDict

from ibq_jax.autoregressive.token_sizes import resolve_model
from ibq_jax.base.config import flatten, nested
from ibq_jax.base.errors import UsageError
from ibq_jax.base.loop import TrainingStopped
from ibq_jax.tokenizer.model import downsampling

GROUPS = ("stage", "joint", "tokenizer", "generator")  # of a joint config; all others are of the run


def tokenizer_part(config: ConfigDict) -> ConfigDict:
    """Returns the tokenizer's config, as one of configs/tokenizer.py."""
    return _part(config, "tokenizer", {"stage": "tokenizer"})


def generator_part(config: ConfigDict) -> ConfigDict:
    """Returns the generator's config, as one of configs/autoregressive.py; it names no token cache and no tokenizer."""
    return _part(config, "generator", {"stage": "autoregressive", "token_cache": "", "tokenizer": ""})


def _part(config: ConfigDict, name: str, filled_in: Mapping[str, str]) -> ConfigDict:
    run = {group: value for group, value in config.to_dict().items() if group not in GROUPS}
    return ConfigDict(nested({**filled_in, **flatten(run), **flatten(config[name])})).lock()


@contextmanager
def naming_fields_of(group: str, config: ConfigDict) -> Iterator[None]:
    """Within it, errors about the part `group` name its fields as the joint config does: tokenizer.codebook.size.

    The errors are UsageError and TrainingStopped. Fields of the run keep their names.
    """
    try:
        yield
    except (UsageError, TrainingStopped) as error:
        raise type(error)(_with_group(str(error), group, flatten(config[group]))) from error


def _with_group(message: str, group: str, fields: Mapping[str, object]) -> str:
    """Returns a message in which `group` stands before each of the `fields`; a word alone is one before "=" only."""

    def name_whole(found: re.Match) -> str:
        name, follows = found[0], message[found.end() : found.end() + 1]
        return f"{group}.{name}" if name in fields and ("." in name or follows == "=") else name

    return re.sub(r"(?<![\w./$-])\w+(?:\.\w+)*", name_whole, message)


def resolve(config: ConfigDict, sizes: Mapping[str, object]) -> ConfigDict:
    """Returns a joint config whose generator has the tokenizer's vocabulary and grid; it stays locked.

    Args:
        config: a joint config.
        sizes: {"num_classes": of the data set}; it may be empty if the config says it.

    Raises:
        UsageError: the config states another size than follows, or the number of classes is not known.
    """
    part = tokenizer_part(config)
    side = part.data.image_size // downsampling(part)
    sizes = {"vocab_size": part.codebook.size, "grid": (side, side), **sizes}
    if "num_classes" not in sizes and config.generator.model.num_classes < 0:
        raise UsageError("generator.model.num_classes=-1 means as in the data set; without one, set it")
    with naming_fields_of("generator", config):
        model = resolve_model(generator_part(config), sizes).model
    for name, size in sizes.items():
        if model[name] != size:
            raise UsageError(f"generator.model.{name}={model[name]}, but tokenizer and data set have {size}")
    resolved = ConfigDict(config.to_dict())
    resolved.generator.model = model
    return resolved.lock()
