"""What is measured and shown of a run's weights, while it trains and afterwards: evaluators on its validation data."""

from collections.abc import Mapping

import numpy as np

from ibq_jax.autoregressive.decode import Filter
from ibq_jax.autoregressive.pictures import PictureSampler
from ibq_jax.autoregressive.run import Evaluate as EvaluateGenerator
from ibq_jax.autoregressive.run import Pictures, TokenizerWeights
from ibq_jax.autoregressive.sample import Guidance
from ibq_jax.autoregressive.train import Trainer as GeneratorTrainer
from ibq_jax.base.sharding import check_batch, process_rows
from ibq_jax.data.codes import CodeSource, evaluation_code_batches, open_codes
from ibq_jax.data.pipeline import evaluation_batches, open_split
from ibq_jax.evaluate.judges import NOBODY, Judges, find_judges
from ibq_jax.evaluate.likelihood import LikelihoodEvaluator
from ibq_jax.evaluate.protocols import PROTOCOLS, Protocol, find_protocol
from ibq_jax.evaluate.reconstruction import ReconstructionEvaluator
from ibq_jax.evaluate.sheet import contact_sheet
from ibq_jax.tokenizer import run
from ibq_jax.tokenizer.train import Trainer

PICTURES_A_CLASS = 4  # in a training run's sheets


def tokenizer_evaluation(trainer: Trainer) -> tuple[run.Evaluate, run.Picture]:
    """For `ibq_jax.tokenizer.run.train`."""
    asked = trainer.config.evaluate
    judges = find_judges([kind for kind in asked.judges.split(",") if kind], {})
    evaluator = validation_evaluator(trainer, asked.examples, find_protocol(asked.protocol), judges)

    def evaluate(params: dict) -> dict[str, float]:
        return {f"validation/{name}": value for name, value in evaluator(params)}

    def picture(params: dict) -> np.ndarray:
        return evaluator.picture(params, trainer.config.log.images)

    return evaluate, picture


def validation_evaluator(
    trainer: Trainer, examples: int, protocol: Protocol = PROTOCOLS["clean"], judges: Judges = NOBODY
) -> ReconstructionEvaluator:
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
            rows=process_rows(trainer.mesh, config.evaluate.batch_size),
            antialias=protocol.antialias,
            threads=config.data.threads,
        )

    return ReconstructionEvaluator(
        trainer.reconstruct, config.codebook.size, trainer.mesh, batches, examples, protocol, judges
    )


def generator_evaluation(
    trainer: GeneratorTrainer, manifest: Mapping, tokenizer: TokenizerWeights | None
) -> tuple[EvaluateGenerator, Pictures]:
    """For `ibq_jax.autoregressive.run.train`."""
    validation = open_codes(trainer.config.codes, "validation")
    evaluator = likelihood_evaluator(trainer, validation, trainer.config.evaluate.examples)

    def evaluate(params: dict) -> dict[str, float | np.ndarray]:
        measured = evaluator(params)
        return {
            "validation/loss": measured.loss,
            "validation/perplexity": measured.perplexity,
            "validation/perplexity_by_position": measured.perplexity_by_position,
        }

    def pictures(params: dict) -> dict[str, np.ndarray]:
        return {} if tokenizer is None else {"samples": class_samples(trainer, params, manifest, tokenizer)}

    return evaluate, pictures


def likelihood_evaluator(trainer: GeneratorTrainer, source: CodeSource, examples: int) -> LikelihoodEvaluator:
    """On the codes of `source`; `examples` pictures of them, 0 for all."""
    config = trainer.config
    check_batch(config.evaluate.batch_size, trainer.mesh, 1, "evaluate.batch_size")

    def batches():
        return evaluation_code_batches(
            source,
            batch_size=config.evaluate.batch_size,
            examples=examples,
            rows=process_rows(trainer.mesh, config.evaluate.batch_size),
            threads=config.data.threads,
        )

    return LikelihoodEvaluator(trainer.code_losses, source.grid, trainer.mesh, batches)


def class_samples(
    trainer: GeneratorTrainer, params: dict, manifest: Mapping, tokenizer: TokenizerWeights
) -> np.ndarray:
    """A sheet of pictures of the first classes, the same numbers of the same seed each time."""
    config = trainer.config
    settings = {
        "guidance": Guidance(config.sample.cfg_scale),
        "keep": Filter(config.sample.top_k, config.sample.top_p),
        "temperature": config.sample.temperature,
        "seed": config.seed,
    }
    names = tuple(manifest["data"]["class_names"])[: config.log.images] or ("",)
    images = PictureSampler(trainer.model, params, tokenizer, trainer.mesh, settings)(
        np.repeat(np.arange(len(names)), PICTURES_A_CLASS)
    )
    return contact_sheet(images.reshape(len(names), PICTURES_A_CLASS, *images.shape[1:]), names)
