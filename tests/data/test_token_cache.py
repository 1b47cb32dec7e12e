"""The token cache: what is written comes back, nothing unfinished is read, and caches of version 1 still are.

test_batches.py tests the order of the batches.
"""

import fcntl
import itertools
import json
import os
import pickle

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from support.batches import joined, take
from support.image_files import noise
from support.token_caches import (
    CODEBOOK_SIZE,
    COUNT,
    GRID,
    VIEWS,
    codes_of,
    make_version_1,
    settings,
    write_cache,
    write_shards,
)

from ibq_jax.base.errors import UsageError
from ibq_jax.data import token_cache_writer
from ibq_jax.data.preprocess import centre_crop, views
from ibq_jax.data.token_cache import (
    TokenCacheSplit,
    check_manifest,
    evaluation_code_batches,
    find_run_manifest,
    open_token_cache,
    read_manifest,
    read_run_manifest,
    training_code_batches,
    write_run_manifest,
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


def train(source, count: int, **options) -> list[dict]:
    return take(training_code_batches(source, **({"batch_size": 8, "seed": 3} | options)), count)


def chosen_views(batches: list[dict]) -> list[int]:
    """Returns which of its crops each image in the batches is seen by."""
    pairs = zip(joined(batches, "index"), joined(batches, "codes"), strict=True)
    return [int(np.flatnonzero((codes_of(index) == codes).all(axis=(1, 2)))[0]) for index, codes in pairs]


def files(folder) -> dict:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_is_written_comes_back(source):
    assert len(source) == COUNT and len(list(source)) == COUNT
    assert (source.codebook_size, source.grid, source.views) == (CODEBOOK_SIZE, GRID, ("a", "b", "c"))
    assert source.class_names == tuple("abcde") and source.num_classes == 5
    for index, image in enumerate(source):
        assert (image["label"], image["index"], image["codes"].dtype) == (index % 5, index, np.uint16)
        np.testing.assert_array_equal(image["codes"], codes_of(index))
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(source))[7]["codes"], source[7]["codes"])


def test_a_cache_has_the_files_it_should(cache):
    shards = [f"train/0000{i}-of-00008.array_record" for i in range(8)]
    shards += [f"validation/0000{i}-of-00004.array_record" for i in range(4)]
    others = ["settings.json", "token_cache.json", "train_histogram.npy", "validation_histogram.npy"]
    assert sorted(files(cache)) == sorted(shards + others)


def test_the_manifest_counts_what_is_there(cache):
    manifest = read_manifest(cache)
    assert {name: manifest[name] for name in settings()} == settings()
    every = np.concatenate([codes_of(index).reshape(-1) for index in range(COUNT)])
    histogram = np.load(cache / manifest["splits"]["train"]["histogram"])
    assert histogram.dtype == np.int64
    np.testing.assert_array_equal(histogram, np.bincount(every, minlength=CODEBOOK_SIZE))
    share = np.unique(every, return_counts=True)[1] / len(every)
    entropy = -(share * np.log(share)).sum()
    assert manifest["splits"]["train"] == {
        "images": COUNT,
        "num_tokens": len(every),
        "labels": [5, 5, 5, 4, 4],
        "histogram": "train_histogram.npy",
        "used": len(share),
        "perplexity": pytest.approx(np.exp(entropy)),
        "entropy": pytest.approx(entropy),
    }


@pytest.mark.parametrize(("codebook_size", "width"), [(256, 1), (257, 2), (65_536, 2), (65_537, 4)])
def test_codes_are_as_narrow_as_their_number_allows(codebook_size, width, tmp_path):
    write_cache(tmp_path, settings(codebook_size=codebook_size))
    source = open_token_cache(tmp_path, "train")
    assert source[0]["codes"].dtype.itemsize == width
    np.testing.assert_array_equal(source[5]["codes"], codes_of(5, codebook_size))


@pytest.mark.parametrize(("images", "shards"), [(1, 1), (7, 7), (1_709, 8), (32_769, 9), (1_281_167, 313)])
def test_shards_are_ranges_that_hold_every_image_once(images, shards, tmp_path):
    shards_of = list_shards(tmp_path, settings(images=images))
    ranges = [shard.images for shard in shards_of if shard.split == "train"]
    assert len(ranges) == shards and max(map(len, ranges)) <= 4096
    assert ranges[0].start == 0 and ranges[-1].stop == images
    assert all(a.stop == b.start and len(a) for a, b in itertools.pairwise(ranges))


