"""Config files, command-line overrides, and the config that a run leaves behind.

A config is an `ml_collections.ConfigDict` from a Python file's `get_config(preset)`. Config files are Python and run
when they are loaded, by design: load only files you trust. A saved config is JSON and runs nothing.
"""

import ast
import difflib
import importlib.util
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from ml_collections import ConfigDict

from ibq_jax.base.errors import UsageError
from ibq_jax.base.json_files import read_json

PREFIX = "--config."
MAX_DEPTH = 10  # of groups in groups
LONGEST_SHOWN = 80  # characters of a foreign name in a message
ADDED_FIELDS = {  # that configs saved by earlier versions lack, with what was done then
    "quantizer": {"name": "ibq", "double_loss": True, "l2_normalize": False, "levels": ()},
    "codebook": {"init_scale": 1.0},
}
POSITIVE = (  # in every stage
    "data.batch_size",
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


def load_config(spec: str, overrides: Iterable[str] = ()) -> ConfigDict:
    """The config of `FILE.py:PRESET` with `--config.a.b=value` overrides applied; locked.

    Raises UsageError for a missing file, an unknown preset, a misspelt field (with the nearest right one) or a value of
    another type than the field's.
    """
    file, _, preset = spec.partition(":")
    if not Path(file).is_file():
        raise UsageError(f"--config={spec}: there is no file {file}")
    module = run_file(Path(file))
    if preset not in module.PRESETS:
        near = difflib.get_close_matches(preset, module.PRESETS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UsageError(
            f"--config={spec}: {file} has no preset {preset!r}; {hint}presets: {', '.join(module.PRESETS)}"
        )
    config = module.get_config(preset)
    for override in overrides:
        _apply(config, override)
    return config.lock()


def preset_names(file: str) -> tuple[str, ...]:
    """The presets of a config file."""
    return run_file(Path(file)).PRESETS


def run_file(path: Path):
    """The module that a Python file makes."""
    module_spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    return module


def _apply(config: ConfigDict, override: str) -> None:
    name, equals, text = override.removeprefix(PREFIX).partition("=")
    if not equals:
        raise UsageError(f"{override}: write {PREFIX}{name}=VALUE")
    fields = flatten(config)
    if name not in fields:
        near = difflib.get_close_matches(name, fields, n=1, cutoff=0.5)
        inside = [field for field in fields if field.startswith(name + ".")]
        hint = (
            f"it is a group: {', '.join(inside)}" if inside else f"did you mean {near[0]}?" if near else "see configs/"
        )
        raise UsageError(f"{override}: the config has no field {name!r}; {hint}")
    value = _parse(text, fields[name])
    if value is None:
        kind = type(fields[name]).__name__
        raise UsageError(f"{override}: {name} is of type {kind} (such as {fields[name]!r}), which {text!r} is not")
    *groups, leaf = name.split(".")
    for group in groups:
        config = config[group]
    config[leaf] = value


def _parse(text: str, like):
    """`text` as a value of the type of `like`, or None where it is none."""
    if isinstance(like, str):
        return text
    if isinstance(like, bool):
        return {"true": True, "false": False}.get(text.lower())
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return None
    if isinstance(value, bool):
        return None
    if isinstance(like, tuple):
        value = value if isinstance(value, tuple | list) else (value,)
        return tuple(value) if all(isinstance(item, int | float) for item in value) else None
    if isinstance(like, float) and isinstance(value, int):
        return float(value)
    return value if type(value) is type(like) else None


def flatten(config: Mapping, prefix: str = "") -> dict[str, object]:
    """{"a.b": value} of every field; lists (as JSON has them) become tuples."""
    fields = {}
    for name, value in config.items():
        if isinstance(value, Mapping | ConfigDict):
            fields |= flatten(value, f"{prefix}{name}.")
        else:
            fields[prefix + name] = tuple(value) if isinstance(value, list) else value
    return fields


def save_config(config: ConfigDict, path: Path) -> None:
    """Writes JSON beside its final name first, so that a kill leaves the old file or the new one."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(config.to_dict(), indent=2) + "\n")
    partial.replace(path)


def read_config(path: Path) -> ConfigDict:
    """The config that a run saved. Raises UsageError when it is missing, no JSON object, or has no config's names."""
    try:
        fields = read_json(path)
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist; a run's folder holds config.json") from None
    except ValueError as error:
        raise UsageError(f"{path} is not a saved config: {error}") from None
    if not isinstance(fields, dict):
        raise UsageError(f"{path} is not a saved config: it holds no JSON object")
    _check_names(fields, path)
    for group, added in ADDED_FIELDS.items():
        if isinstance(fields.get(group), dict):
            fields[group] = added | fields[group]
    return ConfigDict(_tuples(fields)).lock()


def _check_names(fields: dict, path: Path, depth: int = 0) -> None:
    """Every field is an attribute of a ConfigDict, which has methods already and takes names apart at their dots."""
    for name, value in fields.items():
        if not name.isidentifier() or name.startswith("__") or hasattr(ConfigDict, name) or depth > MAX_DEPTH:
            raise UsageError(f"{path} is not a saved config: it cannot have a field {name[:LONGEST_SHOWN]!r}")
        if isinstance(value, dict):
            _check_names(value, path, depth + 1)


def _tuples(value):
    if isinstance(value, dict):
        return {name: _tuples(item) for name, item in value.items()}
    return tuple(value) if isinstance(value, list) else value


def differences(old: Mapping, new: Mapping, ignore: tuple[str, ...] = ()) -> list[str]:
    """`name: old -> new` for every field that differs, apart from those that start with one of `ignore`."""
    old, new = flatten(old), flatten(new)
    return [
        f"{name}: {old.get(name, 'absent')!r} -> {new.get(name, 'absent')!r}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name) and not name.startswith(ignore)
    ]


def check_choices(config: Mapping, choices: Mapping[str, tuple]) -> None:
    """Raises UsageError for a field, under its dotted name, that is none of its `choices`."""
    fields = flatten(config)
    for name, allowed in choices.items():
        if fields[name] not in allowed:
            raise UsageError(f"{name}={fields[name]} is not one of {', '.join(allowed)}")


def check_positive(config: Mapping, names: Iterable[str]) -> None:
    """Raises UsageError for a field of `names`, or of those of every stage, that is not positive."""
    fields = flatten(config)
    for name in (*names, *POSITIVE):
        if fields[name] <= 0:
            raise UsageError(f"{name}={fields[name]} is not positive")


def check_seed_and_length(config: ConfigDict) -> None:
    """Raises UsageError for a seed that is none, and for a run without steps."""
    if not 0 <= config.seed < 2**32:
        raise UsageError(f"seed={config.seed} is not in 0..2**32 - 1")
    if config.train.steps <= 0 and config.train.epochs <= 0:
        raise UsageError("train.steps and train.epochs are both 0; set one")
