"""Trains a tokenizer from a config: checks it, opens the data set, and runs the loop."""

from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from ibq_jax.base.errors import UsageError
from ibq_jax.base.files import resolve
from ibq_jax.base.sharding import make_mesh, process_rows
from ibq_jax.data.pipeline import ImageSource, open_split, training_batches
from ibq_jax.evaluate.feature_nets import find_feature_nets
from ibq_jax.evaluate.protocols import find_protocol
from ibq_jax.evaluate.validation import validation_evaluator
from ibq_jax.pretrained.frozen_nets import NETS
from ibq_jax.tokenizer.check import check_config
from ibq_jax.tokenizer.codebook_monitor import check_collapse
from ibq_jax.tokenizer.net_losses import LPIPS_NET
from ibq_jax.tokenizer.parts import keeps_codes
from ibq_jax.tokenizer.step import TokenizerState, TokenizerTrainer, jit_train_step
from ibq_jax.training.fit import FieldRoles, check_same_run, fit
from ibq_jax.training.frozen import load_nets
from ibq_jax.training.initial import with_weights
from ibq_jax.training.kept_codes import check_codes, note_codes

NET_FILES = tuple(f"nets.{name}" for name in NETS)  # fields

FIELD_ROLES = FieldRoles(
    free=(
        "data.dir",
        "data.num_workers",
        "data.num_threads",
        "mesh.",
        "log.",
        "evaluate.",
        "checkpoint.",
        "codebook_monitor.usage_floor",
        "codebook_monitor.grace_steps",
        "watchdog.slow_factor",
        "watchdog.slow_seconds",
        "watchdog.hang_seconds",
        "codebook.block_size",
        "encode.",
        "model.remat",
        "train.steps",
        "train.epochs",
        "train.compiler_options",
        "loss.perceptual_file",
        "nets.",
    ),
    location=("data.dir", "data.num_workers", "data.num_threads", "loss.perceptual_file", *NET_FILES),
    network=("stage:", "model.", "codebook.", "quantizer.name:", "quantizer.l2_normalize:", "finetune.freeze:"),
    not_structural=("model.remat", "codebook.implementation", "codebook.init_scale"),
)


COMPARED = 1_000  # images whose codes are compared before and after training that must not change them


class TokenizerStage:
    """The tokenizer's part of the training loop (`ibq_jax.base.loop.Stage`)."""

    def __init__(self, trainer: TokenizerTrainer, nets: Mapping[str, dict]):
        config = trainer.config
        kinds = [kind for kind in config.evaluate.feature_nets.split(",") if kind]
        self._trainer, self._nets = trainer, nets
        self._evaluator = validation_evaluator(
            trainer, config.evaluate.examples, find_protocol(config.evaluate.protocol), find_feature_nets(kinds, {})
        )

    @cached_property
    def _compiled_step(self):
        return jit_train_step(self._trainer)

    def step(self, state: TokenizerState, batch: Mapping[str, jax.Array]):
        return self._compiled_step(state, self._nets, batch["image"])

    def examine(self, step: int, metrics: Mapping[str, float]) -> None:
        monitor = self._trainer.config.codebook_monitor
        check_collapse(step, metrics, usage_floor=monitor.usage_floor, grace_steps=monitor.grace_steps)

    def describe(self, metrics: Mapping[str, float]) -> str:
        words = [f"loss {metrics['loss/total']:.4f}", f"l1 {metrics['loss/l1']:.4f}"]
        if LPIPS_NET in self._nets:
            words.append(f"lpips {metrics['loss/lpips']:.4f}")
        if "discriminator/loss" in metrics:
            words.append(f"D {metrics['discriminator/loss']:.3f}")
        return "  ".join([*words, f"codebook used {metrics['codebook/usage']:.1%}"])

    def evaluate(self, state: TokenizerState) -> dict[str, float | np.ndarray]:
        return {f"validation/{name}": value for name, value in self._evaluator(self._weights(state))}

    def images(self, state: TokenizerState) -> dict[str, np.ndarray]:
        grid = self._evaluator.comparison_grid(self._weights(state), self._trainer.config.log.num_images)
        return {"reconstructions": grid}

    def codes(self, state: TokenizerState) -> np.ndarray:
        """Returns the codes of up to `COMPARED` validation images, int32 [N, h, w]."""
        return self._evaluator.codes(self._weights(state), COMPARED)

    def _weights(self, state: TokenizerState) -> dict:
        return self._trainer.placement.everywhere(state.weights("ema"))


def train_tokenizer(
    config: ConfigDict,
    workdir: Path,
    profile: range = range(0),
    trainer_class: type[TokenizerTrainer] = TokenizerTrainer,
    initial: Callable[[], Mapping] | None = None,
) -> TokenizerState:
    """Trains `config` in `workdir`, or continues the run there, to its last step; returns the last state.

    Args:
        config: a config of the stage "tokenizer".
        workdir: the run's folder.
        profile: steps whose trace is written to the run's folder.
        trainer_class: the class whose methods make up the step, such as a subclass with another loss.
        initial: returns the weights that a new run starts from; None: random ones.

    Raises:
        UsageError: a field, the data set or a weight's size is wrong, or `workdir` holds another run.
        Failed: codes changed although what decides them is frozen.
        TrainingStopped, Interrupted: see `ibq_jax.base.loop`.
    """
    workdir = resolve(workdir)
    mesh = make_mesh(config.mesh)
    check_config(config, mesh)
    source = open_split(config.data.name, config.data.dir, config.data.train_split)
    steps_per_epoch = count_steps(source, config.data.batch_size)
    trainer = trainer_class(config, mesh, steps_per_epoch)
    stage = TokenizerStage(trainer, load_nets(config, mesh))
    check_same_run(workdir, config, FIELD_ROLES)

    def batches_from(step: int):
        return training_batches(source, start_step=step, **batch_fields(config, mesh))

    def complete(state: TokenizerState) -> TokenizerState:
        return state if initial is None else with_weights(state, initial())

    def at_start(state: TokenizerState) -> None:
        if keeps_codes(config):
            note_codes(workdir, stage.codes(state))

    state = fit(
        workdir,
        config,
        mesh,
        stage,
        create_state=trainer.create_state,
        batches_from=batches_from,
        steps_per_epoch=steps_per_epoch,
        complete=complete,
        at_start=at_start,
        trained_start=initial is not None,
        profile=profile,
    )
    if keeps_codes(config):
        print(check_codes(workdir, stage.codes(state)))
    return state


def count_steps(source: ImageSource, batch_size: int) -> int:
    """Returns the steps of an epoch. Raises UsageError if the images do not fill one batch."""
    if batch_size > len(source):
        raise UsageError(f"data.batch_size={batch_size} is more than the {len(source)} images of the data set")
    return len(source) // batch_size


def batch_fields(config: ConfigDict, mesh: jax.sharding.Mesh) -> dict:
    """Returns what `training_batches` needs to know of a tokenizer's config, on this process."""
    data = config.data
    return dict(
        image_size=data.image_size,
        resize=data.resize,
        batch_size=data.batch_size,
        seed=config.seed,
        rows=process_rows(mesh, data.batch_size),
        num_workers=data.num_workers,
        num_threads=data.num_threads,
    )
