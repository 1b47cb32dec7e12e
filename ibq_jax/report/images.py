"""Images for a report, made from a run's weights: a tokenizer's reconstructions and codes, a generator's samples.

Shapes: an image is uint8 [H, W, 3]; the codebook has K codes.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import numpy as np

from ibq_jax.api import Tokenizer
from ibq_jax.autoregressive.restore import TokenizerWeights, find_tokenizer
from ibq_jax.autoregressive.restore import restore_run as restore_generator
from ibq_jax.autoregressive.step import GeneratorTrainer
from ibq_jax.base.checkpoint import Restored
from ibq_jax.base.errors import UsageError
from ibq_jax.data.pipeline import open_split
from ibq_jax.data.preprocess import to_uint8
from ibq_jax.evaluate.validation import class_samples, validation_evaluator
from ibq_jax.joint.restore import restore_run as restore_joint_run
from ibq_jax.report.curves import colour_errors, plot_ranks
from ibq_jax.report.page import figure, png_uri
from ibq_jax.tokenizer.restore import restore_run as restore_tokenizer
from ibq_jax.tokenizer.step import TokenizerTrainer

NUM_IMAGES = 8  # shown with their reconstructions
CODES_SHOWN = 16  # of the most used and of the least used codes each
PATCH_CODES = 5  # side, in codes, of the square of one repeated code that is decoded; its middle is far from the border
ERROR_FACTOR = 4  # errors are shown this many times larger


def images_of(run: Path, stage: str) -> tuple[Restored, dict, list[str]]:
    """Makes the images that a report shows.

    Args:
        run: the folder of a run, or of one of its checkpoints.
        stage: of the run.

    Returns:
        the restored state; sections of the page ("strip" and "codes" of a tokenizer, "images" of a generator); and
        sentences on what could not be made.

    Raises:
        UsageError: nothing is saved yet.
    """
    return {"tokenizer": _of_tokenizer, "autoregressive": _of_generator, "joint": _of_joint_run}[stage](run)


def _of_tokenizer(run: Path) -> tuple[Restored, dict, list[str]]:
    trainer, restored = restore_tokenizer(run)
    return restored, *_reconstructions(trainer, restored.state.weights("ema"))


def _of_joint_run(run: Path) -> tuple[Restored, dict, list[str]]:
    trainer, restored = restore_joint_run(run)
    params = {name: getattr(restored.state, name).weights("ema") for name in ("tokenizer", "generator")}
    sections, missing = _reconstructions(trainer.tokenizer, params["tokenizer"])
    data = trainer.tokenizer.config.data
    try:
        names = open_split(data.name, data.dir, data.validation_split).class_names
    except UsageError:  # the reconstructions' absence has said why
        names = ()
    decoder = trainer.tokenizer.encoding_model, params["tokenizer"]
    samples = _samples(trainer.generator, params["generator"], {"data": {"class_names": names}}, decoder)
    return restored, sections | samples, missing


def _reconstructions(trainer: TokenizerTrainer, params: dict) -> tuple[dict, list[str]]:
    """Returns the sections "strip" and "codes", and sentences on what could not be made."""
    try:
        evaluator = validation_evaluator(trainer, trainer.config.evaluate.examples)
        counts = evaluator.histogram(params)
        strip = {"caption": _caption(), "uris": [png_uri(image) for image in _triples(trainer, evaluator, params)]}
    except UsageError as error:
        return {}, [f"no reconstructions and no code frequencies: {error}"]
    return {"strip": strip, "codes": _codes(trainer, params, counts)}, []


def _caption() -> str:
    return (
        "Validation images, evenly spaced in the split. Below each are its reconstruction and the absolute error, "
        f"averaged over the three colours: black is no error, the brightest is {255 // ERROR_FACTOR} of 255 grey "
        "levels or more."
    )


def _triples(trainer: TokenizerTrainer, evaluator, params: Mapping) -> Iterator[np.ndarray]:
    """Yields uint8 [3 H, W, 3]: an image above its reconstruction above their difference."""
    side, pairs = trainer.config.data.image_size, evaluator.comparison_grid(params, NUM_IMAGES)
    for left in range(0, pairs.shape[1], side):
        pair = pairs[:, left : left + side]
        if not pair.any():
            return  # the split has fewer images
        difference = np.abs(pair[:side].astype(float) - pair[side:]).mean(axis=-1) / 255
        yield np.concatenate([pair, colour_errors(np.minimum(difference * ERROR_FACTOR, 1.0))])


def _codes(trainer: TokenizerTrainer, params: Mapping, counts: np.ndarray) -> dict:
    """Returns the page's section on how often each code is used on validation images (`counts` [K]), with the most and
    the least used codes decoded."""
    used = np.flatnonzero(counts)
    ranked = used[np.argsort(-counts[used], kind="stable")]
    groups = {
        "The most used codes": ranked[:CODES_SHOWN],
        "The least used codes, of those in use": ranked[-CODES_SHOWN:],
    }
    patches = iter(_patches(trainer, params, np.concatenate(list(groups.values()))))
    words = (
        f"{len(used):,} of {len(counts):,} codes are used by the {int(counts.sum()):,} tokens of validation images. "
        f"Each code is shown as the middle of a decoded {PATCH_CODES}x{PATCH_CODES} square of it, above its number and "
        "its count."
    )
    return {
        "words": words,
        "ranks": plot_ranks(counts),
        "groups": [
            {
                "title": title,
                "codes": [
                    {"number": int(code), "count": f"{int(counts[code]):,}", "uri": png_uri(next(patches))}
                    for code in codes
                ],
            }
            for title, codes in groups.items()
        ],
    }


def _patches(trainer: TokenizerTrainer, params: Mapping, codes: np.ndarray) -> np.ndarray:
    """Returns uint8 [N, p, p, 3]: the middle of the image that a square of each of the N codes decodes to."""
    tokenizer = Tokenizer(trainer.encoding_model.clone(mesh=None), jax.device_get(params))
    grid = np.broadcast_to(codes[:, None, None], (len(codes), PATCH_CODES, PATCH_CODES))
    images = np.asarray(to_uint8(tokenizer.decode(grid)))
    patch = images.shape[1] // PATCH_CODES
    middle = slice(patch * (PATCH_CODES // 2), patch * (PATCH_CODES // 2 + 1))
    return images[:, middle, middle]


def _of_generator(run: Path) -> tuple[Restored, dict, list[str]]:
    trainer, restored, manifest = restore_generator(run)
    try:
        tokenizer = find_tokenizer(trainer.config.tokenizer, manifest, needed=True)
        assert tokenizer is not None  # as it was needed
    except UsageError as error:
        return restored, {}, [f"no samples: {error}"]
    return restored, _samples(trainer, restored.state.weights("ema"), manifest, tokenizer), []


def _samples(trainer: GeneratorTrainer, params: dict, manifest: Mapping, tokenizer: TokenizerWeights) -> dict:
    """Returns the section "images"; `manifest` names the classes."""
    sheet, sample = class_samples(trainer, params, manifest, tokenizer), trainer.config.sample
    caption = (
        f"Guidance scale {sample.cfg_scale:g}, temperature {sample.temperature:g}, seed {trainer.config.seed}; not "
        "selected by hand."
    )
    return {"images": [figure(sheet, caption, "Samples by class")]}
