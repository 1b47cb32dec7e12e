"""Trains a tokenizer and a generator together from a joint config: opens its data, runs the loop, exports both."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from ibq_jax.autoregressive.restore import find_tokenizer
from ibq_jax.autoregressive.restore import restore_run as restore_generator
from ibq_jax.base.errors import UsageError
from ibq_jax.base.files import as_path, resolve
from ibq_jax.base.sharding import make_mesh
from ibq_jax.data.pipeline import open_split, training_batches
from ibq_jax.evaluate.validation import class_samples, image_likelihood_evaluator
from ibq_jax.joint.check import check_config
from ibq_jax.joint.export import export_parts
from ibq_jax.joint.hidden_alignment import uses
from ibq_jax.joint.parts import naming_fields_of
from ibq_jax.joint.parts import resolve as resolve_sizes
from ibq_jax.joint.step import LEAST_ENTROPY, JointState, JointTrainer, jit_train_step
from ibq_jax.tokenizer.restore import restore_run as restore_tokenizer
from ibq_jax.tokenizer.step import TokenizerState
from ibq_jax.training import generator, tokenizer
from ibq_jax.training.fit import FieldRoles, check_same_run, fit
from ibq_jax.training.frozen import load_nets
from ibq_jax.training.initial import with_weights

OF_THE_RUN = ("data.num_workers", "data.num_threads", "mesh.", "log.", "watchdog.", "train.")  # entries of both stages


def _in_groups(role: str) -> tuple[str, ...]:
    """Returns the entries of a role of both stages that a joint config has in its groups."""
    left_out = {"tokenizer": OF_THE_RUN, "generator": (*OF_THE_RUN, "token_cache", "tokenizer", "evaluate.")}
    return tuple(
        f"{group}.{entry}"
        for group, stage in (("tokenizer", tokenizer), ("generator", generator))
        for entry in getattr(stage.FIELD_ROLES, role)
        if not entry.startswith(left_out[group])
    )


FIELD_ROLES = FieldRoles(
    free=(
        "data.num_workers",
        "data.num_threads",
        "mesh.",
        "log.",
        "evaluate.",
        "checkpoint.",
        "watchdog.",
        "train.steps",
        "train.epochs",
        "train.compiler_options",
        "joint.init_",
        *_in_groups("free"),
    ),
    location=("data.num_workers", "data.num_threads", *_in_groups("location")),
    network=("stage:",),
    not_structural=(),
)


class JointStage:
    """The joint stage's part of the training loop (`ibq_jax.base.loop.Stage`)."""

    def __init__(self, trainer: JointTrainer, nets: Mapping[str, dict], class_names: tuple[str, ...]):
        self._trainer, self._nets = trainer, nets
        self._tokenizer = tokenizer.TokenizerStage(trainer.tokenizer, nets)
        self._likelihood = image_likelihood_evaluator(trainer)
        self._manifest = {"data": {"class_names": list(class_names)}}

    @cached_property
    def _compiled_step(self):
        return jit_train_step(self._trainer)

    def step(self, state: JointState, batch: Mapping[str, jax.Array]):
        return self._compiled_step(state, self._nets, batch["image"], batch["label"])

    def examine(self, step: int, metrics: Mapping[str, float]) -> None:
        with naming_fields_of("tokenizer", self._trainer.config):
            self._tokenizer.examine(step, metrics)

    def describe(self, metrics: Mapping[str, float]) -> str:
        words = [self._tokenizer.describe(metrics), f"next token {metrics['loss/next_token']:.3f} nats"]
        if "loss/prediction" in metrics:
            words.append(f"prediction {metrics['loss/prediction']:.4f}")
        if "loss/hidden_alignment" in metrics:
            words.append(f"hidden alignment {metrics['loss/hidden_alignment']:.4f}")
        return "  ".join(words)

    def evaluate(self, state: JointState) -> dict[str, float | np.ndarray]:
        measured = self._tokenizer.evaluate(state.tokenizer)
        likelihood, entropy = self._likelihood(self._weights(state)), float(measured["validation/entropy"])
        return measured | {
            "validation/next_token": likelihood.loss,
            "validation/next_token_relative": likelihood.loss / max(entropy, LEAST_ENTROPY),
            "validation/perplexity_by_position": likelihood.perplexity_by_position,
        }

    def images(self, state: JointState) -> dict[str, np.ndarray]:
        weights = self._weights(state)
        decoder = self._trainer.tokenizer.encoding_model, weights["tokenizer"]
        samples = class_samples(self._trainer.generator, weights["generator"], self._manifest, decoder)
        return self._tokenizer.images(state.tokenizer) | {"samples": samples}

    def _weights(self, state: JointState) -> dict[str, dict]:
        return self._trainer.everywhere(state)


