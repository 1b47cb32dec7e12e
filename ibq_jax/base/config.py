"""Config files, command-line overrides, and the config that a run saves.

A config is an `ml_collections.ConfigDict` from a Python file's `get_config(preset)`. Config files are Python code that
runs when they are loaded: load only files you trust. A saved config is JSON and runs nothing. Overrides are parsed
here, not by `ml_collections.config_flags`, so that commands, sweeps and Python callers need no absl flags.
"""

import ast
import difflib
import functools
import importlib.util
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict

from ibq_jax.base.errors import UsageError
from ibq_jax.base.files import write_text
from ibq_jax.base.json_files import read_json

PREFIX = "--config."
MAX_DEPTH = 10  # nested groups
LONGEST_SHOWN = 80  # characters of a foreign field name in a message
PACKAGE = Path(__file__).parents[1]
POSITIVE = (  # fields that every stage has
    "data.batch_size",
    "optimizer.learning_rate",
    "train.grad_accum_steps",
    "log.every",
    "log.images_every",
    "log.num_images",
    "evaluate.every",
    "evaluate.batch_size",
    "checkpoint.every",
    "checkpoint.keep_last",
)


def preset_folder() -> Path:
    """Returns the folder of the shipped config files: configs/ of a checkout, or the copy inside an installed wheel."""
    checkout = PACKAGE.parent / "configs"
    return checkout if (checkout / "renamed_fields.py").is_file() else PACKAGE / "configs"


def load_config(spec: str, overrides: Iterable[str] = ()) -> ConfigDict:
    """Returns the locked config of `FILE.py:PRESET`, with the `--config.a.b=value` overrides applied.

    A shipped file (`configs/tokenizer.py:openmoji32`) is found from any working directory. Field names of earlier
    versions are accepted, in overrides and in the file itself.

    Raises:
        UsageError: a missing file, an unknown preset, an unknown field (the message names the nearest one), or a value
            of another type than the field's.
    """
    module, preset = preset_module(spec)
    config = module.get_config(preset)
    stage = flatten(config).get("stage")
    if _renamed(stage).keys() & flatten(config).keys():
        config = ConfigDict(_tuples(upgraded(config.to_dict())))
    for override in overrides:
        _apply(config, override, _renamed(stage))
    return config.lock()


