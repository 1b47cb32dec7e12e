"""Small token caches of made-up codes, written as `tokenize` writes them."""

import numpy as np

from ibq_jax.base.files import atomic_file
from ibq_jax.data.token_cache import record_type
from ibq_jax.data.token_cache_writer import finish, list_shards, locked_cache, shard_count, write_records

COUNT, VIEWS, GRID, CODES = 23, 3, (2, 3), 300


def settings(classes: int = 5, codes: int = CODES, images: int = COUNT, **fields) -> dict:
    splits = {
        name: {"source": name, "images": size, "views": list("abc"), "crops": VIEWS, "shards": shard_count(size)}
        for name, size in (("train", images), ("validation", 4))
    }
    return {
        "version": 1,
        "tokenizer": {"fingerprint": "f", "path": "/runs/tok", "step": 3},
        "data": {"name": "noise", "class_names": list("abcde"[:classes]), "splits": splits},
        "codes": codes,
        "grid": list(GRID),
        "dtype": np.min_scalar_type(codes - 1).name,
        **fields,
    }


def codes_of(index: int, codes: int = CODES) -> np.ndarray:
    """[V, h, w] of one image."""
    return np.random.default_rng(index).integers(0, codes, (VIEWS, *GRID))


def write_shards(folder, of: dict, numbers=range(100)) -> None:
    for shard in list_shards(folder, of):
        if shard.number in numbers:
            shard.path.parent.mkdir(exist_ok=True)
            with atomic_file(shard.path) as partial:
                if partial is not None:
                    records = np.zeros(len(shard.images), record_type(shard.split, of))
                    for record, index in zip(records, shard.images, strict=True):
                        label = index % 5 if of["data"]["class_names"] else -1
                        record["index"], record["label"], record["codes"] = index, label, codes_of(index, of["codes"])
                    write_records(partial, records)


def write_cache(folder, of: dict) -> dict:
    with locked_cache(folder, of, overwrite=False):
        write_shards(folder, of)
        return finish(folder, of)
