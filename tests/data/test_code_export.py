"""Files for other projects: read by their own readers or by plain ones, killed and continued, compact, and back."""

import importlib.util
import json
import struct
import subprocess
import sys

import numpy as np
import pyarrow.parquet
import pytest
from support.token_caches import CODEBOOK_SIZE, COUNT, GRID, MIXED, VIEWS, codes_of, write_cache, write_mixed_cache
from support.token_caches import settings as cache_settings

from ibq_jax.base.errors import UsageError
from ibq_jax.data import code_files
from ibq_jax.data.code_export import USED, export_codes, open_codes
from ibq_jax.data.code_files import FORMATS
from ibq_jax.data.code_layouts import LAYOUTS, CodeLayout
from ibq_jax.data.stored_codes import open_stored

MEGATRON = """
import sys, numpy
from megatron.core.datasets.indexed_dataset import IndexedDataset
arrays = {}
for prefix in sys.argv[2:]:
    data = IndexedDataset(prefix)
    assert data.document_indices.tolist() == list(range(len(data) + 1))
    for number in range(len(data)):
        arrays[str(len(arrays))] = data[number].copy()  # its memory goes with `data`
numpy.savez(sys.argv[1], **arrays)
"""


@pytest.fixture(scope="module")
def grid_cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("caches") / "grid"
    write_cache(folder, cache_settings())
    return folder


@pytest.fixture(scope="module")
def mixed_cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("caches") / "mixed"
    write_mixed_cache(folder)
    return folder


def exported(cache, out, form, layout="codes", compact=None) -> dict:
    return export_codes(open_codes(cache), out, form, LAYOUTS[layout], compact)


def indexed(prefix) -> list[np.ndarray]:
    """Reads an IndexedDataset as its layout is documented."""
    index, tokens = prefix.with_suffix(".idx").read_bytes(), prefix.with_suffix(".bin").read_bytes()
    header, version, code, sequences, documents = struct.unpack("<9sQBQQ", index[:34])
    assert (header, version, documents) == (b"MMIDIDX\0\0", 1, sequences + 1)
    lengths = np.frombuffer(index, "<i4", sequences, 34)
    pointers = np.frombuffer(index, "<i8", sequences, 34 + 4 * sequences)
    boundaries = np.frombuffer(index, "<i8", documents, 34 + 12 * sequences)
    assert len(index) == 34 + 12 * sequences + 8 * documents and boundaries.tolist() == list(range(documents))
    dtype = np.dtype({4: "<i4", 8: "<u2"}[code])
    assert sum(lengths) * dtype.itemsize == len(tokens)
    return [np.frombuffer(tokens, dtype, n, at) for n, at in zip(lengths, pointers, strict=True)]


LAYOUTS_TO_WRITE = {
    "emu35": (LAYOUTS["emu35"], np.int32),
    "rows": (CodeLayout(offset=65_100, before=(1,), end_of_row=2), np.uint16),  # below the vocabulary that needs int32
}


def written(cache, out, name: str) -> list:
    """Returns the prefixes of the files of a cache in one of LAYOUTS_TO_WRITE."""
    export_codes(open_codes(cache), out, "megatron", LAYOUTS_TO_WRITE[name][0])
    return [out / part for part in ("train-00000-of-00002", "train-00001-of-00002")]


@pytest.mark.parametrize("name", LAYOUTS_TO_WRITE)
def test_an_indexed_dataset_holds_the_tokens(name, mixed_cache, tmp_path):
    layout, dtype = LAYOUTS_TO_WRITE[name]
    sequences = [tokens for prefix in written(mixed_cache, tmp_path / "out", name) for tokens in indexed(prefix)]
    assert [tokens.dtype for tokens in sequences] == [dtype] * len(MIXED)
    for tokens, image in zip(sequences, MIXED, strict=True):
        np.testing.assert_array_equal(tokens, layout.tokens(image.codes))


def test_megatron_reads_it(mixed_cache, tmp_path):
    """By its own class, in a process of its own."""
    if importlib.util.find_spec("megatron") is None:
        pytest.skip("megatron-core is not installed (pip install --no-deps megatron-core)")
    prefixes = [prefix for name in LAYOUTS_TO_WRITE for prefix in written(mixed_cache, tmp_path / name, name)]
    found = tmp_path / "found.npz"
    subprocess.run([sys.executable, "-W", "ignore", "-c", MEGATRON, str(found), *map(str, prefixes)], check=True)
    expected = [(layout, dtype, image) for layout, dtype in LAYOUTS_TO_WRITE.values() for image in MIXED]
    with np.load(found) as arrays:
        assert len(arrays.files) == len(expected)
        for number, (layout, dtype, image) in enumerate(expected):
            assert arrays[str(number)].dtype == dtype
            np.testing.assert_array_equal(arrays[str(number)], layout.tokens(image.codes))


