"""Readers of foreign files, given damaged and random ones: they read them or raise a one-line error.

In CI the examples are few and always the same ones; IBQ_FUZZ_EXAMPLES=N tries N times as many, new ones each time:

    IBQ_FUZZ_EXAMPLES=100 python -m pytest tests/data/test_hostile_files.py --hypothesis-show-statistics
"""

import functools
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from support.image_files import noise_file, write_tar
from support.token_caches import make_version_1, write_cache, write_mixed_cache
from support.token_caches import settings as cache_settings

from ibq_jax.base.config import read_config
from ibq_jax.base.errors import UsageError
from ibq_jax.data.code_export import export_codes, open_codes
from ibq_jax.data.code_layouts import LAYOUTS
from ibq_jax.data.mixed_cache import MixedCache
from ibq_jax.data.pipeline import open_split
from ibq_jax.data.preprocess import UnreadableImage, decode_image
from ibq_jax.data.store import write_dataset
from ibq_jax.data.stored_codes import open_stored
from ibq_jax.data.tar_shards import tar_shards
from ibq_jax.data.token_cache import open_token_cache
from ibq_jax.evaluate.statistics import FeatureStatistics
from ibq_jax.pretrained.tensor_files import open_tensors
from ibq_jax.report.history import read_history

MORE = int(os.environ.get("IBQ_FUZZ_EXAMPLES", "0"))
settings.register_profile(
    "readers",
    max_examples=20 * max(1, MORE),
    derandomize=not MORE,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
FUZZ = settings.get_profile("readers")
TEXTS = ("class_names", "../x", "\x1b[2J", "é", "0", "a" * 300)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(TEXTS) | st.integers(-1, 5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(TEXTS), inner, max_size=4),
    max_leaves=6,
)


@dataclass(frozen=True)
class Reader:
    """A reader to test: `make` fills a folder, `damaged` names the file to change, `read` reads the data to the end."""

    make: Callable[[Path], object]
    damaged: str
    read: Callable[[Path], object]


