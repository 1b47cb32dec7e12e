"""What a sweep consists of: from flags, or from a study's file, to points with names that stay as they are."""

import difflib
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ibq_jax.base.config import PREFIX, flatten, load_config, run_file
from ibq_jax.base.errors import UsageError
from ibq_jax.sweep.results import Point
from ibq_jax.sweep.table import short_names

SEED = "seed"  # the config's field
CONSTANTS = ("CONFIG", "OVER", "SEEDS", "OVERRIDES")  # of a study


@dataclass(frozen=True)
class Grid:
    """`spec`: FILE.py:PRESET; `over`: the values of each swept field, as typed; `overrides`: of every point."""

    spec: str
    over: Mapping[str, Sequence[str]]
    seeds: int = 1
    overrides: tuple[str, ...] = ()

    def points(self) -> list[Point]:
        """The product, seeds fastest. Raises UsageError for a field or a value that the config refuses."""
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
                    raise UsageError(f"--over: two points would have the folder {name}; name every value once")
                points.append(Point(len(points), name, values, config, overrides))
        return points

    def _check(self, fields: Mapping[str, object]) -> None:
        overridden = {override.removeprefix(PREFIX).partition("=")[0] for override in self.overrides}
        if SEED in self.over or SEED in overridden:
            raise UsageError("seed is swept by --seeds=N, which gives 0 to N - 1")
        if not self.over and self.seeds == 1:
            raise UsageError("nothing is swept: give --over FIELD=VALUE,VALUE, or --seeds=N")
        for name in overridden & self.over.keys():
            raise UsageError(f"{name} is both swept and overridden")
        for name, texts in self.over.items():
            if not texts:
                raise UsageError(f"--over {name}=: there is no value; such as {name}={fields.get(name, 'VALUE')}")


def read_study(path: str) -> Grid:
    """The grid that a Python file states: CONFIG = "FILE.py:PRESET", OVER = {field: values}, and where they are wanted
    SEEDS = 3 and OVERRIDES = {field: value}.

    The file runs when it is read, like a config's. Raises UsageError for what is missing, misspelt or of another kind.
    """
    if not Path(path).is_file():
        raise UsageError(f"--study={path}: there is no such file")
    stated = {name: value for name, value in vars(run_file(Path(path))).items() if name.isupper()}
    for name in stated.keys() - set(CONSTANTS):
        near = difflib.get_close_matches(name, CONSTANTS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(CONSTANTS)}"
        raise UsageError(f"--study={path}: a study has no {name}; {hint}")
    kinds = {"CONFIG": str, "OVER": Mapping, "SEEDS": int, "OVERRIDES": Mapping}
    stated = {"SEEDS": 1, "OVERRIDES": {}} | stated
    for name, kind in kinds.items():
        if not isinstance(stated.get(name), kind):
            raise UsageError(f"--study={path}: {name} is missing, or no {kind.__name__}")
    if stated["SEEDS"] < 1:
        raise UsageError(f"--study={path}: SEEDS={stated['SEEDS']} is no number of at least 1")
    for name, values in stated["OVER"].items():
        if not isinstance(values, list | tuple):
            raise UsageError(f"--study={path}: OVER[{name!r}] is no list of values")
    return Grid(
        spec=stated["CONFIG"],
        over={name: [str(value) for value in values] for name, values in stated["OVER"].items()},
        seeds=stated["SEEDS"],
        overrides=tuple(f"{PREFIX}{name}={value}" for name, value in stated["OVERRIDES"].items()),
    )


def parse_over(texts: Iterable[str]) -> dict[str, list[str]]:
    """{field: values} of FIELD=VALUE,VALUE; a comma inside brackets does not separate. Raises UsageError."""
    over: dict[str, list[str]] = {}
    for text in texts:
        name, equals, values = text.partition("=")
        if not (name and equals):
            raise UsageError(f"--over {text}: write --over FIELD=VALUE,VALUE, such as codebook.size=256,1024")
        if name in over:
            raise UsageError(f"--over {text}: {name} is swept twice; separate its values by commas")
        over[name] = _split(values)
    return over


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
    """size=256_name=ibq_seed=0: no comma, which separates the runs of `report`, and nothing that a shell would take."""
    labels = short_names([*values, SEED])
    return "_".join(f"{labels[name]}={_safe(value)}" for name, value in {**values, SEED: seed}.items())


def _safe(value: object) -> str:
    words = "x".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return re.sub(r"[^\w.+-]+", "-", words)
