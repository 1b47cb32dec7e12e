"""The token cache: what is written comes back, batches are pure in (seed, step), and nothing unfinished is read."""

import fcntl
import itertools
import json
import os
import pickle

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from support.image_files import noise
from support.token_caches import CODES, COUNT, GRID, VIEWS, codes_of, settings, write_cache, write_shards

from ibq_jax.base.errors import UsageError
from ibq_jax.base.files import atomic_file
from ibq_jax.data import token_cache_writer as code_writer
from ibq_jax.data.preprocess import centre_crop, views
from ibq_jax.data.token_cache import (
    check_manifest,
    evaluation_code_batches,
    open_token_cache,
    read_manifest,
    training_code_batches,
)
from ibq_jax.data.token_cache_writer import finish, list_shards, locked_cache


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("caches") / "codes"
    write_cache(folder, settings())
    return folder


@pytest.fixture(scope="module")
def source(cache):
    return open_token_cache(cache, "train")


def take(source, count: int, **options) -> list[dict]:
    batches = training_code_batches(source, **({"batch_size": 8, "seed": 3} | options))
    taken = list(itertools.islice(batches, count))
    batches.close()
    return taken


def joined(batches: list[dict], key: str) -> np.ndarray:
    return np.concatenate([batch[key] for batch in batches])


def assert_same(batches: list[dict], others: list[dict]) -> None:
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        for key in batch | other:
            np.testing.assert_array_equal(batch[key], other[key])


def files(folder) -> dict:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_is_written_comes_back(source):
    assert len(source) == COUNT and len(list(source)) == COUNT
    assert (source.codebook_size, source.grid, source.views) == (CODES, GRID, ("a", "b", "c"))
    assert source.class_names == tuple("abcde") and source.num_classes == 5
    for index, image in enumerate(source):
        assert (image["label"], image["index"], image["codes"].dtype) == (index % 5, index, np.uint16)
        np.testing.assert_array_equal(image["codes"], codes_of(index))
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(source))[7]["codes"], source[7]["codes"])


def test_a_cache_has_the_files_it_should(cache):
    shards = [f"train/0000{i}-of-00008.array_record" for i in range(8)]
    shards += [f"validation/0000{i}-of-00004.array_record" for i in range(4)]
    others = ["manifest.json", "settings.json", "train_histogram.npy", "validation_histogram.npy"]
    assert sorted(files(cache)) == sorted(shards + others)


def test_the_manifest_counts_what_is_there(cache):
    manifest = read_manifest(cache)
    assert {name: manifest[name] for name in settings()} == settings()
    every = np.concatenate([codes_of(index).reshape(-1) for index in range(COUNT)])
    histogram = np.load(cache / manifest["splits"]["train"]["histogram"])
    assert histogram.dtype == np.int64
    np.testing.assert_array_equal(histogram, np.bincount(every, minlength=CODES))
    share = np.unique(every, return_counts=True)[1] / len(every)
    entropy = -(share * np.log(share)).sum()
    assert manifest["splits"]["train"] == {
        "images": COUNT,
        "codes": len(every),
        "labels": [5, 5, 5, 4, 4],
        "histogram": "train_histogram.npy",
        "used": len(share),
        "perplexity": pytest.approx(np.exp(entropy)),
        "entropy": pytest.approx(entropy),
    }


@pytest.mark.parametrize(("codes", "width"), [(256, 1), (257, 2), (65_536, 2), (65_537, 4)])
def test_codes_are_as_narrow_as_their_number_allows(codes, width, tmp_path):
    write_cache(tmp_path, settings(codes=codes))
    source = open_token_cache(tmp_path, "train")
    assert source[0]["codes"].dtype.itemsize == width
    np.testing.assert_array_equal(source[5]["codes"], codes_of(5, codes))


