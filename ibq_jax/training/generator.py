"""Trains a generator from a config: opens the token cache, resolves and checks the config, and runs the loop."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ibq_jax.autoregressive.check import check_config
from ibq_jax.autoregressive.restore import TokenizerWeights, find_tokenizer
from ibq_jax.autoregressive.step import GeneratorState, GeneratorTrainer, jit_train_step
from ibq_jax.autoregressive.token_sizes import cache_sizes, check_fit, resolve_model
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
from ibq_jax.training.initial import with_weights

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
        "train.compiler_options",
    ),
    location=("data.num_workers", "data.num_threads", "token_cache", "tokenizer"),
    network=("stage:", "model."),
    not_structural=(
        "model.dropout",
        "model.gamma_init",
        "model.remat",
        "model.attention:",
        "model.codebook_dim",  # if the network has that codebook, the shapes tell
    ),
)


class GeneratorStage:
    """The generator's part of the training loop (`ibq_jax.base.loop.Stage`)."""

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
        """Does nothing: a generator has no codebook to collapse, and the loop itself stops if a loss is not finite."""

    def describe(self, metrics: Mapping[str, float]) -> str:
        return (
            f"loss {metrics['loss/total']:.4f}  perplexity {metrics['loss/perplexity']:.1f}  "
            f"gradient {metrics['optimizer/gradient_norm']:.2f}"
        )

    def evaluate(self, state: GeneratorState) -> dict[str, float | np.ndarray]:
        measured = self._evaluator(self._weights(state))
        return {
            "validation/loss": measured.loss,
            "validation/perplexity": measured.perplexity,
            "validation/perplexity_by_position": measured.perplexity_by_position,
        }

    def images(self, state: GeneratorState) -> dict[str, np.ndarray]:
        if self._tokenizer is None:
            return {}
        return {"samples": class_samples(self._trainer, self._weights(state), self._manifest, self._tokenizer)}

    def _weights(self, state: GeneratorState) -> dict:
        return self._trainer.placement.everywhere(state.weights("ema"))


def train_generator(
    config: ConfigDict,
    workdir: Path,
    profile: range = range(0),
    trainer_class: type[GeneratorTrainer] = GeneratorTrainer,
    initial: Callable[[], Mapping] | None = None,
) -> GeneratorState:
    """Trains `config` in `workdir`, or continues the run there, to its last step; returns the last state.

    The token cache provides the model's vocabulary, grid and classes; the run saves the config with them filled in.
    The step is made of the methods of `trainer_class`. `initial` returns the weights that a new run starts from.

    Raises UsageError (bad input), TrainingStopped or Interrupted (see `ibq_jax.base.loop`).
    """
    workdir = resolve(workdir)
    mesh = make_mesh(config.mesh)
    source = _open_token_cache(config, workdir)
    config = resolve_model(config, cache_sizes(source))
    check_config(config, mesh)
    check_fit(config, source)
    steps_per_epoch = len(source) // config.data.batch_size
    if not steps_per_epoch and not config.train.steps:
        raise UsageError(f"data.batch_size={config.data.batch_size} is more than the {len(source)} images of {source}")
    tokenizer = find_tokenizer(config.tokenizer, source.manifest, needed=config.model.use_pretrained_codebook)
    trainer = trainer_class(config, mesh, steps_per_epoch)
    stage = GeneratorStage(trainer, source.manifest, tokenizer)
    codebook = _codebook(config, tokenizer) if config.model.use_pretrained_codebook and tokenizer else None
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
        if initial is not None:
            return with_weights(state, initial())
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
        trained_start=initial is not None,
        profile=profile,
    )


def _open_token_cache(config: ConfigDict, workdir: Path) -> TokenCacheSplit:
    """Returns the training split. Raises UsageError if a run in `workdir` was trained on other codes."""
    if not config.token_cache:
        raise UsageError("config.token_cache is empty: give --config.token_cache=FOLDER, which tokenize wrote")
    source = open_token_cache(config.token_cache, "train")
    previous = find_run_manifest(workdir)
    if previous is not None and "imported" not in previous:  # an imported run knows no cache, only sizes
        check_manifest(source.manifest, _identity(previous), where=config.token_cache, asker=f"the run in {workdir}")
    return source


def _identity(manifest: Mapping) -> dict:
    """Returns what must stay the same when a run is continued: not the cache's location, nor its number of shards.

    The platform is one of these things if the run's first cache noted it, as caches of earlier versions do not.
    """
    data = manifest["data"]
    machine = {"machine": {"platform": manifest["machine"]["platform"]}} if "machine" in manifest else {}
    return {
        "tokenizer": {"fingerprint": manifest["tokenizer"]["fingerprint"]},
        "data": {
            "name": data["name"],
            "class_names": data["class_names"],
            "splits": {"train": {key: data["splits"]["train"][key] for key in ("images", "views")}},
        },
        **{key: manifest[key] for key in ("preprocessing", "precision", "codebook_size", "grid")},
        **machine,
    }


def _codebook(config: ConfigDict, tokenizer: TokenizerWeights) -> jax.Array:
    """Returns the tokenizer's codebook [K, D]. Raises UsageError if D is not model.codebook_dim."""
    model, params = tokenizer
    quantizer_params = {name: jax.device_get(leaves) for name, leaves in params.items() if name == "quantize"}
    codebook = model.apply({"params": quantizer_params}, method="code_rows")
    if codebook.shape[1] != config.model.codebook_dim:
        raise UsageError(
            f"model.codebook_dim={config.model.codebook_dim}, the tokenizer's codes have {codebook.shape[1]} dimensions"
        )
    return codebook


def _with_codebook(state: GeneratorState, codebook: jax.Array) -> GeneratorState:
    """Returns `state` with the tokenizer's codebook as initial token embeddings, in the same placement."""

    def replace_table(params: dict) -> dict:
        table = params["tok_emb"]["embedding"]
        rows = jax.device_put(jnp.asarray(jax.device_get(codebook), table.dtype), table.sharding)
        return params | {"tok_emb": params["tok_emb"] | {"embedding": rows}}

    ema = None if state.ema is None else replace_table(state.ema)
    return dataclasses.replace(state, params=replace_table(state.params), ema=ema)
