"""Evaluates a run on a split: a tokenizer's reconstructions, or a generator's likelihood of stored codes."""

import copy
import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from ibq_jax.autoregressive.restore import restore_run as restore_generator
from ibq_jax.autoregressive.token_sizes import check_fit
from ibq_jax.base.errors import UsageError
from ibq_jax.data.pipeline import open_split
from ibq_jax.data.token_cache import open_token_cache
from ibq_jax.evaluate import likelihood
from ibq_jax.evaluate.feature_nets import KINDS, find_feature_nets, small_sample_caveats
from ibq_jax.evaluate.protocols import find_protocol
from ibq_jax.evaluate.reconstruction import ReconstructionEvaluator
from ibq_jax.evaluate.records import make_record
from ibq_jax.evaluate.validation import likelihood_evaluator, validation_evaluator
from ibq_jax.tokenizer.restore import restore_run as restore_tokenizer

MIN_SIDE = 96  # pixels of an image in the reconstructions' PNG; smaller images are enlarged by an integer factor


def evaluate_tokenizer(run: Path, *, protocol: str = "clean", **options) -> dict:
    """Measures a tokenizer's reconstructions of a split; returns the evaluation record.

    `options` and errors are those of `evaluate_under_protocols`.
    """
    [record] = evaluate_under_protocols(run, (protocol,), **options)
    return record


def evaluate_under_protocols(
    run: Path,
    protocols: Iterable[str],
    *,
    weights: str = "ema",
    num_images: int = 0,
    data: Mapping[str, str | None] | None = None,
    weight_files: Mapping[str, str] | None = None,
    reconstructions: Path | None = None,
    columns: int = 8,
    rows: int = 2,
) -> list[dict]:
    """Measures a tokenizer's reconstructions of a split under several protocols; returns an evaluation record for each.

    Args:
        run: the run's folder, or one of its checkpoints.
        protocols: names of protocols.
        weights: "ema" (averaged) or "raw".
        num_images: how many images to measure, evenly spaced in the split (0: all).
        data: replaces the config's `data` fields "name", "dir" and "validation_split", where not None.
        weight_files: the user's files of feature nets by kind (see `feature_nets.KINDS`).
        reconstructions: a PNG to write: rows of originals, each above the row of its reconstructions, as the first
            protocol has them.
        columns: images per row of that PNG.
        rows: rows of originals in that PNG.

    Raises:
        UsageError: there is no tokenizer's run or nothing saved in it, its data is not on this machine, or a weight
            file is missing or of another network.
    """
    trainer, restored = restore_tokenizer(run)
    config, chosen = copy.deepcopy(trainer.config), [find_protocol(name) for name in protocols]
    config.data.update({field: value for field, value in (data or {}).items() if value is not None})
    nets, params = find_feature_nets(KINDS, weight_files or {}), restored.state.weights(weights)
    available = len(open_split(config.data.name, config.data.dir, config.data.validation_split))
    records = []
    for protocol in chosen:
        evaluator = validation_evaluator(replace(trainer, config=config), num_images, protocol, nets)
        metrics = dict(evaluator(params))
        measured = int(metrics["images"])
        record = make_record(
            stage="tokenizer",
            run=run,
            step=restored.step,
            weights=weights,
            split=f"{config.data.name}/{config.data.validation_split}",
            protocol=protocol,
            caveats=[
                *protocol.caveats(measured, available, config.data.image_size),
                *small_sample_caveats(metrics, measured),
            ],
            metrics=metrics,
            codes=config.codebook.size,
        )
        if reconstructions is not None and not records:
            _write_reconstructions(evaluator, params, columns, rows, config.data.image_size, reconstructions)
        records.append(record)
    return records


def evaluate_likelihood(
    run: Path, *, weights: str = "ema", num_images: int = 0, token_cache: str = "", split: str = "validation"
) -> dict:
    """Measures a generator's likelihood of the codes of a split; returns the evaluation record.

    Args:
        run: the run's folder, or one of its checkpoints.
        weights: "ema" (averaged) or "raw".
        num_images: how many images' codes to measure, evenly spaced in the split (0: all).
        token_cache: the codes; empty for the config's.
        split: "train" or "validation" of the token cache.

    Raises:
        UsageError: there is no generator's run or nothing saved in it, or the token cache is missing or of other codes.
    """
    trainer, restored, _ = restore_generator(run)
    folder = token_cache or trainer.config.token_cache
    if not folder:
        raise UsageError(f"{run} was imported, without a token cache: give --token-cache=FOLDER, which tokenize wrote")
    source = open_token_cache(folder, split)
    check_fit(trainer.config, source)
    found = likelihood_evaluator(trainer, source, num_images)(restored.state.weights(weights))
    complete, vocab_size = found.images == len(source), trainer.config.model.vocab_size
    return make_record(
        stage="autoregressive",
        run=run,
        step=restored.step,
        weights=weights,
        split=f"{source.manifest['data']['name']}/{split}",
        protocol={"name": "likelihood", "description": likelihood.PROTOCOL, "images": 0},
        caveats=[] if complete else [f"not comparable: {found.images:,} images of {len(source):,}"],
        metrics={
            "loss": found.loss,
            "perplexity": found.perplexity,
            "order_0": source.manifest["splits"][split]["entropy"],
            "uniform": math.log(vocab_size),
            "images": found.images,
        },
        codes=vocab_size,
        perplexity_by_position=found.perplexity_by_position.tolist(),
    )


def perplexity_by_row(record: Mapping) -> np.ndarray:
    """Returns the perplexity of each row of codes, top to bottom, from a record of `evaluate_likelihood`: [h]."""
    return np.exp(np.log(record["perplexity_by_position"]).mean(axis=1))


def _write_reconstructions(
    evaluator: ReconstructionEvaluator, params: dict, columns: int, rows: int, image_size: int, path: Path
) -> None:
    grid = evaluator.comparison_grid(params, columns, rows)  # on all processes, as their devices compute it together
    if jax.process_index() == 0:
        image, factor = Image.fromarray(grid), -(-MIN_SIDE // image_size)
        image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST).save(path, "PNG")