def test_a_batch_has_codes_labels_and_indices(source):
    [batch] = train(source, 1)
    assert {key: (value.shape, value.dtype.name) for key, value in batch.items()} == {
        "codes": ((8, *GRID), "int32"),
        "label": ((8,), "int32"),
        "index": ((8,), "int64"),
    }


def test_every_view_of_an_image_is_seen(source):
    counts = np.bincount(chosen_views(train(source, COUNT)), minlength=VIEWS)
    assert counts.min() > 40  # of 184, 61 expected, standard deviation 6


def test_the_views_of_a_seed_never_change(source):
    """A release of Grain with other random numbers would make a resumed run see other codes than its first half."""
    assert chosen_views(train(source, 1)) == [0, 0, 2, 1, 2, 2, 2, 0]


def test_evaluation_has_first_views_and_padding_of_zeros(source):
    batches = list(evaluation_code_batches(source, batch_size=10))
    codes = joined(batches, "codes")
    assert codes.dtype == np.int32
    np.testing.assert_array_equal(codes[:COUNT], [codes_of(index)[0] for index in range(COUNT)])
    assert not codes[COUNT:].any() and joined(batches, "label")[COUNT:].tolist() == [0] * 7


def test_images_without_classes_are_labelled_minus_one(tmp_path):
    assert write_cache(tmp_path, settings(classes=0))["splits"]["train"]["labels"] == []
    source = open_token_cache(tmp_path, "train")
    assert source.num_classes == 0
    assert train(source, 1)[0]["label"].tolist() == [-1] * 8


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


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        RuntimeError("write() failed: No space left on device; writing x; at byte 2076672"),  # as ArrayRecord says it
    ],
)
def test_a_full_disk_is_said_so_and_keeps_what_is_whole(tmp_path, monkeypatch, error):
    fields = settings()
    with locked_cache(tmp_path, fields, overwrite=False):
        write_shards(tmp_path, fields, numbers=(0,))
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

            patch.setattr(token_cache_writer, "ArrayRecordWriter", Full)
            write_shards(tmp_path, fields)
        assert [shard.number for shard in list_shards(tmp_path, fields) if shard.is_whole] == [0, 0]
        assert sum(path.stat().st_size for path in tmp_path.rglob("*.partial")) == 0  # their room is free again


def test_other_settings_need_a_decision(cache, tmp_path):
    write_cache(tmp_path, settings())
    before = files(tmp_path)
    other = settings(codebook_size=256, tokenizer={"fingerprint": "g", "path": "/elsewhere", "step": 3})
    message = (
        r"^token cache [^\n]* does not fit: tokenizer.fingerprint: the cache has f, this command asks for g; "
        r"codebook_size: the cache has 300, this command asks for 256; dtype: [^\n]*\(--overwrite replaces it\)$"
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
        with locked_cache(tmp_path, settings(codebook_size=256), overwrite=True):
            pass
    with pytest.raises(UsageError, match="is unfinished"):
        open_token_cache(tmp_path, "train")
    write_cache(tmp_path, settings())
    assert files(tmp_path) == files(cache)


@pytest.mark.parametrize("name", ["config.json", "photo.jpg"])
def test_a_folder_of_something_else_is_left_alone(name, tmp_path):
    (tmp_path / name).write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(UsageError, match=f"{tmp_path} is not a token cache, it holds {name}: name a new folder"):
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
        lambda folder: (folder / "token_cache.json").write_text("{"),
        lambda folder: (folder / "token_cache.json").write_text("[]"),
        lambda folder: (folder / "token_cache.json").write_text('{"version": 2}'),
        lambda folder: (folder / "token_cache.json").write_text('{"version": 2, "splits": {"train": {}}}'),
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
    ("codebook_size", "words"),
    [(CODEBOOK_SIZE, "other images or codes than it should hold"), (70_000, "buffer size must be a multiple")],
)
def test_a_shard_of_another_place_or_cache_does_not_complete_a_cache(codebook_size, words, tmp_path):
    fields, other = settings(), settings(codebook_size=codebook_size)
    write_cache(tmp_path / "other", other)
    with locked_cache(tmp_path / "codes", fields, overwrite=False):
        write_shards(tmp_path / "codes", fields)
        foreign = tmp_path / "other" / "train" / "00001-of-00008.array_record"
        (tmp_path / "codes" / "train" / "00002-of-00008.array_record").write_bytes(foreign.read_bytes())
        with pytest.raises(UsageError, match=rf"00002-of-00008.array_record is damaged \({words}[^\n]*$"):
            finish(tmp_path / "codes", fields)
    assert not (tmp_path / "codes" / "token_cache.json").exists()