@pytest.mark.parametrize(("images", "shards"), [(1, 1), (7, 7), (1_709, 8), (32_769, 9), (1_281_167, 313)])
def test_shards_are_ranges_that_hold_every_image_once(images, shards, tmp_path):
    of = settings(images=images)
    ranges = [shard.images for shard in list_shards(tmp_path, of) if shard.split == "train"]
    assert len(ranges) == shards and max(map(len, ranges)) <= 4096
    assert ranges[0].start == 0 and ranges[-1].stop == images
    assert all(a.stop == b.start and len(a) for a, b in itertools.pairwise(ranges))


def test_a_batch_has_codes_labels_and_indices(source):
    [batch] = take(source, 1)
    assert {key: (value.shape, value.dtype.name) for key, value in batch.items()} == {
        "codes": ((8, *GRID), "int32"),
        "label": ((8,), "int32"),
        "index": ((8,), "int64"),
    }
    np.testing.assert_array_equal(batch["label"], batch["index"] % 5)


def test_every_epoch_has_every_image_once_by_views_that_change(source):
    taken = take(source, COUNT)
    indices = joined(taken, "index").reshape(8, COUNT)  # 23 batches of 8 straddle 8 epochs
    assert all(sorted(epoch) == list(range(COUNT)) for epoch in indices)
    assert len({tuple(epoch) for epoch in indices}) == 8
    chosen = np.zeros(VIEWS, int)
    for index, codes in zip(joined(taken, "index"), joined(taken, "codes"), strict=True):
        [view] = np.flatnonzero((codes_of(index) == codes).all(axis=(1, 2)))
        chosen[view] += 1
    assert chosen.min() > 40  # of 184, 61 expected, standard deviation 6


def test_the_order_and_views_of_a_seed_never_change(source):
    """A release of Grain that shuffled otherwise would make a resumed run see other codes than its first half."""
    [batch] = take(source, 1)
    assert batch["index"].tolist() == [4, 22, 16, 7, 21, 3, 18, 19]
    views_chosen = [
        int(np.flatnonzero((codes_of(index) == codes).all(axis=(1, 2)))[0])
        for index, codes in zip(batch["index"], batch["codes"], strict=True)
    ]
    assert views_chosen == [0, 0, 2, 1, 2, 2, 2, 0]


def test_seeds_differ_and_one_seed_repeats(source):
    assert_same(take(source, 4), take(source, 4))
    assert joined(take(source, 4, seed=4), "index").tolist() != joined(take(source, 4), "index").tolist()


@pytest.mark.parametrize("process_count", [2, 4])
def test_processes_hold_consecutive_rows_of_the_global_batch(source, process_count):
    parts = [take(source, 5, process_index=i, process_count=process_count) for i in range(process_count)]
    together = [{key: joined(list(rows), key) for key in rows[0]} for rows in zip(*parts, strict=True)]
    assert_same(together, take(source, 5))


@pytest.mark.parametrize("options", [{"num_threads": 1}, {"num_threads": 5}, {"num_workers": 2, "num_threads": 1}])
def test_workers_and_threads_change_nothing(source, options):
    assert_same(take(source, 6, **options), take(source, 6))


@pytest.mark.parametrize("options", [{}, {"process_index": 1, "process_count": 2}])
def test_starting_at_a_step_gives_what_follows_it(source, options):
    assert_same(take(source, 3, start_step=5, **options), take(source, 8, **options)[5:])


def test_starting_far_out_replays_nothing(source, monkeypatch):
    read = []
    original = type(source).__getitem__
    monkeypatch.setattr(type(source), "__getitem__", lambda self, i: read.append(i) or original(self, i))
    take(source, 1, start_step=10**9, num_threads=1)
    assert len(read) <= 3 * 8


