"""`train`: a config and a work folder in, a trained run out."""

from pathlib import Path

import jax
import numpy as np

from ibq_jax.base.config import PREFIX, load_config
from ibq_jax.base.sharding import check_batch
from ibq_jax.commands.arguments import Parser, underscored
from ibq_jax.data.pipeline import evaluation_batches, open_split
from ibq_jax.evaluate.reconstruction import ReconstructionEvaluator
from ibq_jax.tokenizer import run
from ibq_jax.tokenizer.train import Trainer


def main(argv: list[str]) -> None:
    parser = Parser(
        prog="python -m ibq_jax train",
        description="Trains a config, or continues the run that the work folder holds.",
        epilog=f"Fields of the config are overridden with {PREFIX}NAME=VALUE, such as {PREFIX}codebook.size=8192.",
    )
    parser.add_argument("--config", required=True, help="FILE.py:PRESET, such as configs/tokenizer.py:openmoji64")
    parser.add_argument("--workdir", required=True, type=Path, help="folder of the run, made when it is not there")
    flags, rest = parser.parse_known_args(underscored(argv))
    overrides = [argument for argument in rest if argument.startswith(PREFIX)]
    for argument in rest:
        if argument not in overrides:
            parser.error(f"unknown argument {argument}; fields of the config are overridden with {PREFIX}NAME=VALUE")
    config = load_config(flags.config, overrides)
    run.train(config, flags.workdir, _make_evaluation)
    print(f"wrote {flags.workdir}/ (checkpoints, metrics.jsonl, events for TensorBoard)")
    print(f"next: python -m ibq_jax evaluate --run={flags.workdir} --pictures={flags.workdir}/reconstructions.png")


def _make_evaluation(trainer: Trainer) -> tuple[run.Evaluate, run.Picture]:
    evaluator = validation_evaluator(trainer, trainer.config.evaluate.examples)

    def evaluate(params: dict) -> dict[str, float]:
        return {f"validation/{name}": value for name, value in evaluator(params)}

    def picture(params: dict) -> np.ndarray:
        return evaluator.picture(params, trainer.config.log.images)

    return evaluate, picture


def validation_evaluator(trainer: Trainer, examples: int) -> ReconstructionEvaluator:
    """On the validation split of the trainer's config; `examples` of it, 0 for all."""
    config = trainer.config
    check_batch(config.evaluate.batch_size, trainer.mesh, 1, "evaluate.batch_size")
    source = open_split(config.data.name, config.data.dir, config.data.validation_split)

    def batches(count: int):
        return evaluation_batches(
            source,
            image_size=config.data.image_size,
            resize=config.data.resize,
            batch_size=config.evaluate.batch_size,
            examples=count,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            threads=config.data.threads,
        )

    return ReconstructionEvaluator(trainer.reconstruct, config.codebook.size, trainer.mesh, batches, examples)
