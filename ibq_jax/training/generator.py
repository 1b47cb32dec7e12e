"""Trains a generator from its config: checks it, opens its codes, puts the stage together and fits it."""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ibq_jax.autoregressive.check import check_config
from ibq_jax.autoregressive.restore import TokenizerWeights, check_fit, find_tokenizer
from ibq_jax.autoregressive.step import GeneratorState, GeneratorTrainer, jit_train_step
from ibq_jax.base.errors import UsageError
from ibq_jax.base.files import resolve
from ibq_jax.base.sharding import make_mesh, process_rows
from ibq_jax.data.token_cache import (
    TokenCacheSplit,
    check_manifest,
    find_run_manifest,
    open_token_cache,
    training_code_batches,
    write_run_manifest,
)
from ibq_jax.evaluate.validation import class_samples, likelihood_evaluator
from ibq_jax.training.fit import FieldRoles, check_same_run, fit

FIELD_ROLES = FieldRoles(
    free=(
        "token_cache",
        "tokenizer",
        "data.num_workers",
        "data.num_threads",
        "mesh.",
        "sample.",
        "log.",
        "evaluate.",
        "checkpoint.",
        "watchdog.",
        "loss.implementation",
        "loss.block_size",
        "model.remat",
        "model.attention",
        "train.steps",
        "train.epochs",
    ),
    location=("data.num_workers", "data.num_threads", "token_cache", "tokenizer"),
    network=("stage:", "model."),
    not_structural=(
        "model.dropout",
        "model.gamma_init",
        "model.remat",
        "model.attention:",
        "model.codebook_dim",  # where it is of the network, the shapes say so
    ),
)


class GeneratorStage:
    """What the loop asks of the generator (`ibq_jax.base.loop.Stage`)."""

    def __init__(self, trainer: GeneratorTrainer, manifest: Mapping, tokenizer: TokenizerWeights | None):
        config = trainer.config
        self._trainer, self._manifest, self._tokenizer = trainer, manifest, tokenizer
        validation = open_token_cache(config.token_cache, "validation")
        self._evaluator = likelihood_evaluator(trainer, validation, config.evaluate.examples)

    @cached_property
    def _compiled_step(self):
        return jit_train_step(self._trainer)

    def step(self, state: GeneratorState, batch: Mapping[str, jax.Array]):
        return self._compiled_step(state, batch["codes"], batch["label"])

    def examine(self, step: int, metrics: Mapping[str, float]) -> None:
        """A generator has no collapse to be watched for; what is not finite stops it in the loop."""

    def describe(self, metrics: Mapping[str, float]) -> str:
        return (
            f"loss {metrics['loss/total']:.4f}  perplexity {metrics['loss/perplexity']:.1f}  "
            f"gradient {metrics['optimizer/gradient_norm']:.2f}"
        )

    def evaluate(self, state: GeneratorState) -> dict[str, float | np.ndarray]:
        measured = self._evaluator(state.weights("ema"))
        return {
            "validation/loss": measured.loss,
            "validation/perplexity": measured.perplexity,
            "validation/perplexity_by_position": measured.perplexity_by_position,
        }

    def images(self, state: GeneratorState) -> dict[str, np.ndarray]:
        if self._tokenizer is None:
            return {}
        return {"samples": class_samples(self._trainer, state.weights("ema"), self._manifest, self._tokenizer)}


def train_generator(config: ConfigDict, workdir: Path, profile: range = range(0)) -> GeneratorState:
    """Trains `config` in `workdir`, or continues what is there, to the end; returns the last state.

    Raises UsageError (bad input), TrainingStopped or Interrupted (see `ibq_jax.base.loop`).
    """
    workdir = resolve(workdir)
    mesh = make_mesh(config.mesh)
    check_config(config, mesh)
    source = _open_codes(config, workdir)
    steps_per_epoch = len(source) // config.data.batch_size
    if not steps_per_epoch and not config.train.steps:
        raise UsageError(
            f"data.batch_size={config.data.batch_size} is more than the {len(source)} pictures of {source}"
        )
    tokenizer = find_tokenizer(config.tokenizer, source.manifest, needed=config.model.use_pretrained_codebook)
    trainer = GeneratorTrainer(config, mesh, steps_per_epoch)
    stage = GeneratorStage(trainer, source.manifest, tokenizer)
    codebook = _codebook(config, tokenizer) if config.model.use_pretrained_codebook else None
    check_same_run(workdir, config, FIELD_ROLES)
    if jax.process_index() == 0:
        write_run_manifest(workdir, source.manifest)

    def batches_from(step: int):
        return training_code_batches(
            source,
            batch_size=config.data.batch_size,
            seed=config.seed,
            start_step=step,
            rows=process_rows(mesh, config.data.batch_size),
            num_workers=config.data.num_workers,
            num_threads=config.data.num_threads,
        )

    def complete(state: GeneratorState) -> GeneratorState:
        return state if codebook is None else _with_codebook(state, codebook)

    return fit(
        workdir,
        config,
        mesh,
        stage,
        create_state=trainer.create_state,
        batches_from=batches_from,
        steps_per_epoch=steps_per_epoch,
        complete=complete,
        profile=profile,
    )


def _open_codes(config: ConfigDict, workdir: Path) -> TokenCacheSplit:
    """The training codes. Raises UsageError unless they are of the config's kind, and the run's if it has begun."""
    if not config.token_cache:
        raise UsageError("config.token_cache is empty: give --config.token_cache=FOLDER, which tokenize wrote")
    source = open_token_cache(config.token_cache, "train")
    check_fit(config, source)
    before = find_run_manifest(workdir)
    if (
        before is not None and "imported" not in before
    ):  # of an imported run's codes, only what the config says is known
        check_manifest(source.manifest, _identity(before), where=config.token_cache, asker=f"the run in {workdir}")
    return source


def _identity(manifest: Mapping) -> dict:
    """What has to stay the same for a run to go on: not where the cache lies, nor how it was sharded."""
    data = manifest["data"]
    return {
        "tokenizer": {"fingerprint": manifest["tokenizer"]["fingerprint"]},
        "data": {
            "name": data["name"],
            "class_names": data["class_names"],
            "splits": {"train": {key: data["splits"]["train"][key] for key in ("images", "views")}},
        },
        **{key: manifest[key] for key in ("preprocessing", "precision", "codebook_size", "grid")},
    }


def _codebook(config: ConfigDict, tokenizer: TokenizerWeights) -> jax.Array:
    model, params = tokenizer
    of_quantizer = {name: jax.device_get(leaves) for name, leaves in params.items() if name == "quantize"}
    codebook = model.apply({"params": of_quantizer}, method="code_rows")
    if codebook.shape[1] != config.model.codebook_dim:
        raise UsageError(
            f"model.codebook_dim={config.model.codebook_dim}, the tokenizer's codes have {codebook.shape[1]} dimensions"
        )
    return codebook


def _with_codebook(state: GeneratorState, codebook: jax.Array) -> GeneratorState:
    """`state` with token embeddings that start at the tokenizer's codebook, where the table was before."""

    def put(params: dict) -> dict:
        table = params["tok_emb"]["embedding"]
        rows = jax.device_put(jnp.asarray(jax.device_get(codebook), table.dtype), table.sharding)
        return params | {"tok_emb": params["tok_emb"] | {"embedding": rows}}

    return state.replace(params=put(state.params), ema=None if state.ema is None else put(state.ema))
