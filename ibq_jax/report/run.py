"""A run as a report reads it: everything in its folder except the weights."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from ml_collections import ConfigDict

from ibq_jax.base.config import flatten
from ibq_jax.base.errors import UsageError
from ibq_jax.base.saved_run import SavedRun
from ibq_jax.data.token_cache import find_run_manifest
from ibq_jax.evaluate.records import FOLDER, format_metrics
from ibq_jax.report.curves import PANELS
from ibq_jax.report.doctor import diagnose
from ibq_jax.report.history import History, read_history, stopped_by_itself


@dataclass(frozen=True)
class Run:
    """A run to report on.

    Attributes:
        name: of its folder.
        folder: the path as it was given.
        saved: its config and checkpoints.
        history: what it logged.
        evaluations: the records that `evaluate` wrote.
        stopped: the reason, if stopping by itself was the last thing that training did.
        unigram_entropy: of a generator's validation codes, in nats; None if that is not known.
    """

    name: str
    folder: Path
    saved: SavedRun
    history: History
    evaluations: tuple[dict, ...]
    stopped: str
    unigram_entropy: float | None

    @property
    def config(self) -> ConfigDict:
        """Its resolved config."""
        return self.saved.config

    @property
    def stage(self) -> str:
        """ "tokenizer", "autoregressive" or "joint"."""
        return self.config.stage

    @property
    def missing(self) -> list[str]:
        """A sentence if there are no curves."""
        return [] if self.history.series else ["metrics.jsonl is missing or empty, so there are no curves."]

    def findings(self, total_steps: int) -> list[dict]:
        """Returns the doctor's findings as the page shows them."""
        found = diagnose(self.history, self.config, total_steps, self.unigram_entropy, self.stopped)
        return [asdict(finding) for finding in found]


def read_run(folder: Path) -> Run:
    """Reads a run's folder, or the folder of one of its checkpoints.

    Raises:
        UsageError: it is not a run, or one of its evaluations is damaged.
    """
    saved = SavedRun.find(folder)
    stage = flatten(saved.config).get("stage")
    if stage not in PANELS:
        raise UsageError(f"{saved.workdir / 'config.json'}: stage is {stage!r}, not one of {', '.join(PANELS)}")
    history = read_history(saved.workdir / "metrics.jsonl")
    return Run(
        name=saved.workdir.name,
        folder=folder,
        saved=saved,
        history=history,
        evaluations=read_evaluations(saved.workdir),
        stopped=stopped_by_itself(saved.workdir, history.last_step),
        unigram_entropy=_unigram_entropy(saved.workdir),
    )


def read_evaluations(workdir: Path) -> tuple[dict, ...]:
    """Reads the records that `evaluate` wrote into a run's folder. Raises UsageError if one is damaged."""
    return tuple(_evaluation(file) for file in sorted((workdir / FOLDER).glob("*.json")))


def evaluation_card(evaluation: Mapping) -> dict:
    """Returns an evaluation's record as the page shows it."""
    return {
        "title": evaluation["split"],
        "of": f"{evaluation['images']:,} images, step {evaluation['step']:,}, {evaluation['weights']} weights",
        "metrics": list(format_metrics(evaluation)),
        "protocol": evaluation["protocol"]["name"],
        "description": evaluation["protocol"]["description"],
        "marks": evaluation["marks"],
    }


def _evaluation(path: Path) -> dict:
    try:
        found = json.loads(path.read_text())
        evaluation_card(found)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UsageError(f"{path}: not an evaluation that `evaluate` wrote; remove it") from error
    return found


def _unigram_entropy(workdir: Path) -> float | None:
    """Returns the unigram entropy that the token cache's manifest states; imported generators have no manifest."""
    found = flatten(find_run_manifest(workdir) or {}).get("splits.validation.entropy")
    return None if found is None else float(found)
