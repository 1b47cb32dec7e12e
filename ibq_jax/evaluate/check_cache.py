"""Checks a token cache once its shards are whole: compares a sample with full float32, and draws what codes decode to.

The comparison encodes the sample again on a single device in batches of another size. So it also shows that an image's
codes do not depend on its batch, its neighbours or the number of devices.

Shapes: N sampled crops [S, S, 3] and their codes [h, w].
"""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from ibq_jax.data.preprocess import to_uint8
from ibq_jax.data.token_cache import COMPARED, SHEET, TokenCacheSplit
from ibq_jax.evaluate.contact_sheet import contact_sheet
from ibq_jax.tokenizer.model import TokenizerModel
from ibq_jax.tokenizer.tokenize import TokenizeJob, encode_crops, padded_batches

SAMPLED_IMAGES = 64  # spread over the training split; of each, the first crop
SHOWN_IMAGES, COLUMNS = 16, 8  # of the sheet

encode = jax.jit(encode_crops, static_argnums=0)


def check_token_cache(
    folder: Path, settings: Mapping, model: TokenizerModel, params: Mapping, job: TokenizeJob
) -> dict:
    """Compares a sample of the cache's codes with full float32, and writes the sheet of decoded images.

    Args:
        folder: the cache, whose shards are whole.
        settings: its settings (see `token_cache_writer`).
        model: the tokenizer.
        params: its parameters, as for `tokenize`.
        job: what was encoded.

    Returns:
        the manifest's fields about it: {"compared_with_float32": {"sampled_codes", "differing_codes"}}.

    Raises:
        UsageError: a record is damaged.
    """
    stored, model = TokenCacheSplit(folder, "train", settings), model.clone(mesh=None)
    params = jax.device_put(jax.device_get(params), jax.local_devices()[0])
    indices = evenly_spaced(len(stored), SAMPLED_IMAGES)
    crops = np.stack([job.load("train", index)["crops"][0] for index in indices])
    codes = np.stack([stored[index]["codes"][0] for index in indices]).astype(np.int32)
    in_batches = functools.partial(_in_batches, size=_other_batch_size(job))
    again = in_batches(functools.partial(encode, model.for_encoding("float32"), params), crops)
    shown = evenly_spaced(len(indices), SHOWN_IMAGES)
    decoded = in_batches(functools.partial(decode_to_uint8, model.for_encoding(job.precision), params), codes[shown])
    Image.fromarray(sheet(crops[shown], decoded)).save(folder / SHEET, "PNG")
    compared = {"sampled_codes": codes.size, "differing_codes": int(np.count_nonzero(again != codes))}
    return {COMPARED: compared}


@functools.partial(jax.jit, static_argnums=0)
def decode_to_uint8(model: TokenizerModel, params: Mapping, codes: jax.Array) -> jax.Array:
    """Returns the images, uint8 [B, H, W, 3], of codes [B, h, w]."""
    return to_uint8(model.apply({"params": params}, codes, method="decode"))


def evenly_spaced(length: int, most: int) -> list[int]:
    """Returns at most `most` positions, spread over `length` of them."""
    count = min(length, most)
    return [number * length // count for number in range(count)]


def _other_batch_size(job: TokenizeJob) -> int:
    """Returns a number of crops on one device that is not the one with which the cache was encoded."""
    per_device = job.batch_size // len(jax.local_devices())
    return per_device // 2 if per_device > 1 else 2


def _in_batches(function: Callable[[np.ndarray], jax.Array], rows: np.ndarray, size: int) -> np.ndarray:
    """Applies `function` to `size` rows at a time, padded with zeros; returns the results of all rows."""
    results = [np.asarray(function(batch)) for batch in padded_batches(iter(rows), size)]
    return np.concatenate(results)[: len(rows)]


def sheet(originals: np.ndarray, decoded: np.ndarray) -> np.ndarray:
    """Lays out crops [N, S, S, 3] in rows, each above the row of its decoded ones; free places are white."""
    columns = min(COLUMNS, len(originals))
    rows = -(-len(originals) // columns)
    pairs = np.full((rows * columns, 2, *originals.shape[1:]), 255, np.uint8)
    pairs[: len(originals)] = np.stack([originals, decoded], axis=1)
    grid = pairs.reshape(rows, columns, *pairs.shape[1:]).swapaxes(1, 2)  # [rows, 2, columns, S, S, 3]
    return contact_sheet(grid.reshape(2 * rows, columns, *grid.shape[3:]), ["original", "decoded"] * rows)
