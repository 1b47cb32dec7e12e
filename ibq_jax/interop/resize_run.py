"""Makes a tokenizer's run with a larger or smaller codebook from another run."""

import copy
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ibq_jax.autoregressive.restore import find_tokenizer
from ibq_jax.base.checkpoint import Checkpoints
from ibq_jax.base.config import save_config
from ibq_jax.base.files import atomic_folder
from ibq_jax.data.code_export import OLD_TO_NEW, open_codes
from ibq_jax.evaluate.validation import validation_evaluator
from ibq_jax.tokenizer.check import check_config
from ibq_jax.tokenizer.quantizers import check_trained_rows
from ibq_jax.tokenizer.resize_codebook import grow_index_map, inverse_index_map, prune_index_map, resize_codebook
from ibq_jax.tokenizer.restore import restore_whole_run

# In the new run: the old index of every new code, int32, and the new index of every old code, -1 if it was dropped.
INDEX_MAP, INVERSE_MAP = "index_map.npy", OLD_TO_NEW


@dataclass(frozen=True)
class Resized:
    """The new run's step, and the number of codes before and after."""

    step: int
    before: int
    after: int


def resize_run(
    source: Path,
    out: Path,
    *,
    codebook_size: int | None,
    codes: Path | None = None,
    multiple_of: int = 64,
    spread: float = 0.02,
) -> Resized:
    """Makes the run `out`, which training continues, from the run `source` with another codebook size.

    Args:
        source: a tokenizer's run.
        out: the folder of the new run, which must not exist.
        codebook_size: the larger size, reached by splitting codes; None drops codes that are not used.
        codes: when codes are dropped, the token cache of `source` that says which are used; None for the codes of the
            validation split.
        multiple_of: when codes are dropped, the new size is a multiple of this.
        spread: when codes are split, the distance of the copies from their code, relative to the root mean square of
            the codebook.

    Raises:
        UsageError: there is no such run, its quantizer has no trained codebook, or it cannot have that size; or the
            token cache is of another tokenizer.
    """
    counts = None if codes is None else _counts_of(codes, source)
    trainer, restored = restore_whole_run(source)
    check_trained_rows(trainer.model.quantizer, "a codebook of another size")
    before = trainer.config.codebook.size
    if codebook_size is None:
        if counts is None:
            counts = validation_evaluator(trainer, num_images=0).histogram(restored.state.weights("ema"))
        index_map = prune_index_map(counts, multiple_of)
    else:
        index_map = grow_index_map(before, codebook_size)
    config = copy.deepcopy(trainer.config).unlock()
    config.codebook.size = len(index_map)
    check_config(config.lock(), trainer.mesh)
    state = resize_codebook(restored.state, index_map, spread, config.seed)
    with atomic_folder(out) as partial:
        save_config(config, partial / "config.json")
        np.save(partial / INDEX_MAP, index_map)
        np.save(partial / INVERSE_MAP, inverse_index_map(index_map, before))
        checkpoints = Checkpoints(partial / "checkpoints")
        checkpoints.save(restored.step, state, {**restored.metadata, "config": config.to_dict()})
        checkpoints.close()
    return Resized(restored.step, before, len(index_map))


def _counts_of(codes: Path, source: Path) -> np.ndarray:
    """Returns how often each code occurs in a token cache, int64 [K]. Raises UsageError if `source` did not make it."""
    cached = open_codes(codes)
    find_tokenizer(str(source), cached.manifest, needed=True)
    return cached.counts()