def test_lines_are_those_of_rar(grid_cache, tmp_path):
    exported(grid_cache, tmp_path / "out", "jsonl")
    lines = []
    for path in sorted((tmp_path / "out").glob("train-*.jsonl")):
        lines += [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["class_id"] for line in lines] == [i % 5 for i in range(COUNT) for _ in range(VIEWS)]
    expected = np.concatenate([codes_of(i) for i in range(COUNT)]).reshape(COUNT * VIEWS, -1)
    assert [line["tokens"] for line in lines] == expected.tolist()
    assert [line["name"] for line in lines[:4]] == ["train/0/0", "train/0/1", "train/0/2", "train/1/0"]
    assert {(line["height"], line["width"]) for line in lines} == {GRID}


def test_parquet_has_a_column_for_each_text(mixed_cache, tmp_path):
    exported(mixed_cache, tmp_path / "out", "parquet")
    rows = pyarrow.parquet.read_table(tmp_path / "out" / "train-00001-of-00002.parquet").to_pylist()
    assert rows == [
        {
            "class_id": -1,
            "tokens": image.codes.reshape(-1).tolist(),
            "height": image.codes.shape[0],
            "width": image.codes.shape[1],
            "name": image.name,
            "txt": image.texts["txt"],
        }
        for image in MIXED[2:]
    ]
    first = pyarrow.parquet.read_table(tmp_path / "out" / "train-00000-of-00002.parquet").to_pylist()
    assert first[0]["txt"] is None  # that image has none


@pytest.mark.parametrize("where", ["folder", "file"])
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("kind", ["grid", "mixed"])
def test_codes_come_back(kind, form, where, grid_cache, mixed_cache, tmp_path):
    cache, out = {"grid": grid_cache, "mixed": mixed_cache}[kind], tmp_path / "out"
    layout = "apertus15" if kind == "mixed" and form == "megatron" else "codes"
    exported(cache, out, form, layout)
    paths = sorted(out.glob(f"*{FORMATS[form].suffix}")) if where == "file" else [out]
    found = [image for path in paths for image in open_stored(path).of(CODEBOOK_SIZE)]
    expected = list(open_stored(cache).of(CODEBOOK_SIZE))
    assert len(found) == len(expected) == (len(MIXED) if kind == "mixed" else (COUNT + 4) * VIEWS)
    for image, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(image.codes, other.codes)
        if form != "megatron":
            assert (image.name, image.class_id, image.texts) == (other.name, other.class_id, other.texts)


@pytest.mark.parametrize("form", FORMATS)
def test_compact_codes_come_back_too(form, mixed_cache, tmp_path):
    settings = exported(mixed_cache, tmp_path / "used", form, "emu35" if form == "megatron" else "codes", USED)
    expected = [image.codes for image in MIXED]
    used = np.unique(np.concatenate([codes.reshape(-1) for codes in expected]))
    assert settings["codebook_size"] == len(used) < CODEBOOK_SIZE
    stored = open_stored(tmp_path / "used")
    for image, codes in zip(stored.images, expected, strict=True):
        np.testing.assert_array_equal(used[image.codes], codes)
    for image, codes in zip(open_stored(tmp_path / "used").of(CODEBOOK_SIZE), expected, strict=True):
        np.testing.assert_array_equal(image.codes, codes)
    assert len(list(open_stored(tmp_path / "used").of(len(used)))) == len(
        MIXED
    )  # a pruned tokenizer takes them as they are
    with pytest.raises(UsageError, match=rf"codes of {len(used)}, and the tokenizer has 7"):
        next(open_stored(tmp_path / "used").of(7))