def test_an_unknown_format_version_is_refused(tmp_path):
    write_cache(tmp_path, settings())
    manifest = tmp_path / "token_cache.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"version": 4}))
    with pytest.raises(UsageError, match=r"token_cache.json is of format version 4, this reads 1 to 3: tokenize with"):
        open_token_cache(tmp_path, "train")


@pytest.fixture
def old_cache(tmp_path):
    """A complete cache of format version 1."""
    write_cache(tmp_path / "old", settings())
    make_version_1(tmp_path / "old")
    return tmp_path / "old"


def without_machine(manifest: dict) -> dict:
    return {name: value for name, value in manifest.items() if name != "machine"}


def test_a_cache_of_version_1_is_read_and_left_as_it_is(old_cache, cache):
    before = files(old_cache)
    assert b'"codes"' in before["manifest.json"] and b'"version": 1' in before["settings.json"]
    manifest = without_machine(read_manifest(cache))
    assert read_manifest(old_cache) == manifest
    for split in ("train", "validation"):
        one, other = open_token_cache(old_cache, split), open_token_cache(cache, split)
        assert one.codebook_size == other.codebook_size == CODEBOOK_SIZE
        np.testing.assert_array_equal([image["codes"] for image in one], [image["codes"] for image in other])
    with locked_cache(old_cache, settings(), overwrite=False):
        assert finish(old_cache, settings()) == manifest
    assert files(old_cache) == before


def test_a_cache_of_version_1_is_compared_and_overwritten(old_cache, cache):
    with pytest.raises(UsageError, match="codebook_size: the cache has 300, this command asks for 256"):
        write_cache(old_cache, settings(codebook_size=256))
    with locked_cache(old_cache, settings(), overwrite=True):
        assert not (old_cache / "manifest.json").exists()
        write_shards(old_cache, settings())
        finish(old_cache, settings())
    assert files(old_cache) == files(cache)


def begin_cache(folder, **machine) -> None:
    """Writes some of a cache's shards, on the given machine."""
    fields = settings(machine=settings()["machine"] | machine)
    with locked_cache(folder, fields, overwrite=False):
        write_shards(folder, fields, numbers=(1, 3))


def test_an_unfinished_cache_of_an_earlier_version_is_not_continued_as_its_machine_is_unknown(cache, tmp_path):
    begin_cache(tmp_path)
    make_version_1(tmp_path)
    before = files(tmp_path)
    with pytest.raises(UsageError, match="is unfinished: rerun the same tokenize command"):
        open_token_cache(tmp_path, "train")
    with pytest.raises(UsageError, match=r"begun by an earlier version, [^\n]*: --overwrite begins it again$"):
        write_cache(tmp_path, settings())
    assert files(tmp_path) == before
    with locked_cache(tmp_path, settings(), overwrite=True):
        write_shards(tmp_path, settings())
        finish(tmp_path, settings())
    assert files(tmp_path) == files(cache)


def test_a_cache_is_not_continued_on_another_platform_or_at_another_precision(tmp_path):
    begin_cache(tmp_path, platform="gpu", device_kind="NVIDIA H100")
    before = files(tmp_path)
    for other, words in (
        (settings(), "machine.platform: the cache has gpu, this command asks for cpu"),
        (
            settings(machine={"platform": "gpu", "device_kind": "NVIDIA H100"}, precision="tf32"),
            "precision: the cache has float32, this command asks for tf32",
        ),
    ):
        with pytest.raises(UsageError, match=rf"^token cache [^\n]* does not fit: {words} \(--overwrite [^\n]*$"):
            write_cache(tmp_path, other)
        assert files(tmp_path) == before


