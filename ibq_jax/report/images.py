"""What a report shows of a run's weights: reconstructions and codes of a tokenizer, a generator's samples.

Shapes: an image [H, W, 3], its pictures uint8; K codes.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import numpy as np

from ibq_jax.api import Tokenizer
from ibq_jax.autoregressive.restore import find_tokenizer
from ibq_jax.autoregressive.restore import restore_run as restore_generator
from ibq_jax.base.checkpoint import Restored
from ibq_jax.base.errors import UsageError
from ibq_jax.data.preprocess import to_uint8
from ibq_jax.evaluate.validation import class_samples, validation_evaluator
from ibq_jax.report.curves import colour_errors, plot_ranks
from ibq_jax.report.page import png_uri, shown
from ibq_jax.tokenizer.restore import restore_run as restore_tokenizer
from ibq_jax.tokenizer.step import TokenizerTrainer

PICTURES = 8  # originals with their reconstructions
CODES_SHOWN = 16  # of the most used, and of the least
CODES_AROUND = 5  # codes a side of the patch that a code is decoded in, so that the middle has no border near
ERROR_FACTOR = 4


def pictures_of(run: Path, stage: str) -> tuple[Restored, dict, list[str]]:
    """Of a run's folder, or one of its checkpoints: what was restored; sections of a page ("strip" and "codes", or
    "pictures"); and what cannot be shown, in words. Raises UsageError when nothing is saved yet."""
    return _of_tokenizer(run) if stage == "tokenizer" else _of_generator(run)


def _of_tokenizer(run: Path) -> tuple[Restored, dict, list[str]]:
    trainer, restored = restore_tokenizer(run)
    try:
        evaluator = validation_evaluator(trainer, trainer.config.evaluate.examples)
        params = restored.state.ema
        counts = evaluator.histogram(params)
        strip = {"caption": _caption(), "uris": [png_uri(picture) for picture in _triples(trainer, evaluator, params)]}
    except UsageError as error:
        return restored, {}, [f"no reconstructions and no use of codes: {error}"]
    return restored, {"strip": strip, "codes": _codes(trainer, params, counts)}, []


def _caption() -> str:
    return (
        "Validation images, spread evenly over the split; below each its reconstruction, and the mean absolute error "
        f"of the three colours, {ERROR_FACTOR} times: black is none, the brightest is {255 // ERROR_FACTOR} grey "
        "levels of 255 and more."
    )


def _triples(trainer: TokenizerTrainer, evaluator, params: Mapping) -> Iterator[np.ndarray]:
    """uint8 [3 H, W, 3] each: an image above its reconstruction above their difference."""
    side, pairs = trainer.config.data.image_size, evaluator.picture(params, PICTURES)
    for left in range(0, pairs.shape[1], side):
        pair = pairs[:, left : left + side]
        if not pair.any():
            return  # the split has fewer images
        difference = np.abs(pair[:side].astype(float) - pair[side:]).mean(axis=-1) / 255
        yield np.concatenate([pair, colour_errors(np.minimum(difference * ERROR_FACTOR, 1.0))])


def _codes(trainer: TokenizerTrainer, params: Mapping, counts: np.ndarray) -> dict:
    """Which codes are used how often on validation images, and what the first and the last of them look like."""
    used = np.flatnonzero(counts)
    ranked = used[np.argsort(-counts[used], kind="stable")]
    groups = {"The most used codes": ranked[:CODES_SHOWN], "The least used of those in use": ranked[-CODES_SHOWN:]}
    patches = iter(_patches(trainer, params, np.concatenate(list(groups.values()))))
    words = (
        f"{len(used):,} of {len(counts):,} codes are chosen by {int(counts.sum()):,} tokens of validation images. A "
        f"code is shown as the middle of what {CODES_AROUND}x{CODES_AROUND} of it decode to, above its number and how "
        "often it is chosen."
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
    """uint8 [N, p, p, 3]: the middle of what a square of each code decodes to."""
    tokenizer = Tokenizer(trainer.model.clone(mesh=None), jax.device_get(params))
    grid = np.broadcast_to(codes[:, None, None], (len(codes), CODES_AROUND, CODES_AROUND))
    pictures = np.asarray(to_uint8(tokenizer.decode(grid)))
    patch = pictures.shape[1] // CODES_AROUND
    middle = slice(patch * (CODES_AROUND // 2), patch * (CODES_AROUND // 2 + 1))
    return pictures[:, middle, middle]


def _of_generator(run: Path) -> tuple[Restored, dict, list[str]]:
    trainer, restored, manifest = restore_generator(run)
    try:
        tokenizer = find_tokenizer(trainer.config.tokenizer, manifest, needed=True)
    except UsageError as error:
        return restored, {}, [f"no samples: {error}"]
    sheet = class_samples(trainer, restored.state.weights("ema"), manifest, tokenizer)
    sample = trainer.config.sample
    caption = (
        f"Guidance {sample.cfg_scale:g}, temperature {sample.temperature:g}, seed {trainer.config.seed}, not chosen."
    )
    return restored, {"pictures": [shown(sheet, caption, "Samples by class")]}, []
