"""A tokenizer's training run: what its config asks for, checked and put together, and what it left, restored."""

from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from ibq_jax.base.checkpoint import WEIGHTS_ONLY, Restored
from ibq_jax.base.errors import UsageError
from ibq_jax.base.files import absolute
from ibq_jax.base.run import SavedRun, claim, train_to_the_end
from ibq_jax.base.sharding import create_sharded, make_mesh, process_rows
from ibq_jax.base.weight_files import absence, find
from ibq_jax.data.pipeline import open_split, training_batches
from ibq_jax.tokenizer.check import check_config
from ibq_jax.tokenizer.compile import jit_train_step
from ibq_jax.tokenizer.perceptual import load_weights
from ibq_jax.tokenizer.train import TokenizerState, Trainer
from ibq_jax.tokenizer.watch import check_collapse

# Fields that a resumed run may change: they move where and how fast it runs and what it shows, not what it computes.
FREE_FIELDS = (
    "data.dir",
    "data.workers",
    "data.threads",
    "mesh.",
    "log.",
    "evaluate.",
    "checkpoint.",
    "watch.usage_floor",
    "watch.warmup_steps",
    "watch.slow_factor",
    "watch.slow_seconds",
    "watch.hang_seconds",
    "codebook.block_size",
    "model.remat",
    "train.steps",
    "train.epochs",
    "loss.perceptual_file",
)

# An evaluation of EMA weights, made for one trainer: parameters -> {"validation/psnr": ...}; and a picture of them.
Evaluate = Callable[[dict], dict[str, float]]
Picture = Callable[[dict], np.ndarray]


class TokenizerStage:
    """What the loop asks of the tokenizer (`ibq_jax.base.loop.Stage`)."""

    def __init__(self, trainer: Trainer, perceptual: dict | None, evaluate: Evaluate, picture: Picture):
        self._trainer, self._perceptual = trainer, perceptual
        self._evaluate, self._picture = evaluate, picture

    @cached_property
    def _compiled_step(self):
        return jit_train_step(self._trainer)

    def step(self, state: TokenizerState, batch: Mapping[str, jax.Array]):
        return self._compiled_step(state, self._perceptual, batch["image"])

    def examine(self, step: int, metrics: Mapping[str, float]) -> None:
        watch = self._trainer.config.watch
        check_collapse(step, metrics, usage_floor=watch.usage_floor, warmup_steps=watch.warmup_steps)

    def describe(self, metrics: Mapping[str, float]) -> str:
        words = [f"loss {metrics['loss/total']:.4f}", f"l1 {metrics['loss/l1']:.4f}"]
        if self._perceptual is not None:
            words.append(f"lpips {metrics['loss/lpips']:.4f}")
        if "adversary/discriminator" in metrics:
            words.append(f"D {metrics['adversary/discriminator']:.3f}")
        return "  ".join([*words, f"codebook used {metrics['codebook/usage']:.1%}"])

    def evaluate(self, state: TokenizerState) -> dict[str, float]:
        return self._evaluate(state.ema)

    def pictures(self, state: TokenizerState) -> dict[str, np.ndarray]:
        return {"reconstructions": self._picture(state.ema)}


def train(
    config: ConfigDict,
    workdir: Path,
    make_evaluation: Callable[[Trainer], tuple[Evaluate, Picture]],
    profile: range = range(0),
) -> TokenizerState:
    """Trains `config` in `workdir`, or continues what is there, to the end; returns the last state.

    Raises UsageError (bad input), TrainingStopped or Interrupted (see `ibq_jax.base.loop`).
    """
    workdir = absolute(workdir)
    mesh = make_mesh(config.mesh)
    check_config(config, mesh)
    source = open_split(config.data.name, config.data.dir, config.data.train_split)
    steps_per_epoch = len(source) // config.data.batch_size
    if not steps_per_epoch:
        raise UsageError(
            f"data.batch_size={config.data.batch_size} is more than the {len(source)} images of the data set"
        )
    trainer = Trainer(config, mesh, steps_per_epoch)
    perceptual = _perceptual_weights(config)
    stage = TokenizerStage(trainer, perceptual, *make_evaluation(trainer))
    claim(workdir, config, FREE_FIELDS)

    def batches_from(step: int):
        return training_batches(source, start_step=step, **_batch_fields(config, mesh))

    return train_to_the_end(
        workdir, config, mesh, stage, trainer.create_state, batches_from, steps_per_epoch, profile=profile
    )


def restore_run(path: Path, whole: bool = False) -> tuple[Trainer, Restored]:
    """The trainer and the newest whole state of a run's folder, or of one step's folder under its `checkpoints/`.

    On all devices, whatever mesh the run had; unless wanted `whole`, without the optimizers' moments. Raises UsageError
    when there is no run, or nothing saved yet.
    """
    saved = SavedRun.find(path, "tokenizer", needed="a tokenizer")
    trainer = Trainer(saved.config, make_mesh({"data": -1}), steps_per_epoch=1)
    return trainer, saved.restore(trainer.create_state, trainer.mesh, whole)


def restore_whole_run(path: Path) -> tuple[Trainer, Restored]:
    """As `restore_run`, all of it; where weights alone were saved, the rest is as before the first step."""
    trainer, restored = restore_run(path, whole=True)
    state = restored.completed(lambda: create_sharded(trainer.create_state, trainer.mesh, trainer.config.seed))
    metadata = {name: value for name, value in restored.metadata.items() if name != WEIGHTS_ONLY}
    return trainer, Restored(restored.step, state, metadata)


def _batch_fields(config: ConfigDict, mesh: jax.sharding.Mesh) -> dict:
    data = config.data
    return dict(
        image_size=data.image_size,
        resize=data.resize,
        batch_size=data.batch_size,
        seed=config.seed,
        rows=process_rows(mesh, data.batch_size),
        workers=data.workers,
        threads=data.threads,
    )


def _perceptual_weights(config: ConfigDict) -> dict | None:
    if not config.loss.perceptual_weight:
        return None
    path = find("vgg16", config.loss.perceptual_file, "loss.perceptual_file")
    if path is None:
        print(f"perceptual loss: OFF, because {absence('vgg16', 'loss.perceptual_file')}")
        return None
    print(f"perceptual loss: LPIPS with VGG16 from {path}")
    return load_weights(path)