def preset_module(spec: str) -> tuple[ModuleType, str]:
    """Returns (the file of `FILE.py:PRESET` as a module, the preset's name). Raises UsageError if one is unknown."""
    name, _, preset = spec.partition(":")
    file = _find_config_file(name)
    if file is None:
        raise UsageError(f"--config={spec}: there is no file {name}")
    module = run_file(file)
    if preset not in module.PRESETS:
        near = difflib.get_close_matches(preset, module.PRESETS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UsageError(
            f"--config={spec}: {name} has no preset {preset!r}; {hint}presets: {', '.join(module.PRESETS)}"
        )
    return module, preset


def preset_names(file: str) -> tuple[str, ...]:
    """Returns the names of the presets in a config file."""
    return run_file(Path(file)).PRESETS


def run_file(path: Path):
    """Runs a Python file and returns it as a module."""
    module_spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    if module_spec is None or module_spec.loader is None:
        raise UsageError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    return module


def _find_config_file(name: str) -> Path | None:
    """Returns the file itself, or the shipped file of that name if `name` is `FILE.py`, `FILE` or `configs/FILE.py`."""
    path = Path(name)
    if path.is_file():
        return path
    shipped = preset_folder() / path.with_suffix(".py").name
    return shipped if path.parent.name in ("", "configs") and shipped.is_file() else None


def renamed_leaves(stage: str) -> Mapping[str, str]:
    """Returns {prefix of a leaf's name in a state today: its prefix in checkpoints of earlier versions}."""
    return _history().RENAMED_LEAVES.get(stage, {})


@functools.cache
def _history():
    """Returns the module with the field names of earlier versions, which is in configs/ next to today's names."""
    return run_file(preset_folder() / "renamed_fields.py")


def _renamed(stage: object) -> Mapping[str, str]:
    return _history().RENAMED.get(str(stage), {})


def upgraded(fields: dict) -> dict:
    """Returns a config's nested fields with earlier versions' names replaced and fields that they lacked added."""
    stage = fields.get("stage")
    flat = {_renamed(stage).get(name, name): value for name, value in flatten(fields).items()}
    return nested(_history().ADDED.get(str(stage), {}) | flat)


def overridden_names(overrides: Iterable[str], stage: str) -> set[str]:
    """Returns today's names of the fields that `--config.NAME=VALUE` overrides set."""
    names = (override.removeprefix(PREFIX).partition("=")[0] for override in overrides)
    return {_renamed(stage).get(name, name) for name in names}


def nested(flat: Mapping[str, object]) -> dict:
    """Returns the groups of fields whose dotted names `flatten` returned."""
    fields: dict = {}
    for name, value in flat.items():
        *groups, leaf = name.split(".")
        inner = fields
        for group in groups:
            inner = inner.setdefault(group, {})
        inner[leaf] = value
    return fields


def _apply(config: ConfigDict, override: str, renamed: Mapping[str, str]) -> None:
    name, equals, text = override.removeprefix(PREFIX).partition("=")
    if not equals:
        raise UsageError(f"{override}: write {PREFIX}{name}=VALUE")
    fields = flatten(config)
    name = name if name in fields else renamed.get(name, name)
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
    """Returns `text` as a value of the type of `like`, or None if it is not one."""
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


def flatten(config: Mapping, prefix: str = "") -> dict[str, Any]:
    """Returns {"a.b": value} for every field; lists, which JSON has in place of tuples, become tuples."""
    fields = {}
    for name, value in config.items():
        if isinstance(value, Mapping | ConfigDict):
            fields |= flatten(value, f"{prefix}{name}.")
        else:
            fields[prefix + name] = tuple(value) if isinstance(value, list) else value
    return fields


def save_config(config: ConfigDict, path: Path) -> None:
    """Writes a config as JSON."""
    write_text(path, json.dumps(config.to_dict(), indent=2) + "\n")


def read_config(path: Path) -> ConfigDict:
    """Reads the config that a run saved. Raises UsageError if it is missing, or not a JSON object of config fields."""
    try:
        fields = read_json(path)
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist; a run's folder holds config.json") from None
    except ValueError as error:
        raise UsageError(f"{path} is not a saved config: {error}") from None
    if not isinstance(fields, dict):
        raise UsageError(f"{path} is not a saved config: it is not a JSON object")
    _check_names(fields, path)
    return ConfigDict(_tuples(upgraded(fields))).lock()


def _check_names(fields: dict, path: Path, depth: int = 0) -> None:
    """Raises UsageError for names that cannot be attributes of a ConfigDict, such as its methods' names."""
    for name, value in fields.items():
        if not name.isidentifier() or name.startswith("__") or hasattr(ConfigDict, name) or depth > MAX_DEPTH:
            raise UsageError(f"{path} is not a saved config: it cannot have a field {name[:LONGEST_SHOWN]!r}")
        if isinstance(value, dict):
            _check_names(value, path, depth + 1)


def _tuples(value) -> Any:
    if isinstance(value, dict):
        return {name: _tuples(item) for name, item in value.items()}
    return tuple(value) if isinstance(value, list) else value


def differences(old: Mapping, new: Mapping, ignore: tuple[str, ...] = ()) -> list[str]:
    """Returns `name: old -> new` for every field that differs, except names that start with one of `ignore`."""
    old, new = flatten(old), flatten(new)
    return [
        f"{name}: {old.get(name, 'absent')!r} -> {new.get(name, 'absent')!r}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name) and not name.startswith(ignore)
    ]


def check_choices(config: Mapping, choices: Mapping[str, tuple]) -> None:
    """Raises UsageError unless every field of `choices` (dotted name -> allowed values) has an allowed value."""
    fields = flatten(config)
    for name, allowed in choices.items():
        if fields[name] not in allowed:
            raise UsageError(f"{name}={fields[name]} is not one of {', '.join(allowed)}")


def check_positive(config: Mapping, names: Iterable[str]) -> None:
    """Raises UsageError unless the fields `names`, and those of POSITIVE, are positive."""
    fields = flatten(config)
    for name in (*names, *POSITIVE):
        if fields[name] <= 0:
            raise UsageError(f"{name}={fields[name]} is not positive")


def check_seed_and_length(config: ConfigDict) -> None:
    """Raises UsageError for a seed out of range, and for a run without steps."""
    if not 0 <= config.seed < 2**32:
        raise UsageError(f"seed={config.seed} is not in 0..2**32 - 1")
    if config.train.steps <= 0 and config.train.epochs <= 0:
        raise UsageError("train.steps and train.epochs are both 0; set one")
