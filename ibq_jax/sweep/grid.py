"""The grid of a sweep: the product of the values of its fields, from flags or a study file, as named points."""

import difflib
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ml_collections import ConfigDict

from ibq_jax.base.config import PREFIX, flatten, load_config, run_file
from ibq_jax.base.errors import UsageError

SEED = "seed"  # the config's field
CONSTANTS = ("CONFIG", "OVER", "SEEDS", "OVERRIDES")  # that a study may define


@dataclass(frozen=True)
class Point:
    """One run of a sweep.

    Attributes:
        index: its position in the sweep.
        name: of its folder.
        values: of the swept fields.
        config: the resolved config.
        overrides: the arguments of `train` that make this config.
    """

    index: int
    name: str
    values: Mapping[str, object]
    config: ConfigDict
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Grid:
    """A grid of configs.

    Attributes:
        spec: the config, FILE.py:PRESET.
        over: the values of each swept field, as text.
        seeds: every combination is trained with the seeds 0 to seeds - 1.
        overrides: arguments that override fields in every point.
    """

    spec: str
    over: Mapping[str, Sequence[str]]
    seeds: int = 1
    overrides: tuple[str, ...] = ()

    def points(self) -> list[Point]:
        """Returns the points, with the seed varying fastest.

        Raises:
            UsageError: the config has no such field, or refuses a value.
        """
        self._check(flatten(load_config(self.spec, self.overrides)))
        points: list[Point] = []
        for typed in itertools.product(*self.over.values()):
            swept = [f"{PREFIX}{name}={text}" for name, text in zip(self.over, typed, strict=True)]
            for seed in range(self.seeds):
                overrides = (*self.overrides, *swept, f"{PREFIX}{SEED}={seed}")
                try:
                    config = load_config(self.spec, overrides)
                except UsageError as error:
                    raise UsageError(str(error).replace(PREFIX, "--over ", 1)) from None
                fields = flatten(config)
                values = {name: fields[name] for name in self.over}
                name = _name(values, seed)
                if any(point.name == name for point in points):
                    raise UsageError(f"--over: two points would have the folder {name}; give every value once")
                points.append(Point(len(points), name, values, config, overrides))
        return points

    def _check(self, fields: Mapping[str, object]) -> None:
        overridden = {override.removeprefix(PREFIX).partition("=")[0] for override in self.overrides}
        if SEED in self.over or SEED in overridden:
            raise UsageError("seed is swept by --seeds=N, which trains the seeds 0 to N - 1")
        if not self.over and self.seeds == 1:
            raise UsageError("nothing is swept; give --over FIELD=VALUE,VALUE or --seeds=N")
        for name in overridden & self.over.keys():
            raise UsageError(f"{name} is both swept and overridden")
        for name, texts in self.over.items():
            if not texts:
                raise UsageError(
                    f"--over {name}=: there is no value; write for example {name}={fields.get(name, 'VALUE')}"
                )


def read_study(path: str) -> Grid:
    """Returns the grid that a Python file defines.

    Args:
        path: a file that defines CONFIG = "FILE.py:PRESET", OVER = {field: values} and optionally SEEDS = 3 and
            OVERRIDES = {field: value}. Reading runs it, as with config files.

    Raises:
        UsageError: a constant is missing, misspelt or of the wrong type.
    """
    if not Path(path).is_file():
        raise UsageError(f"--study={path}: the file does not exist")
    stated = {name: value for name, value in vars(run_file(Path(path))).items() if name.isupper()}
    for name in stated.keys() - set(CONSTANTS):
        near = difflib.get_close_matches(name, CONSTANTS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"it may define {', '.join(CONSTANTS)}"
        raise UsageError(f"--study={path}: a study has no {name}; {hint}")
    kinds = {"CONFIG": str, "OVER": Mapping, "SEEDS": int, "OVERRIDES": Mapping}
    stated = {"SEEDS": 1, "OVERRIDES": {}} | stated
    for name, kind in kinds.items():
        if not isinstance(stated.get(name), kind):
            raise UsageError(f"--study={path}: {name} is missing or not of type {kind.__name__}")
    if stated["SEEDS"] < 1:
        raise UsageError(f"--study={path}: SEEDS={stated['SEEDS']} is not an integer of at least 1")
    for name, values in stated["OVER"].items():
        if not isinstance(values, list | tuple):
            raise UsageError(f"--study={path}: OVER[{name!r}] is not a list of values")
    return Grid(
        spec=stated["CONFIG"],
        over={name: [str(value) for value in values] for name, values in stated["OVER"].items()},
        seeds=stated["SEEDS"],
        overrides=tuple(f"{PREFIX}{name}={value}" for name, value in stated["OVERRIDES"].items()),
    )


def parse_over(texts: Iterable[str]) -> dict[str, list[str]]:
    """Parses FIELD=VALUE,VALUE texts to {field: values}; commas inside brackets do not separate values.

    Raises:
        UsageError: a text has another form, or a field is given twice.
    """
    over: dict[str, list[str]] = {}
    for text in texts:
        name, equals, values = text.partition("=")
        if not (name and equals):
            raise UsageError(f"--over {text}: write --over FIELD=VALUE,VALUE, for example codebook.size=256,1024")
        if name in over:
            raise UsageError(f"--over {text}: {name} is swept twice; separate its values by commas")
        over[name] = _split(values)
    return over


def field_words(values: Mapping[str, object]) -> str:
    """Returns the values of fields in words, such as "size=256, name=ibq"."""
    return ", ".join(f"{label}={values[name]}" for name, label in short_names(list(values)).items())


def short_names(fields: Sequence[str]) -> dict[str, str]:
    """Returns {field: its last part}, or the whole name if several fields end alike: codebook.size -> size."""
    leaves = [field.rpartition(".")[2] for field in fields]
    return {field: leaf if leaves.count(leaf) == 1 else field for field, leaf in zip(fields, leaves, strict=True)}


def _split(text: str) -> list[str]:
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "([") - (letter in ")]")
        if letter == "," and depth <= 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts if text else []


def _name(values: Mapping[str, object], seed: int) -> str:
    """Returns a folder name such as size=256_name=ibq_seed=0.

    It has no comma, since `report --run` splits at them, and no character that a shell interprets.
    """
    labels = short_names([*values, SEED])
    return "_".join(f"{labels[name]}={_safe(value)}" for name, value in {**values, SEED: seed}.items())


def _safe(value: object) -> str:
    words = "x".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return re.sub(r"[^\w.+-]+", "-", words)