@pytest.mark.parametrize("process_count", [1, 2])
def test_evaluation_sees_every_first_view_once_and_masks_the_padding(source, process_count):
    parts = [
        list(evaluation_code_batches(source, batch_size=10, process_index=i, process_count=process_count))
        for i in range(process_count)
    ]
    assert [len(part) for part in parts] == [3] * process_count
    batches = [{key: joined(list(rows), key) for key in rows[0]} for rows in zip(*parts, strict=True)]
    mask, codes = joined(batches, "mask"), joined(batches, "codes")
    assert mask.dtype == bool and codes.dtype == np.int32
    assert mask.tolist() == [True] * COUNT + [False] * 7
    assert joined(batches, "index").tolist() == [*range(COUNT), *[-1] * 7]
    assert joined(batches, "label").tolist() == [*(i % 5 for i in range(COUNT)), *[0] * 7]
    np.testing.assert_array_equal(codes[:COUNT], [codes_of(index)[0] for index in range(COUNT)])
    assert not codes[COUNT:].any()


def test_evaluation_of_a_few_spreads_them_over_the_split(source):
    [batch] = evaluation_code_batches(source, batch_size=5, examples=5)
    assert batch["index"].tolist() == [0, 4, 9, 13, 18]
    everything = evaluation_code_batches(source, batch_size=COUNT, examples=1_000)
    assert [b["mask"].sum() for b in everything] == [COUNT]


def test_images_without_classes_are_labelled_minus_one(tmp_path):
    assert write_cache(tmp_path, settings(classes=0))["splits"]["train"]["labels"] == []
    source = open_token_cache(tmp_path, "train")
    assert source.num_classes == 0
    assert take(source, 1)[0]["label"].tolist() == [-1] * 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 9, "process_count": 2}, "9 images does not divide among 2 processes"),
        ({"batch_size": 0}, "0 images"),
        ({"num_threads": -1}, "threads=-1, workers=0: neither"),
    ],
)
def test_options_that_do_not_fit(source, options, message):
    options = {"batch_size": 8} | options
    with pytest.raises(UsageError, match=message):
        training_code_batches(source, seed=0, **options)
    with pytest.raises(UsageError, match=message):
        evaluation_code_batches(source, **options)


@pytest.mark.parametrize(("options", "message"), [({"seed": -1}, "seed=-1: "), ({"num_workers": -2}, "workers=-2: ")])
def test_training_options_out_of_range(source, options, message):
    with pytest.raises(UsageError, match=message):
        training_code_batches(source, **({"batch_size": 8, "seed": 0} | options))


def test_no_cache_and_no_split_are_told_what_to_do(cache, tmp_path):
    with pytest.raises(UsageError, match=f"no token cache in {tmp_path}: make it with .*tokenize .*--out={tmp_path}$"):
        open_token_cache(tmp_path, "train")
    with pytest.raises(UsageError, match="has no split 'test'; it has train, validation"):
        open_token_cache(cache, "test")


def test_an_unfinished_cache_is_not_read_and_goes_on_to_the_same_files(cache, tmp_path):
    with locked_cache(tmp_path, settings(), overwrite=False):
        write_shards(tmp_path, settings(), numbers=(1, 3))
        assert finish(tmp_path, settings()) is None
    with pytest.raises(UsageError, match="is unfinished: rerun the same tokenize command, it continues"):
        open_token_cache(tmp_path, "train")
    (tmp_path / "train" / "00002-of-00008.array_record.partial").write_bytes(b"half")
    write_cache(tmp_path, settings())
    assert files(tmp_path) == files(cache)


def test_processes_that_share_the_shards_write_what_one_does(cache, tmp_path):
    for numbers in (range(0, 8, 2), range(1, 8, 2)):
        with locked_cache(tmp_path, settings(), overwrite=False):
            write_shards(tmp_path, settings(), numbers)
            finish(tmp_path, settings())
    assert files(tmp_path) == files(cache)


