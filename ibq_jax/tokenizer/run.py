"""A tokenizer's training run in a work folder: checks, starts or resumes, trains to the end.

workdir/config.json     the resolved config          workdir/checkpoints/    Orbax, one folder a step
workdir/metrics.jsonl   every logged scalar          workdir/events/         the same for TensorBoard, with pictures
"""

from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path

import jax
import numpy as np
from clu import parameter_overview
from ml_collections import ConfigDict

from ibq_jax.base.checkpoint import Checkpoints, Restored
from ibq_jax.base.config import differences, read_config, save_config
from ibq_jax.base.errors import UsageError
from ibq_jax.base.loop import Loop, Pace
from ibq_jax.base.sharding import abstract_state, create_sharded, make_mesh
from ibq_jax.base.telemetry import Telemetry
from ibq_jax.data.pipeline import open_split, training_batches
from ibq_jax.tokenizer.check import check_config
from ibq_jax.tokenizer.compile import jit_train_step
from ibq_jax.tokenizer.perceptual import find_weights, load_weights
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

    def picture(self, state: TokenizerState) -> np.ndarray:
        return self._picture(state.ema)


def train(
    config: ConfigDict, workdir: Path, make_evaluation: Callable[[Trainer], tuple[Evaluate, Picture]]
) -> TokenizerState:
    """Trains `config` in `workdir`, or continues what is there, to the end; returns the last state.

    Raises UsageError (bad input), TrainingStopped or Interrupted (see `ibq_jax.base.loop`).
    """
    workdir = Path(workdir).resolve()
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
    evaluate, picture = make_evaluation(trainer)
    _claim(workdir, config)
    checkpoints = _checkpoints(workdir, config)
    state, start_step = _start(trainer, checkpoints)
    pace = Pace(
        total_steps=config.train.steps or config.train.epochs * steps_per_epoch,
        log_every=config.log.every,
        images_every=config.log.images_every,
        evaluate_every=config.evaluate.every,
        checkpoint_every=config.checkpoint.every,
    )
    if start_step >= pace.total_steps:
        print(f"complete: step {start_step} of {pace.total_steps}; a larger train.steps goes on from there")
    telemetry = Telemetry(workdir, start_step, pace.total_steps, enabled=jax.process_index() == 0)
    stage = TokenizerStage(trainer, perceptual, evaluate, picture)
    metadata = {"config": config.to_dict(), "steps_per_epoch": steps_per_epoch}
    loop = Loop(stage, mesh, pace, checkpoints, telemetry, workdir, metadata)
    try:
        return loop.run(state, training_batches(source, start_step=start_step, **_batch_fields(config)), start_step)
    finally:
        telemetry.close()
        checkpoints.close()


def restore_run(path: Path) -> tuple[Trainer, Restored]:
    """The trainer and the newest whole state of a run's folder, or of one step's folder under its `checkpoints/`.

    On all devices, whatever mesh the run had. Raises UsageError when there is no run, or nothing saved yet.
    """
    path = Path(path).resolve()
    step = int(path.name) if path.name.isdigit() and path.parent.name == "checkpoints" else None
    workdir = path if step is None else path.parent.parent
    config = read_config(workdir / "config.json")
    if config.stage != "tokenizer":
        raise UsageError(f"{workdir} is a run of stage {config.stage!r}; this needs a tokenizer")
    if not (workdir / "checkpoints").is_dir():
        raise UsageError(f"{workdir} has no checkpoint yet")
    checkpoints = _checkpoints(workdir, config)
    if not checkpoints.steps or (step is not None and step not in checkpoints.steps):
        raise UsageError(f"{path} has no checkpoint; the steps saved are {checkpoints.steps}")
    trainer = Trainer(config, make_mesh({"data": -1}), steps_per_epoch=1)
    shapes, _ = abstract_state(trainer.create_state, trainer.mesh, config.seed)
    restored = checkpoints.restore(shapes) if step is None else checkpoints.restore_step(step, shapes)
    return trainer, restored


def _checkpoints(workdir: Path, config: ConfigDict) -> Checkpoints:
    checkpoint = config.checkpoint
    return Checkpoints(
        workdir / "checkpoints",
        keep_last=checkpoint.keep_last,
        keep_best=checkpoint.keep_best,
        best_metric=checkpoint.best_metric,
    )


def _batch_fields(config: ConfigDict) -> dict:
    data = config.data
    return dict(
        image_size=data.image_size,
        resize=data.resize,
        batch_size=data.batch_size,
        seed=config.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        workers=data.workers,
        threads=data.threads,
    )


def _perceptual_weights(config: ConfigDict) -> dict | None:
    path = find_weights(config.loss.perceptual_file) if config.loss.perceptual_weight else None
    if path is not None:
        print(f"perceptual loss: LPIPS with VGG16 from {path}")
        return load_weights(path)
    if config.loss.perceptual_weight:
        print(
            "perceptual loss: OFF, because torchvision's vgg16-397923af.pth is not here; "
            "set loss.perceptual_file or $IBQ_VGG16, or put it into ~/.cache/ibq_jax/"
        )
    return None


def _claim(workdir: Path, config: ConfigDict) -> None:
    """Makes `workdir` this config's, or checks that it is. Raises UsageError naming the fields that differ."""
    path = workdir / "config.json"
    if path.exists():
        differing = differences(read_config(path), config, ignore=FREE_FIELDS)
        if differing:
            raise UsageError(f"{workdir} holds a run of another config ({'; '.join(differing)}); use another --workdir")
    workdir.mkdir(parents=True, exist_ok=True)
    if jax.process_index() == 0:
        save_config(config, path)


def _start(trainer: Trainer, checkpoints: Checkpoints) -> tuple[TokenizerState, int]:
    seed = trainer.config.seed
    shapes, _ = abstract_state(trainer.create_state, trainer.mesh, seed)
    restored = checkpoints.restore(shapes)
    if restored is not None:
        print(f"continuing from step {restored.step}")
        return restored.state, restored.step
    state = create_sharded(trainer.create_state, trainer.mesh, seed)
    print(parameter_overview.get_parameter_overview(state.params, include_stats=False).splitlines()[-1])
    return state, 0
