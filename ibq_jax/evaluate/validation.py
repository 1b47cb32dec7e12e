"""Evaluators on a run's validation data, used while it trains and afterwards."""

from collections.abc import Callable, Iterable, Mapping

import numpy as np

from ibq_jax.autoregressive.generate import LogitFilter
from ibq_jax.autoregressive.restore import TokenizerWeights
from ibq_jax.autoregressive.sample_codes import Guidance
from ibq_jax.autoregressive.sample_images import ImageSampler
from ibq_jax.autoregressive.step import GeneratorTrainer
from ibq_jax.base.sharding import check_batch, process_rows
from ibq_jax.data.batches import ArrayDict
from ibq_jax.data.pipeline import evaluation_batches, open_split
from ibq_jax.data.token_cache import TokenCacheSplit, evaluation_code_batches
from ibq_jax.evaluate.contact_sheet import contact_sheet
from ibq_jax.evaluate.feature_nets import NO_FEATURE_NETS, FeatureNets
from ibq_jax.evaluate.likelihood import LikelihoodEvaluator
from ibq_jax.evaluate.protocols import PROTOCOLS, Protocol, find_protocol
from ibq_jax.evaluate.reconstruction import ReconstructionEvaluator
from ibq_jax.joint.step import JointTrainer
from ibq_jax.tokenizer.step import TokenizerTrainer

SAMPLES_PER_CLASS = 4  # in a training run's contact sheets


def validation_evaluator(
    trainer: TokenizerTrainer,
    num_images: int,
    protocol: Protocol = PROTOCOLS["clean"],
    feature_nets: FeatureNets = NO_FEATURE_NETS,
) -> ReconstructionEvaluator:
    """Returns an evaluator on the validation split of the trainer's config.

    Args:
        trainer: reconstructs images; its config names the data.
        num_images: how many images to measure, evenly spaced in the split (0: all).
        protocol: how to measure.
        feature_nets: networks for LPIPS and Frechet distances.

    Raises:
        UsageError: the data set is not on this machine, or the batch size does not divide over the devices.
    """
    batches = _image_batches(trainer, protocol)
    return ReconstructionEvaluator(
        trainer.reconstruct,
        trainer.config.codebook.size,
        trainer.mesh,
        batches,
        num_images,
        protocol,
        feature_nets,
    )


def _image_batches(trainer: TokenizerTrainer, protocol: Protocol) -> Callable[[int], Iterable[ArrayDict]]:
    """Returns what starts a pass over a number of validation images, evenly spaced in the split (0: all)."""
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
            method=protocol.resize,
            num_threads=config.data.num_threads,
        )

    return batches


def likelihood_evaluator(trainer: GeneratorTrainer, source: TokenCacheSplit, num_images: int) -> LikelihoodEvaluator:
    """Returns an evaluator on the codes of `source`, of `num_images` images evenly spaced in the split (0: all)."""
    config = trainer.config
    check_batch(config.evaluate.batch_size, trainer.mesh, 1, "evaluate.batch_size")

    def batches():
        return evaluation_code_batches(
            source,
            batch_size=config.evaluate.batch_size,
            examples=num_images,
            rows=process_rows(trainer.mesh, config.evaluate.batch_size),
            num_threads=config.data.num_threads,
        )

    return LikelihoodEvaluator(trainer.code_losses, source.grid, trainer.mesh, batches)


def image_likelihood_evaluator(trainer: JointTrainer) -> LikelihoodEvaluator:
    """Returns an evaluator of a joint trainer's generator on the codes that its tokenizer gives validation images."""
    config = trainer.tokenizer.config
    batches = _image_batches(trainer.tokenizer, find_protocol(config.evaluate.protocol))
    grid = trainer.generator.model.grid
    return LikelihoodEvaluator(
        trainer.code_losses, grid, trainer.mesh, lambda: batches(config.evaluate.examples), of="image"
    )


def class_samples(
    trainer: GeneratorTrainer, params: dict, manifest: Mapping, tokenizer: TokenizerWeights
) -> np.ndarray:
    """Draws a contact sheet of samples of the first `log.num_images` classes: uint8 [height, width, 3].

    `manifest` is that of the token cache, which names the classes. Seed and sample ids are the same each time.
    """
    config = trainer.config
    settings = {
        "guidance": Guidance(config.sample.cfg_scale),
        "logit_filter": LogitFilter(config.sample.top_k, config.sample.top_p),
        "temperature": config.sample.temperature,
        "seed": config.seed,
    }
    names = tuple(manifest["data"]["class_names"])[: config.log.num_images] or ("",)
    images = ImageSampler(trainer.model, params, tokenizer, trainer.mesh, settings)(
        np.repeat(np.arange(len(names)), SAMPLES_PER_CLASS)
    )
    return contact_sheet(images.reshape(len(names), SAMPLES_PER_CLASS, *images.shape[1:]), names)