def _arrays() -> dict[str, np.ndarray]:
    return {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b.c": np.zeros((), np.float16)}


def _all_tensors(path: Path) -> None:
    file = open_tensors(path)
    for name, shape in file.shapes.items():
        assert file.read(name).shape == shape


def _save_torch(path: Path, **options) -> None:
    torch = pytest.importorskip("torch")
    torch.save({"state_dict": {name: torch.from_numpy(array) for name, array in _arrays().items()}}, path, **options)


def _moments(path: Path) -> None:
    statistics = FeatureStatistics(3)
    statistics.update(np.random.default_rng(0).standard_normal((8, 3)))
    statistics.save(path)


def _tar(path: Path) -> None:
    write_tar(
        path,
        [
            ("a/1.png", noise_file(0, 4, 4)),
            ("a/1.cls", b"3"),
            ("2.jpg", noise_file(1, 4, 4, "JPEG")),
            ("2.json", b'{"label": 4}'),
        ],
    )


def _all_samples(folder: Path) -> None:
    for example in tar_shards(str(folder / "*.tar"), "web").examples():
        try:
            decode_image(example.read())
        except UnreadableImage as error:
            _check_line(str(error))


def _data_set(folder: Path) -> None:
    write_tar(folder / "0.tar", [(f"{i}.{kind}", content) for i in range(4) for kind, content in _sample(i)])
    write_dataset(tar_shards(str(folder / "0.tar"), "web", validation=0.3), folder, {})


def _sample(i: int) -> tuple:
    return ("png", noise_file(i, 4, 4)), ("cls", str(i % 2).encode())


def _all_records(folder: Path) -> None:
    for split in ("train", "validation"):
        for record in open_split("web", folder, split):
            try:
                decode_image(record["image"])
            except UnreadableImage as error:
                _check_line(str(error))


def _old_cache(folder: Path) -> None:
    write_cache(folder, cache_settings())
    make_version_1(folder)


def _all_codes(folder: Path) -> None:
    for split in ("train", "validation"):
        source = open_token_cache(folder, split)
        for index in range(len(source)):
            assert source[index]["codes"].max() < source.codebook_size


def _all_mixed(folder: Path) -> None:
    cache = MixedCache(folder)
    for image in cache:
        assert image.codes.max() < cache.codebook_size and isinstance(image.name, str)


def _export(folder: Path, form: str) -> None:
    write_mixed_cache(folder / "cache")
    export_codes(open_codes(folder / "cache"), folder / "out", form, LAYOUTS["emu35"])


def _all_exported(folder: Path) -> None:
    for image in open_stored(folder / "out").of(300):
        assert image.codes.max() < 300 and isinstance(image.name, str)


def _picture(path: Path) -> np.ndarray:
    try:
        return decode_image(path.read_bytes())
    except UnreadableImage as error:
        raise UsageError(str(error)) from error


def _write_json(path: Path, value) -> None:
    path.write_text(json.dumps(value))


def _scalars(path: Path) -> None:
    rows = [{"step": step, "loss/total": 1.5 / step, "validation/places": [[1.0, 2.0]]} for step in range(1, 4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _in(name: str, make: Callable[[Path], object], read: Callable[[Path], object]) -> Reader:
    return Reader(lambda folder: make(folder / name), name, lambda folder: read(folder / name))


TRAIN_SHARD = "web/1.0.0/web-train.array_record-00000"
READERS = {
    "safetensors": _in("w.safetensors", lambda path: save_file(_arrays(), path), _all_tensors),
    "npz": _in("w.npz", lambda path: np.savez(path, **_arrays()), _all_tensors),
    "pth": _in("w.pth", _save_torch, _all_tensors),
    "older pth": _in("w.pth", lambda path: _save_torch(path, _use_new_zipfile_serialization=False), _all_tensors),
    "moments": _in("m.npz", _moments, FeatureStatistics.load),
    "config.json": _in("c.json", lambda path: _write_json(path, {"stage": "x", "data": {"a": [1]}}), read_config),
    "metrics.jsonl": _in("metrics.jsonl", _scalars, read_history),
    "png": _in("p.png", lambda path: path.write_bytes(noise_file(0, 4, 4)), _picture),
    "jpeg": _in("p.jpg", lambda path: path.write_bytes(noise_file(0, 4, 4, "JPEG")), _picture),
    "webp": _in("p.webp", lambda path: path.write_bytes(noise_file(0, 4, 4, "WEBP")), _picture),
    "tar": Reader(lambda folder: _tar(folder / "0.tar"), "0.tar", _all_samples),
    "records": Reader(_data_set, TRAIN_SHARD, _all_records),
    "dataset_info.json": Reader(_data_set, "web/1.0.0/dataset_info.json", _all_records),
    "features.json": Reader(_data_set, "web/1.0.0/features.json", _all_records),
    "token_cache.json": Reader(lambda folder: write_cache(folder, cache_settings()), "token_cache.json", _all_codes),
    "manifest.json": Reader(_old_cache, "manifest.json", _all_codes),
    "codes": Reader(
        lambda folder: write_cache(folder, cache_settings()), "train/00000-of-00008.array_record", _all_codes
    ),
}
READERS |= {
    f"mixed {name}": Reader(lambda folder: write_mixed_cache(folder), name, _all_mixed)
    for name in ("token_cache.json", "images/00000-of-00002.array_record")
}
READERS |= {
    f"export {name}": Reader(functools.partial(_export, form=form), f"out/{name}", _all_exported)
    for form, name in (
        ("jsonl", "train-00000-of-00002.jsonl"),
        ("parquet", "train-00000-of-00002.parquet"),
        ("megatron", "train-00000-of-00002.idx"),
        ("megatron", "train-00000-of-00002.bin"),
        ("jsonl", "settings.json"),
    )
}
WITH_JSON = [name for name in READERS if name.endswith(".json")]


@cache
def _whole(name: str) -> Path:
    """Returns a folder with the reader's undamaged files."""
    folder = Path(tempfile.mkdtemp())
    READERS[name].make(folder)
    READERS[name].read(folder)
    return folder


def _check_line(words: str) -> None:
    assert words and words.isprintable(), repr(words)


def _read(name: str, content: bytes) -> None:
    reader = READERS[name]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "data"
        shutil.copytree(_whole(name), folder)
        (folder / reader.damaged).write_bytes(content)
        try:
            reader.read(folder)
        except UsageError as error:
            _check_line(str(error))
        assert [path.name for path in Path(place).iterdir()] == ["data"]


@st.composite
def _damaged(draw, whole: bytes) -> bytes:
    """Draws copies of `whole` with some bytes changed, inserted, left out or repeated, or cut short."""
    content = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        at, count = draw(st.integers(0, len(content))), draw(st.integers(1, 40))
        kind = draw(st.sampled_from(("change", "insert", "leave out", "repeat", "cut", "number")))
        if kind == "change":
            content[at : at + count] = draw(st.binary(min_size=1, max_size=count))
        elif kind == "insert":
            content[at:at] = draw(st.binary(min_size=1, max_size=count))
        elif kind == "leave out":
            del content[at : at + count]
        elif kind == "repeat":
            content[at:at] = content[at : at + count]
        elif kind == "cut":
            del content[at:]
        else:  # where a size may stand
            size = draw(st.sampled_from((2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1, 0)))
            content[at : at + 8] = size.to_bytes(8, draw(st.sampled_from(("little", "big"))))
    return bytes(content)


@pytest.mark.parametrize("name", READERS)
def test_any_bytes(name):
    @FUZZ
    @given(st.binary(max_size=300))
    def check(content):
        _read(name, content)

    check()


@pytest.mark.parametrize("name", READERS)
def test_damaged_files(name):
    whole = (_whole(name) / READERS[name].damaged).read_bytes()

    @FUZZ
    @given(_damaged(whole))
    def check(content):
        _read(name, content)

    check()


@pytest.mark.parametrize("name", WITH_JSON)
def test_json_of_another_meaning(name):
    whole = json.loads((_whole(name) / READERS[name].damaged).read_bytes())
    places = list(_places(whole))

    @FUZZ
    @given(st.sampled_from(places), JSON)
    def check(place, value):
        changed = json.loads(json.dumps(whole))
        inner = changed
        for key in place[:-1]:
            inner = inner[key]
        if place:
            inner[place[-1]] = value
        _read(name, json.dumps(changed if place else value).encode())

    check()


def _places(value, place: tuple = ()):
    yield place
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from _places(inner, (*place, key))