def train_joint(
    config: ConfigDict,
    workdir: Path,
    profile: range = range(0),
    trainer_class: type[JointTrainer] = JointTrainer,
    initial: Callable[[], Mapping] | None = None,
) -> JointState:
    """Trains `config` in `workdir`, or continues the run there, to its last step; returns the last state.

    At its end the folder holds the runs `tokenizer` and `generator`, see `ibq_jax.joint.export`. The step is made of
    the methods of `trainer_class`.

    Raises UsageError (bad input, or weights in `initial`: a joint run starts from the runs that its config names),
    TrainingStopped or Interrupted (see `ibq_jax.base.loop`).
    """
    if initial is not None:
        raise UsageError("a joint run starts from runs, joint.init_tokenizer and joint.init_generator, not from --init")
    workdir = resolve(workdir)
    mesh = make_mesh(config.mesh)
    data = config.tokenizer.data
    source = open_split(data.name, data.dir, data.train_split)
    config = resolve_sizes(config, {"num_classes": source.num_classes})
    check_config(config, mesh)
    steps_per_epoch = tokenizer.count_steps(source, config.data.batch_size)
    trainer = trainer_class(config, mesh, steps_per_epoch)
    nets = load_nets(trainer.tokenizer.config, mesh, "tokenizer.", uses(config))
    stage = JointStage(trainer, nets, source.class_names)
    check_same_run(workdir, config, FIELD_ROLES)

    def batches_from(step: int):
        return training_batches(source, start_step=step, **tokenizer.batch_fields(trainer.tokenizer.config, mesh))

    state = fit(
        workdir,
        config,
        mesh,
        stage,
        create_state=trainer.create_state,
        batches_from=batches_from,
        steps_per_epoch=steps_per_epoch,
        complete=lambda state: started_from_runs(state, config),
        trained_start=bool(config.joint.init_tokenizer),
        profile=profile,
    )
    export_parts(workdir, trainer, state, source.class_names)
    print(f"wrote the tokenizer to {workdir / 'tokenizer'}, and the generator to {workdir / 'generator'}")
    return state


def started_from_runs(state: JointState, config: ConfigDict) -> JointState:
    """Returns a new state with the averaged weights of the runs that the config names, and with the discriminator.

    Raises UsageError if a run is of other sizes, or if the generator is of the codes of another tokenizer.
    """
    of_tokenizer, of_generator = config.joint.init_tokenizer, config.joint.init_generator
    if of_tokenizer:
        _, restored = restore_tokenizer(as_path(of_tokenizer))
        tokenizer_state = with_weights(state.tokenizer, restored.state.weights("ema"))
        state = dataclasses.replace(state, tokenizer=_with_discriminator(tokenizer_state, restored.state))
    if of_generator:
        _, restored, manifest = restore_generator(as_path(of_generator))
        if of_tokenizer:
            find_tokenizer(of_tokenizer, manifest, needed=True)
        state = dataclasses.replace(state, generator=with_weights(state.generator, restored.state.weights("ema")))
    return state


def _with_discriminator(state: TokenizerState, other: TokenizerState) -> TokenizerState:
    """Returns a state with the discriminator of another, if it has one of the same sizes, and with new moments."""
    ours, theirs = state.discriminator, other.discriminator
    if ours is None or theirs is None:
        return state
    parts = [{name: getattr(kept, name) for name in ("params", "batch_stats", "lecam")} for kept in (ours, theirs)]
    shapes = [jax.tree.map(np.shape, part) for part in parts]
    if shapes[0] != shapes[1]:
        return state
    placed = jax.tree.map(lambda old, new: jax.device_put(np.asarray(new), old.sharding), *parts)
    return dataclasses.replace(state, discriminator=dataclasses.replace(ours, **placed))