def test_another_kind_of_device_continues_a_cache_and_a_complete_one_is_left_alone_on_any_machine(tmp_path):
    begin_cache(tmp_path, platform="gpu", device_kind="NVIDIA H100")
    a100 = settings(machine={"platform": "gpu", "device_kind": "NVIDIA A100"})
    assert write_cache(tmp_path, a100)["machine"]["device_kind"] == "NVIDIA A100"
    before = files(tmp_path)
    with locked_cache(tmp_path, settings(), overwrite=False):
        assert finish(tmp_path, settings())["machine"]["platform"] == "gpu"
    assert files(tmp_path) == before


def test_what_the_check_finds_is_in_the_manifest_and_a_killed_check_is_repeated(tmp_path):
    found = {"compared_with_float32": {"sampled_codes": 7, "differing_codes": 2}}

    def check(folder, fields):
        assert fields == settings() and not (folder / "token_cache.json").exists()
        assert len(TokenCacheSplit(folder, "train", fields)) == COUNT
        return found

    def killed(folder, fields):
        raise KeyboardInterrupt

    with locked_cache(tmp_path, settings(), overwrite=False):
        write_shards(tmp_path, settings())
        with pytest.raises(KeyboardInterrupt):
            finish(tmp_path, settings(), killed)
        with pytest.raises(UsageError, match="is unfinished"):
            read_manifest(tmp_path)
        assert finish(tmp_path, settings(), check) == read_manifest(tmp_path)
    assert read_manifest(tmp_path)["compared_with_float32"] == found["compared_with_float32"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("precision", "float16"),
        ("machine", "cpu"),
        ("machine", {"platform": 3, "device_kind": "x"}),
        ("compared_with_float32", {"sampled_codes": 7}),
    ],
)
def test_a_manifest_with_a_wrong_field_about_its_codes_is_damaged(field, value, tmp_path):
    manifest = write_cache(tmp_path, settings())
    (tmp_path / "token_cache.json").write_text(json.dumps(manifest | {field: value}))
    with pytest.raises(UsageError, match=rf"token_cache.json is damaged \({field} is [^\n]*: tokenize again"):
        read_manifest(tmp_path)


def test_a_run_holds_the_manifest_under_its_name_of_today_or_before(cache, tmp_path):
    manifest = read_manifest(cache)
    assert find_run_manifest(tmp_path) is None
    with pytest.raises(UsageError, match=f"^{tmp_path} lacks token_cache.json, which says what codes"):
        read_run_manifest(tmp_path)
    old = {"version": 1, "codes": manifest["codebook_size"], "grid": [2, 3], "splits": {"train": {"codes": 7}}}
    (tmp_path / "codes.json").write_text(json.dumps(old))
    assert read_run_manifest(tmp_path) == {
        "version": 2,
        "codebook_size": CODEBOOK_SIZE,
        "grid": [2, 3],
        "splits": {"train": {"num_tokens": 7}},
    }
    write_run_manifest(tmp_path, manifest)
    assert read_run_manifest(tmp_path) == find_run_manifest(tmp_path) == manifest


def test_every_field_that_differs_is_named(cache):
    manifest = read_manifest(cache)
    same = {"codebook_size": CODEBOOK_SIZE, "grid": GRID, "data": {"class_names": tuple("abcde")}}
    check_manifest(manifest, same, cache)
    other = {"codebook_size": 16_384, "data.name": "noise", "tokenizer.step": 4, "data.class_names": ["x" * 100]}
    with pytest.raises(UsageError) as caught:
        check_manifest(manifest, other | {"dim": 8}, cache)
    assert str(caught.value) == (
        f"token cache {cache} does not fit: codebook_size: the cache has 300, the config asks for 16384; "
        f"tokenizer.step: the cache has 3, the config asks for 4; data.class_names: the cache has "
        f"('a', 'b', 'c', 'd', 'e'), the config asks for ('{'x' * 75}...; dim: the cache has nothing, the config asks "
        "for 8"
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