def test_a_map_that_left_out_a_code_is_refused(mixed_cache, tmp_path):
    lost = int(MIXED[3].codes[0, 0])
    old_to_new = np.arange(CODEBOOK_SIZE, dtype=np.int32) - (np.arange(CODEBOOK_SIZE) > lost)
    np.save(tmp_path / "whole.npy", old_to_new[::-1])
    with pytest.raises(UsageError, match=r"maps two codes to one"):
        exported(mixed_cache, tmp_path / "other", "jsonl", compact=str(tmp_path / "whole.npy"))
    old_to_new[lost] = -1
    np.save(tmp_path / "map.npy", old_to_new)
    words = rf"image 3.png: the map left out 1 of its codes, such as {lost}; --compact=used keeps all that occur"
    with pytest.raises(UsageError, match=words):
        exported(mixed_cache, tmp_path / "out", "jsonl", compact=str(tmp_path / "map.npy"))
    np.save(tmp_path / "short.npy", old_to_new[:9])
    with pytest.raises(UsageError, match=rf"is no map of {CODEBOOK_SIZE} codes, as convert --prune writes it"):
        exported(mixed_cache, tmp_path / "third", "jsonl", compact=str(tmp_path / "short.npy"))


@pytest.mark.parametrize("form", FORMATS)
def test_killed_and_continued_it_ends_the_same_to_the_byte(form, mixed_cache, tmp_path, monkeypatch):
    layout = "emu35" if form == "megatron" else "codes"
    whole, out = tmp_path / "whole", tmp_path / "out"
    exported(mixed_cache, whole, form, layout)
    written, original = [], code_files.CodedImage.row if form != "megatron" else CodeLayout.tokens

    def killed(self, *rest):
        written.append(self)
        if len(written) == 4:
            raise KeyboardInterrupt
        return original(self, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(*((CodeLayout, "tokens") if form == "megatron" else (code_files.CodedImage, "row")), killed)
        with pytest.raises(KeyboardInterrupt):
            exported(mixed_cache, out, form, layout)
    first = out / f"train-00000-of-00002{FORMATS[form].suffix}"
    time = first.stat().st_mtime_ns
    exported(mixed_cache, out, form, layout)
    assert first.stat().st_mtime_ns == time
    names = {path.name for path in whole.iterdir()}
    assert {path.name for path in out.iterdir() if path.suffix != ".partial"} == names
    assert all((out / name).read_bytes() == (whole / name).read_bytes() for name in names)


def test_an_export_of_other_settings_or_codes_is_not_continued(mixed_cache, grid_cache, tmp_path):
    out = tmp_path / "out"
    exported(mixed_cache, out, "jsonl")
    exported(mixed_cache, out, "jsonl")
    with pytest.raises(UsageError, match="holds an export with format jsonl, not parquet: name a new folder"):
        exported(mixed_cache, out, "parquet")
    with pytest.raises(UsageError, match="holds an export with compact None, not "):
        exported(mixed_cache, out, "jsonl", compact=_identity(tmp_path / "map.npy"))
    with pytest.raises(UsageError, match=r"holds an export with grid None, not \(2, 3\)"):
        exported(grid_cache, out, "jsonl")
    (tmp_path / "busy").mkdir()
    (tmp_path / "busy" / "other.txt").touch()
    with pytest.raises(UsageError, match=r"is no export, it is a file or holds other\.txt"):
        exported(mixed_cache, tmp_path / "busy", "jsonl")
    with pytest.raises(UsageError, match="this layout states no rows, and the images are of mixed sizes"):
        exported(mixed_cache, tmp_path / "new", "megatron")


def _identity(path) -> str:
    np.save(path, np.arange(CODEBOOK_SIZE))
    return str(path)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b"{}\n", "a.jsonl, line 1: there is no 'tokens'"),
        ("a.jsonl", b'{"tokens": ["a"]}\n', "line 1: tokens are not a list of codes"),
        ("a.jsonl", b'{"tokens": [1, 2, 3]}\n', "3 codes are no square"),
        ("a.jsonl", b'{"tokens": [1, 2, 3, 999]}\n', "image 0 has code 999, and there are 300: is an offset missing"),
        ("a.parquet", b"PAR1", "a.parquet: "),
        ("a.idx", b"MMIDIDX", "not the index of an IndexedDataset"),
        ("a.idx", b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 4, 2**60, 3), "damaged index"),
        ("a.txt", b"", "is no token cache, and no .jsonl, .parquet or .idx file"),
    ],
)
def test_what_holds_no_codes_is_one_line(name, content, words, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError) as raised:
        list(open_stored(tmp_path / name).of(300))
    assert words in str(raised.value) and "\n" not in str(raised.value)


def test_files_of_others_are_read_without_settings(tmp_path):
    (tmp_path / "rar.jsonl").write_text('{"class_id": 7, "tokens": [5, 1, 4, 2]}\n')
    [image] = open_stored(tmp_path / "rar.jsonl").of(300)
    assert image.class_id == 7 and image.codes.tolist() == [[5, 1], [4, 2]]
