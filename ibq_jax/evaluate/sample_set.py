"""A numbered set of generated pictures, written in parts that survive a kill, then joined into one .npz.

The .npz is what the ADM evaluation suite (github.com/openai/guided-diffusion) reads: `arr_0` uint8 [N, H, W, 3], and
`arr_1` int64 [N], the labels. Part k holds pictures k * 256 and on, whoever draws it: a set that was killed and started
again, or shared by several processes, is the one that a single undisturbed process makes.
"""

import json
import shutil
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ibq_jax.base.config import differences
from ibq_jax.base.errors import UsageError
from ibq_jax.base.files import atomic_file

PART_PICTURES = 256
SETTINGS = "settings.json"

Draw = Callable[[np.ndarray, np.ndarray], np.ndarray]  # labels [n], numbers [n] -> uint8 [n, H, W, 3]


def write_sample_set(
    path: Path,
    labels: np.ndarray,
    draw: Draw,
    settings: Mapping,
    *,
    process_index: int = 0,
    process_count: int = 1,
) -> bool:
    """Draws this process's parts of the set `path` (.npz) and, once all parts are there, joins them.

    Args:
        path: the set; its parts lie in `path`.parts until they are joined, its settings stay beside it as .json.
        labels: of all N pictures.
        draw: makes the pictures of some labels and numbers.
        settings: what the pictures depend on; a set of other settings is not gone on with.
        process_index: this process's place among process_count.
        process_count: processes that share the parts.

    Returns:
        whether the set is complete; False while other processes draw their parts.

    Raises:
        UsageError: `path` exists, its parts are of other settings, or the disk is full.
    """
    if path.exists():
        raise UsageError(f"{path} exists already; name a file that does not")
    parts = path.with_name(path.name + ".parts")
    _claim(parts, {**settings, "pictures": len(labels)})
    starts = range(0, len(labels), PART_PICTURES)
    files = [parts / f"{number:05}-of-{len(starts):05}.npy" for number in range(len(starts))]
    with tqdm(total=len(labels), unit=" pictures", dynamic_ncols=True) as bar:
        for number, (start, file) in enumerate(zip(starts, files, strict=True)):
            numbers = np.arange(start, min(start + PART_PICTURES, len(labels)))
            if not file.exists() and number % process_count != process_index:
                continue
            with atomic_file(file) as partial:
                if partial is not None:
                    pictures = draw(labels[numbers], numbers)
                    with partial.open("wb") as out:
                        np.save(out, pictures)
            bar.update(len(numbers))
    if not all(file.exists() for file in files):
        return False
    with atomic_file(path, wait=True) as partial:
        if partial is not None:
            _join(files, labels, partial)
    path.with_suffix(".json").write_text((parts / SETTINGS).read_text())
    shutil.rmtree(parts, ignore_errors=True)
    return True


def _claim(parts: Path, settings: Mapping) -> None:
    parts.mkdir(parents=True, exist_ok=True)
    with atomic_file(parts / SETTINGS, wait=True) as partial:
        if partial is not None:
            partial.write_text(json.dumps(settings, indent=2) + "\n")
    begun = json.loads((parts / SETTINGS).read_text())
    differing = differences(begun, json.loads(json.dumps(settings)))
    if differing:
        raise UsageError(f"{parts} is a set begun with other settings ({'; '.join(differing)}); name another --out")


def _join(files: list[Path], labels: np.ndarray, path: Path) -> None:
    """Part by part: a set of 50,000 pictures of 256 pixels has ten gigabytes."""
    shape = (len(labels), *np.load(files[0], mmap_mode="r").shape[1:])
    with path.open("wb") as out, zipfile.ZipFile(out, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as member:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(member, header)
            for file in files:
                member.write(np.load(file).tobytes())
        with archive.open("arr_1.npy", "w") as member:
            np.lib.format.write_array(member, np.asarray(labels, np.int64))