def test_a_shard_that_another_process_writes_is_left_to_it(tmp_path):
    path = tmp_path / "shard"
    with atomic_file(path) as first, atomic_file(path) as second:
        assert first is not None and second is None
        first.write_text("whole")
    with atomic_file(path) as third:
        assert third is None
    assert [path.name for path in tmp_path.iterdir()] == ["shard"] and path.read_text() == "whole"


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        RuntimeError("write() failed: No space left on device; writing x; at byte 2076672"),  # as ArrayRecord says it
    ],
)
def test_a_full_disk_is_said_so_and_keeps_what_is_whole(tmp_path, monkeypatch, error):
    of = settings()
    with locked_cache(tmp_path, of, overwrite=False):
        write_shards(tmp_path, of, numbers=(0,))
        with (
            monkeypatch.context() as patch,
            pytest.raises(UsageError, match=r"00001-of-00008.* the disk is full; free"),
        ):

            class Full:
                def __init__(self, path, options):
                    self._file = open(path, "wb")  # noqa: SIM115

                def write(self, record):
                    self._file.write(record)
                    self._file.flush()
                    raise error

            patch.setattr(code_writer, "ArrayRecordWriter", Full)
            write_shards(tmp_path, of)
        assert [shard.number for shard in list_shards(tmp_path, of) if shard.is_whole] == [0, 0]
        assert sum(path.stat().st_size for path in tmp_path.rglob("*.partial")) == 0  # their room is free again


def test_other_settings_need_a_decision(cache, tmp_path):
    write_cache(tmp_path, settings())
    before = files(tmp_path)
    other = settings(codes=256, tokenizer={"fingerprint": "g", "path": "/elsewhere", "step": 3})
    message = (
        r"^token cache [^\n]* does not fit: tokenizer.fingerprint: the cache has f, this command asks for g; "
        r"codes: the cache has 300, this command asks for 256; dtype: [^\n]*\(--overwrite replaces it\)$"
    )
    with pytest.raises(UsageError, match=message):
        write_cache(tmp_path, other)
    assert files(tmp_path) == before
    moved = settings(tokenizer={"fingerprint": "f", "path": "/elsewhere", "step": 3})
    with locked_cache(tmp_path, moved, overwrite=False):
        assert finish(tmp_path, moved)["tokenizer"]["path"] == "/runs/tok"
    with locked_cache(tmp_path, other, overwrite=True):
        write_shards(tmp_path, other)
        finish(tmp_path, other)
    assert open_token_cache(tmp_path, "train").codebook_size == 256


def test_none_overwrites_what_another_process_writes(tmp_path):
    with locked_cache(tmp_path, settings(), overwrite=False):
        with pytest.raises(UsageError, match="is being written by another process"):
            with locked_cache(tmp_path, settings(), overwrite=True):
                pass
    lock = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # nothing holds it any more
    os.close(lock)


def test_an_overwrite_that_was_killed_leaves_an_unfinished_cache(cache, tmp_path, monkeypatch):
    write_cache(tmp_path, settings())

    def killed(self, missing_ok=False):
        if self.name.startswith("00003"):
            raise KeyboardInterrupt
        os.unlink(self)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(type(tmp_path), "unlink", killed)
        with locked_cache(tmp_path, settings(codes=256), overwrite=True):
            pass
    with pytest.raises(UsageError, match="is unfinished"):
        open_token_cache(tmp_path, "train")
    write_cache(tmp_path, settings())
    assert files(tmp_path) == files(cache)


@pytest.mark.parametrize("name", ["config.json", "photo.jpg"])
def test_a_folder_of_something_else_is_left_alone(name, tmp_path):
    (tmp_path / name).write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(UsageError, match=f"{tmp_path} is no token cache, it holds {name}: name a new folder"):
            with locked_cache(tmp_path, settings(), overwrite):
                pass
    assert files(tmp_path) == {name: b"precious"}
    with pytest.raises(UsageError, match="is a file: the token cache needs a folder"):
        with locked_cache(tmp_path / name, settings(), overwrite=True):
            pass


def first_shard(folder):
    return folder / "train" / "00000-of-00008.array_record"


