"""Takes a generator's vocabulary, grid and number of classes from the token cache, and they need not be typed again.

In a config, `model.vocab_size`, `model.grid` and `model.num_classes` have the values of `FROM_CACHE` until
`resolve_model` fills them in; the config that a run saves is filled in. Given values must agree with the cache.
"""

from collections.abc import Iterable, Mapping

from ml_collections import ConfigDict

from ibq_jax.base.config import flatten, load_config, preset_module
from ibq_jax.base.errors import UsageError
from ibq_jax.data.token_cache import TokenCacheSplit

FROM_CACHE = {"vocab_size": 0, "grid": (), "num_classes": -1}


def cache_sizes(source: TokenCacheSplit) -> dict[str, object]:
    """Returns the fields of `FROM_CACHE` as a token cache has them."""
    return {"vocab_size": source.codebook_size, "grid": source.grid, "num_classes": source.num_classes}


def preset_sizes(spec: str) -> dict[str, object]:
    """Returns the fields of `FROM_CACHE` that the preset `FILE.py:PRESET` is meant for, to use without a token cache.

    They are those of `expected_sizes(preset)` in the config file; none if it has no such function.
    """
    module, preset = preset_module(spec)
    return module.expected_sizes(preset) if hasattr(module, "expected_sizes") else {}


def load_preset(spec: str, overrides: Iterable[str] = ()) -> ConfigDict:
    """Returns what `load_config` does, resolved with the sizes that the preset is meant for; no token cache is read."""
    return resolve_model(load_config(spec, overrides), preset_sizes(spec))


def resolve_model(config: ConfigDict, sizes: Mapping[str, object]) -> ConfigDict:
    """Returns `config` with the fields that it leaves to the token cache replaced by `sizes`; it stays locked.

    Raises UsageError if `sizes` lacks one that is needed.
    """
    resolved = ConfigDict(config.to_dict())
    for name, unknown in FROM_CACHE.items():
        if resolved.model[name] == unknown:
            if name not in sizes:
                raise UsageError(f"model.{name}={unknown} means as in the token cache; without one, set model.{name}")
            resolved.model[name] = sizes[name]
    return resolved.lock()


def open_sizes(config: ConfigDict) -> tuple[str, ...]:
    """Returns the names of the fields that a config of any stage leaves open, and that training fills in."""
    fields = flatten(config)
    unknown = {f"{group}model.{name}": value for group in ("", "generator.") for name, value in FROM_CACHE.items()}
    return tuple(name for name, value in unknown.items() if name in fields and fields[name] == value)


def check_fit(config: ConfigDict, source: TokenCacheSplit) -> None:
    """Checks that a generator's resolved config fits the codes of `source`. Raises UsageError if it does not."""
    differing = [
        f"model.{name}={config.model[name]}, the token cache has {size}"
        for name, size in cache_sizes(source).items()
        if config.model[name] != size
    ]
    if differing:
        raise UsageError(
            f"{source} does not fit the config: {'; '.join(differing)}; "
            "a new run takes from its cache what is not given"
        )
    if config.model.num_classes and not config.loss.class_dropout:
        for split, counts in source.manifest["splits"].items():
            if unlabelled := counts["images"] - sum(counts["labels"]):
                raise UsageError(
                    f"{unlabelled:,} images of the split {split} of {source.path} are of none of its classes; a "
                    "generator learns to do without a class only where loss.class_dropout is over 0"
                )
