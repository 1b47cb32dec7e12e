"""Writes a numbered set of samples as an .npz, in parts, so that an interrupted set can be continued.

The .npz is what the ADM evaluation suite (github.com/openai/guided-diffusion) reads: `arr_0` uint8 [N, H, W, 3], and
`arr_1` int64 [N], the labels. Part k holds samples 256 k to 256 k + 255, whoever draws it. So a set that
was interrupted or shared by several processes is the same as one that a single process drew without interruption.
"""

import functools
import json
import shutil
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ibq_jax.base.config import differences
from ibq_jax.base.errors import UsageError
from ibq_jax.base.parts import claim_folder, join_parts, write_part

SAMPLES_PER_PART = 256

Draw = Callable[[np.ndarray, np.ndarray], np.ndarray]  # labels [n], sample ids [n] -> uint8 [n, H, W, 3]


def write_sample_set(
    path: Path,
    labels: np.ndarray,
    draw: Draw,
    settings: Mapping,
    *,
    process_index: int = 0,
    process_count: int = 1,
) -> bool:
    """Draws this process's parts of the set `path` (.npz), and joins them once all parts exist.

    Args:
        path: the set. Until they are joined, its parts are in `path`.parts; its settings are next to it as .json.
        labels: [N], one per sample.
        draw: draws the samples with given labels and ids.
        settings: everything that the samples depend on; a set begun with other settings is not continued.
        process_index: which of process_count processes this is.
        process_count: number of processes that share the parts.

    Returns:
        True once the set is complete; False while other processes are drawing their parts.

    Raises:
        UsageError: `path` exists, it was begun with other settings, or the disk is full.
    """
    if path.exists():
        raise UsageError(f"{path} exists already; name a file that does not")
    parts = path.with_name(path.name + ".parts")
    begun = _claim(parts, {**settings, "pictures": len(labels)})  # the key that sets have always had
    starts = range(0, len(labels), SAMPLES_PER_PART)
    files = [parts / f"{number:05}-of-{len(starts):05}.npy" for number in range(len(starts))]
    with tqdm(total=len(labels), unit=" samples", dynamic_ncols=True) as bar:
        for number, (start, file) in enumerate(zip(starts, files, strict=True)):
            sample_ids = np.arange(start, min(start + SAMPLES_PER_PART, len(labels)))
            if file.exists() or number % process_count == process_index:
                write_part(file, functools.partial(_draw_part, draw, labels[sample_ids], sample_ids))
                bar.update(len(sample_ids))
    if not join_parts(files, path, functools.partial(_join, files, labels)):
        return False
    path.with_suffix(".json").write_text(begun.read_text())
    shutil.rmtree(parts, ignore_errors=True)
    return True


def _claim(parts: Path, settings: Mapping) -> Path:
    """Returns the file with the set's settings. Raises UsageError if the set was begun with others."""
    file = claim_folder(parts, settings)
    differing = differences(json.loads(file.read_text()), json.loads(json.dumps(settings)))
    if differing:
        raise UsageError(f"{parts} is a set begun with other settings ({'; '.join(differing)}); name another --out")
    return file


def _draw_part(draw: Draw, labels: np.ndarray, sample_ids: np.ndarray, path: Path) -> None:
    images = draw(labels, sample_ids)
    with path.open("wb") as out:
        np.save(out, images)


def _join(files: list[Path], labels: np.ndarray, path: Path) -> None:
    """Writes the .npz part by part, because 50,000 samples of 256 pixels take 10 GB."""
    shape = (len(labels), *np.load(files[0], mmap_mode="r").shape[1:])
    with path.open("wb") as out, zipfile.ZipFile(out, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as member:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(member, header)
            for file in files:
                member.write(np.load(file).tobytes())
        with archive.open("arr_1.npy", "w") as member:
            np.lib.format.write_array(member, np.asarray(labels, np.int64))