def write_other_records(folder, length: int = 10, count: int = 3) -> None:
    writer = ArrayRecordWriter(str(first_shard(folder)), "group_size:1")
    for _ in range(count):
        writer.write(bytes(length))
    writer.close()


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: first_shard(folder).unlink(),
        lambda folder: first_shard(folder).write_bytes(b""),
        lambda folder: os.truncate(first_shard(folder), 70_000),
        lambda folder: write_other_records(folder, count=2),
        lambda folder: write_other_records(folder, length=7, count=len(range(0, COUNT // 8))),
        lambda folder: (folder / "manifest.json").write_text("{"),
        lambda folder: (folder / "manifest.json").write_text("[]"),
        lambda folder: (folder / "manifest.json").write_text('{"version": 1}'),
        lambda folder: (folder / "manifest.json").write_text('{"version": 1, "splits": {"train": {}}}'),
    ],
)
def test_a_damaged_cache_is_said_so(damage, tmp_path):
    write_cache(tmp_path, settings())
    damage(tmp_path)
    with pytest.raises(UsageError, match=rf"^[^\n]*{tmp_path}[^\n]* is damaged \([^\n]*\): tokenize again[^\n]*$"):
        list(open_token_cache(tmp_path, "train"))


def test_a_damaged_record_is_named_while_training(tmp_path):
    write_cache(tmp_path, settings(images=20_000))
    shard = next((tmp_path / "train").iterdir())
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 255
    shard.write_bytes(content)
    batches = training_code_batches(open_token_cache(tmp_path, "train"), batch_size=1_000, seed=0)
    with pytest.raises(UsageError, match=r"^token cache [^\n]*, split 'train' is damaged \(record \d+: [^\n]*$"):
        list(itertools.islice(batches, 20))


@pytest.mark.parametrize(
    ("codes", "words"),
    [(CODES, "other images or codes than it should hold"), (70_000, "buffer size must be a multiple")],
)
def test_a_shard_of_another_place_or_cache_does_not_complete_a_cache(codes, words, tmp_path):
    of, other = settings(), settings(codes=codes)
    write_cache(tmp_path / "other", other)
    with locked_cache(tmp_path / "codes", of, overwrite=False):
        write_shards(tmp_path / "codes", of)
        foreign = tmp_path / "other" / "train" / "00001-of-00008.array_record"
        (tmp_path / "codes" / "train" / "00002-of-00008.array_record").write_bytes(foreign.read_bytes())
        with pytest.raises(UsageError, match=rf"00002-of-00008.array_record is damaged \({words}[^\n]*$"):
            finish(tmp_path / "codes", of)
    assert not (tmp_path / "codes" / "manifest.json").exists()


def test_another_format_version_is_said_so(tmp_path):
    write_cache(tmp_path, settings())
    manifest = tmp_path / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"version": 2}))
    with pytest.raises(UsageError, match=r"manifest.json is of format version 2, this reads 1: tokenize with"):
        open_token_cache(tmp_path, "train")


def test_every_field_that_differs_is_named(cache):
    manifest = read_manifest(cache)
    check_manifest(manifest, {"codes": CODES, "grid": GRID, "data": {"class_names": tuple("abcde")}}, cache)
    expected = {"codes": 16_384, "data.name": "noise", "tokenizer.step": 4, "data.class_names": ["x" * 100], "dim": 8}
    with pytest.raises(UsageError) as caught:
        check_manifest(manifest, expected, cache)
    assert str(caught.value) == (
        f"token cache {cache} does not fit: codes: the cache has 300, the config asks for 16384; tokenizer.step: the "
        f"cache has 3, the config asks for 4; data.class_names: the cache has ('a', 'b', 'c', 'd', 'e'), the config "
        f"asks for ('{'x' * 75}...; dim: the cache has nothing, the config asks for 8"
    )


def test_views_are_crops_of_the_image():
    image = noise(0, 11, 8)
    crops = views(image, ("flip", "ten_crop", "centre"), 4)
    assert crops.shape == (12, 4, 4, 3) and crops.dtype == np.uint8
    centre = centre_crop(image, 4)
    five = [centre, image[:4, :4], image[:4, -4:], image[-4:, :4], image[-4:, -4:]]
    expected = [centre[:, ::-1], *five, *(crop[:, ::-1] for crop in five), centre]
    np.testing.assert_array_equal(crops, expected)
    assert len({crop.tobytes() for crop in views(image, ("ten_crop",), 4)}) == 10
