"""Decodes stored codes of any shapes to PNG files.

Shapes: codes [h, w]; images of equal shape are decoded together.
"""

import functools
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

import jax
import numpy as np
from PIL import Image
from tqdm import tqdm

from ibq_jax.data.code_files import CodedImage
from ibq_jax.data.preprocess import to_uint8
from ibq_jax.data.sources import IMAGE_SUFFIXES
from ibq_jax.tokenizer.model import TokenizerModel

LONGEST_NAME = 80  # characters of an image's name in its file's


def detokenize(
    model: TokenizerModel, params: Mapping, images: Iterable[CodedImage], folder: Path, batch_tokens: int
) -> int:
    """Decodes images and writes each to `folder`, as NUMBER_NAME.png. Returns how many there were.

    Args:
        model: the tokenizer.
        params: its parameters.
        images: the codes.
        folder: the folder, created if absent; files of the same name are replaced.
        batch_tokens: the most tokens that are decoded at once, but at least one image.
    """
    folder.mkdir(parents=True, exist_ok=True)
    decode = functools.partial(_decode, model.clone(mesh=None), params)
    waiting: dict[tuple[int, ...], list[tuple[Path, np.ndarray]]] = defaultdict(list)
    count = 0
    for image in tqdm(images, unit=" images", disable=None, dynamic_ncols=True):
        group = waiting[image.codes.shape]
        group.append((folder / file_name(count, image.name), image.codes))
        if len(group) == max(1, batch_tokens // image.codes.size):
            _write(waiting.pop(image.codes.shape), decode)
        count += 1
    for group in waiting.values():
        _write(group, decode)
    return count


def file_name(number: int, name: str) -> str:
    """Returns the name of an image's file, which has no folder and no character that a shell or file system minds."""
    stem, _, suffix = name.rpartition(".")
    name = stem if suffix.lower() in IMAGE_SUFFIXES else name
    safe = re.sub(r"[^A-Za-z0-9.-]+", "_", name).strip("._-")[-LONGEST_NAME:]
    return f"{number:06}_{safe}.png" if safe else f"{number:06}.png"


def _write(group: list[tuple[Path, np.ndarray]], decode) -> None:
    pixels = decode(np.stack([codes for _, codes in group]).astype(np.int32))
    for (path, _), image in zip(group, np.asarray(pixels), strict=True):
        Image.fromarray(image).save(path)


@functools.partial(jax.jit, static_argnums=0)
def _decode(model: TokenizerModel, params: Mapping, codes: jax.Array) -> jax.Array:
    return to_uint8(model.apply({"params": params}, codes, method="decode"))
