"""Baselines: the curves of several runs that differ in their seed alone, to draw behind a run of the same config.

The package ships those of presets that run on a laptop, ibq_jax/report/baselines/*.json. Such a file is
{"config", "runs", "steps", "off", "bands"}, written by `report --write-baseline`.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ibq_jax.base.config import differences, flatten, upgraded
from ibq_jax.base.errors import UsageError
from ibq_jax.base.files import write_text
from ibq_jax.base.json_files import read_json
from ibq_jax.report.curves import PANELS, Band
from ibq_jax.report.history import History
from ibq_jax.report.run import Run
from ibq_jax.training.train import STAGES

FOLDER = Path(__file__).parent / "baselines"
MAX_POINTS = 100  # of a band; more are put into groups
DIGITS = 4  # significant ones
MEASURING = ("evaluate.protocol", "evaluate.examples")  # fields that do not change a run but what is measured


@dataclass(frozen=True)
class Baseline:
    """The curves of several runs of one config.

    Attributes:
        config: the fields of the runs' config that decide what is computed and measured, by their dotted names.
        runs: how many there are.
        steps: at which the shortest of them ended.
        off: scalars that all of them logged as 0 throughout, because what they measure was off.
        bands: the other scalars that plots show, by name.
    """

    config: Mapping
    runs: int
    steps: int
    off: tuple[str, ...]
    bands: Mapping[str, Band]

    def fits(self, config: Mapping, history: History) -> bool:
        """Returns whether a run computes what these runs did: the same config, and nothing on that was off here."""
        on = any(name in history and history[name].values.any() for name in self.off)
        return not on and not _differences(self.config, config)

    @property
    def stage(self) -> str:
        """ "tokenizer" or "autoregressive"."""
        return str(self.config["stage"])

    def words(self) -> str:
        """Returns a sentence on what is drawn behind the curves."""
        return (
            f"Behind the curves: {self.runs} runs of {self.steps:,} steps with the same settings. Dotted: their mean; "
            "shaded: from the least to the greatest."
        )


def make_baseline(runs: Sequence[Run]) -> Baseline:
    """Returns the baseline that runs of one config, with different seeds, make.

    Raises:
        UsageError: there are fewer than two runs, they differ in more than the seed, or they have no curves.
    """
    if len(runs) < 2:
        raise UsageError("--write-baseline needs the runs of two or more seeds: --run=A,B,C")
    first = runs[0]
    for run in runs[1:]:
        if differing := _differences(first.config, run.config):
            raise UsageError(f"{first.folder} and {run.folder} differ in more than the seed ({'; '.join(differing)})")
    if len({run.config.seed for run in runs}) < len(runs):
        raise UsageError("--write-baseline: two of the runs have the same seed")
    shown = {name for panel in PANELS[first.stage] for name in panel.names}
    names = sorted(name for name in shown if all(name in run.history for run in runs))
    if not names:
        raise UsageError(f"{first.folder} and the others have logged no curves in common")
    off = [name for name in names if not any(run.history[name].values.any() for run in runs)]
    bands = {name: band for name in names if name not in off if (band := _band([run.history for run in runs], name))}
    steps = min(run.history.last_step for run in runs)
    return Baseline(_deciding(first.config), len(runs), steps, tuple(off), bands)


def write_baseline(baseline: Baseline, path: Path) -> None:
    """Writes a baseline's file."""
    fields = asdict(baseline) | {"bands": {name: asdict(band) for name, band in baseline.bands.items()}}
    lines = json.dumps(fields, default=lambda array: [float(f"{value:.{DIGITS}g}") for value in array.tolist()])
    write_text(path, lines.replace(', "', ',\n"') + "\n")


def read_baseline(path: Path) -> Baseline:
    """Reads a baseline's file. Raises UsageError if it is missing or damaged."""
    try:
        found = read_json(path)
        bands = {
            name: Band(*(np.asarray(band[field], np.float64) for field in ("steps", "mean", "low", "high")))
            for name, band in found["bands"].items()
        }
        if any({len(array) for array in vars(band).values()} != {len(band.steps)} for band in bands.values()):
            raise ValueError("a band whose arrays differ in length")
        if found["config"]["stage"] not in STAGES:
            raise ValueError(f"of an unknown stage {found['config']['stage']!r}")
        return Baseline(found["config"], int(found["runs"]), int(found["steps"]), tuple(found["off"]), bands)
    except FileNotFoundError:
        raise UsageError(f"--baseline={path}: the file does not exist") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UsageError(f"--baseline={path}: not a file that --write-baseline wrote") from error


def shipped_baseline(run: Run) -> Baseline | None:
    """Returns the baseline in the package that fits a run; None if there is none."""
    return next((found for found in _shipped() if found.fits(run.config, run.history)), None)


def _shipped() -> Iterator[Baseline]:
    return (read_baseline(path) for path in sorted(FOLDER.glob("*.json")))


def _deciding(config: Mapping) -> dict:
    """Returns the fields that decide what is computed and measured; the seed and the places of files do not."""
    fields = flatten(upgraded(flatten(config)))
    roles = STAGES[fields["stage"]].roles
    ignored = (*roles.free, *roles.location, "seed")
    return {name: value for name, value in fields.items() if not name.startswith(ignored) or name in MEASURING}


def _differences(ours: Mapping, theirs: Mapping) -> list[str]:
    return differences(_deciding(ours), _deciding(theirs))


def _band(histories: Sequence[History], name: str) -> Band | None:
    """Returns the band of a scalar over the steps that all runs logged; None if there are none."""
    steps = set.intersection(*(set(history[name].steps.tolist()) for history in histories))
    common = np.asarray(sorted(steps))
    if not len(common):
        return None
    values = np.stack([history[name].values[np.isin(history[name].steps, common)] for history in histories])
    groups = np.array_split(np.arange(len(common)), min(len(common), MAX_POINTS))
    return Band(
        steps=np.asarray([common[group[-1]] for group in groups], np.float64),
        mean=np.asarray([values[:, group].mean() for group in groups]),
        low=np.asarray([values[:, group].min() for group in groups]),
        high=np.asarray([values[:, group].max() for group in groups]),
    )
