"""Writes small token caches of random codes, as `tokenize` does."""

import functools
import json
from collections import Counter
from pathlib import Path

import numpy as np

from ibq_jax.base.parts import write_part
from ibq_jax.data.mixed_cache import MixedImage, part_paths
from ibq_jax.data.mixed_cache_writer import PartSummary, finish_mixed, settle_shapes, survey, write_part_file
from ibq_jax.data.token_cache import record_type
from ibq_jax.data.token_cache_writer import Shard, finish, list_shards, locked_cache, shard_count, write_records

COUNT, VIEWS, GRID, CODEBOOK_SIZE = 23, 3, (2, 3), 300


def settings(classes: int = 5, codebook_size: int = CODEBOOK_SIZE, images: int = COUNT, **fields) -> dict:
    """Returns a cache's settings: `images` training images and 4 validation images."""
    splits = {
        name: {"source": name, "images": size, "views": list("abc"), "crops": VIEWS, "shards": shard_count(size)}
        for name, size in (("train", images), ("validation", 4))
    }
    return {
        "version": 2,
        "tokenizer": {"fingerprint": "f", "path": "/runs/tok", "step": 3},
        "data": {"name": "noise", "class_names": list("abcde"[:classes]), "splits": splits},
        "precision": "float32",
        "machine": {"platform": "cpu", "device_kind": "cpu"},
        "codebook_size": codebook_size,
        "grid": list(GRID),
        "dtype": np.min_scalar_type(codebook_size - 1).name,
        **fields,
    }


def codes_of(index: int, codebook_size: int = CODEBOOK_SIZE) -> np.ndarray:
    """Returns the codes [V, h, w] of one image."""
    return np.random.default_rng(index).integers(0, codebook_size, (VIEWS, *GRID))


def write_shards(folder: Path, fields: dict, numbers=range(100), unlabelled: int = 0) -> None:
    """Writes the shards of some numbers in both splits; the first `unlabelled` images are of none of the classes."""
    for shard in list_shards(folder, fields):
        if shard.number in numbers:
            write_part(shard.path, functools.partial(_write_shard, shard, fields, unlabelled))


def _write_shard(shard: Shard, fields: dict, unlabelled: int, path: Path) -> None:
    records = np.zeros(len(shard.images), record_type(shard.split, fields))
    for record, index in zip(records, shard.images, strict=True):
        label = index % 5 if fields["data"]["class_names"] and index >= unlabelled else -1
        record["index"], record["label"], record["codes"] = index, label, codes_of(index, fields["codebook_size"])
    write_records(path, records)


def write_cache(folder: Path, fields: dict, unlabelled: int = 0) -> dict:
    """Writes a complete cache and returns its manifest."""
    with locked_cache(folder, fields, overwrite=False):
        write_shards(folder, fields, unlabelled=unlabelled)
        return finish(folder, fields)


def make_version_1(folder: Path) -> None:
    """Turns a cache, complete or not, into one that the first format version would have written."""
    for name, old_name in (("settings.json", "settings.json"), ("token_cache.json", "manifest.json")):
        if (folder / name).exists():
            fields = json.loads((folder / name).read_text())
            fields |= {"version": 1, "codes": fields.pop("codebook_size")}
            del fields["machine"]
            for counts in fields.get("splits", {}).values():
                counts["codes"] = counts.pop("num_tokens")
            (folder / name).unlink()
            (folder / old_name).write_text(json.dumps(fields, indent=2) + "\n")


MIXED = [MixedImage(f"{i}.png", codes_of(i)[0][:, : 2 + i % 2], {"txt": f"number {i}"} if i else {}) for i in range(5)]


def mixed_settings(codebook_size: int = CODEBOOK_SIZE) -> dict:
    """Returns the settings of a cache of mixed sizes with two parts."""
    return {
        "version": 3,
        "tokenizer": {"fingerprint": "f", "path": "/runs/tok", "step": 3},
        "images": {"source": "/photos", "names": "n", "parts": 2},
        "precision": "float32",
        "machine": {"platform": "cpu", "device_kind": "cpu"},
        "codebook_size": codebook_size,
        "dtype": np.min_scalar_type(codebook_size - 1).name,
    }


def write_mixed_cache(folder: Path) -> dict:
    """Writes a complete cache of the images MIXED, of 2x2 and 2x3 codes, and returns its manifest."""
    fields = mixed_settings()
    with locked_cache(folder, fields, overwrite=False):
        found = survey(folder, fields, lambda number: (2 + number, Counter({(2, 2): 1, (2, 3): 1})), range(2))
        settle_shapes(folder, found.sizes, 2)
        for path, images in zip(part_paths(folder, fields), (MIXED[:2], MIXED[2:]), strict=True):

            def write(partial: Path, path=path, images=images) -> None:
                write_part_file(path, partial, images, np.dtype(fields["dtype"]), PartSummary(own_size=len(images)))

            write_part(path, write)
        return finish_mixed(folder, fields)
