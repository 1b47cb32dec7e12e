"""Config files, command-line overrides, and the config that a run leaves behind.

A config is an `ml_collections.ConfigDict` from a Python file's `get_config(preset)`. Config files are Python and run
when they are loaded, by design: load only files you trust. A saved config is JSON and runs nothing.
"""

import ast
import difflib
import functools
import importlib.util
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from ibq_jax.base.errors import UsageError
from ibq_jax.base.json_files import read_json

PREFIX = "--config."
MAX_DEPTH = 10  # of groups in groups
LONGEST_SHOWN = 80  # characters of a foreign name in a message
PACKAGE = Path(__file__).parents[1]
POSITIVE = (  # in every stage
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

    A shipped file (`configs/tokenizer.py:openmoji32`) is found from any working directory.
    Raises UsageError for a missing file, an unknown preset, a misspelt field (with the nearest right one) or a value of
    another type than the field's.
    """
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
    config = module.get_config(preset)
    stage = flatten(config).get("stage")
    if _renamed(stage).keys() & flatten(config).keys():
        config = ConfigDict(_tuples(upgraded(config.to_dict())))
    for override in overrides:
        _apply(config, override, _renamed(stage))
    return config.lock()


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
    """The file itself, or the shipped file of that name if the path leads nowhere or leaves out the folder."""
    path = Path(name)
    if path.is_file():
        return path
    shipped = preset_folder() / path.with_suffix(".py").name
    return shipped if path.parent.name in ("", "configs") and shipped.is_file() else None


def renamed_leaves(stage: str) -> Mapping[str, str]:
    """Returns {today's beginning of a leaf's name in a state: its beginning in checkpoints of earlier versions}."""
    return _history().RENAMED_LEAVES.get(stage, {})


@functools.cache
def _history():
    """The module of the fields of earlier versions; configs/ owns the names of all fields."""
    return run_file(preset_folder() / "renamed_fields.py")


def _renamed(stage: object) -> Mapping[str, str]:
    return _history().RENAMED.get(str(stage), {})


def upgraded(fields: dict) -> dict:
    """The fields of a config, nested, with the names that earlier versions gave them replaced by today's."""
    stage = fields.get("stage")
    flat = {_renamed(stage).get(name, name): value for name, value in flatten(fields).items()}
    return _nested(_history().ADDED.get(str(stage), {}) | flat)


def overridden_names(overrides: Iterable[str], stage: str) -> set[str]:
    """Returns today's names of the fields that `--config.NAME=VALUE` overrides set."""
    names = (override.removeprefix(PREFIX).partition("=")[0] for override in overrides)
    return {_renamed(stage).get(name, name) for name in names}


def _nested(flat: Mapping[str, object]) -> dict:
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


def flatten(config: Mapping, prefix: str = "") -> dict[str, Any]:
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
    return ConfigDict(_tuples(upgraded(fields))).lock()


def _check_names(fields: dict, path: Path, depth: int = 0) -> None:
    """Every field is an attribute of a ConfigDict, which has methods already and takes names apart at their dots."""
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
