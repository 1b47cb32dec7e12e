"""Helpers of the tests of the tokenize command: its words, and the codes that a token cache should hold."""

from pathlib import Path

import numpy as np

from ibq_jax import Tokenizer
from ibq_jax.data.preprocess import decode_image, resize_shorter_side, views
from ibq_jax.data.sources import Example, ImageCollection
from ibq_jax.data.token_cache import open_token_cache
from ibq_jax.tokenizer.tokenize import padded_batches
from support.image_files import noise_file

SPLITS = "--splits=train[:100],validation[:20]"
SIDE = 16  # pixels of a crop


def command(run: Path, out: Path, *flags: str) -> list[str]:
    return ["tokenize", f"--run={run}", f"--out={out}", *(flags or (SPLITS,))]


def files(folder: Path) -> dict:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def expected_codes(run: Path, source, names: tuple[str, ...], resize: int = SIDE, use_ema: bool = True) -> np.ndarray:
    """Returns codes [N, V, h, w], as the public class encodes the crops."""
    crops = [views(resize_shorter_side(decode_image(record["image"]), resize), names, SIDE) for record in source]
    codes = encoded(Tokenizer.load(run, use_ema), np.concatenate(crops))
    return codes.reshape(len(crops), -1, *codes.shape[1:])


def encoded(tokenizer: Tokenizer, crops: np.ndarray) -> np.ndarray:
    """Returns the codes of crops, encoded 16 at a time: with one number of crops, a program is compiled once."""
    batches = padded_batches(iter(crops), 16)
    return np.concatenate([np.asarray(tokenizer.encode(batch)) for batch in batches])[: len(crops)]


def stored_codes(out: Path, split: str) -> np.ndarray:
    return np.stack([image["codes"] for image in open_token_cache(out, split)])


def noisy(name: str, classes: tuple[str, ...], broken: int | None) -> ImageCollection:
    """Returns 30 training images and 10 validation images of noise, of which number `broken` is none."""

    def examples():
        for i in range(40):
            content = b"junk" if i == broken else noise_file(i)
            split = "train" if i < 30 else "validation"
            yield Example(split, f"{i}.png", lambda content=content: content, 0 if classes else None)

    return ImageCollection(name, "noise", examples, class_names=classes)
