"""The proof that training left an image's codes as they were: validation images are encoded before and after.

run/codes_before.npy   the codes before the first step, [N, h, w]
"""

import io
from pathlib import Path

import jax
import numpy as np

from ibq_jax.base.errors import Failed
from ibq_jax.base.files import write_bytes

BEFORE = "codes_before.npy"


def note_codes(workdir: Path, codes: np.ndarray) -> None:
    """Writes the codes [N, h, w] that images have before training, in one process."""
    if jax.process_index() == 0:
        file = io.BytesIO()
        np.save(file, codes.astype(np.min_scalar_type(codes.max())))
        write_bytes(workdir / BEFORE, file.getvalue())


def check_codes(workdir: Path, codes: np.ndarray) -> str:
    """Compares codes [N, h, w] with those before training and returns the result in words.

    Raises Failed if any differs.
    """
    before = np.load(io.BytesIO((workdir / BEFORE).read_bytes()))
    changed = int(np.sum(before != codes))
    if changed:
        raise Failed(f"{changed:,} of {codes.size:,} codes of validation images changed, though their parts are frozen")
    return f"the codes of {len(codes):,} validation images, {codes.size:,} in all, are those of before training"
