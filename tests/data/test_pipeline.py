"""Batches are a pure function of (seed, step), however many processes, workers and threads make them."""

import itertools
import pickle

import numpy as np
import pytest
from support.image_files import noise_file

from ibq_jax.base.errors import UsageError
from ibq_jax.data import store
from ibq_jax.data.pipeline import evaluation_batches, open_split, training_batches
from ibq_jax.data.preprocess import centre_crop, decode_image, resize_shorter_side
from ibq_jax.data.sources import Example, ImageCollection

COUNT = 23
SIZES = dict(image_size=8, resize=12)


def png(index: int) -> bytes:
    return noise_file(index, 14 + index % 3)


def collection(name: str, count: int = COUNT, classes: int = 5, read=png) -> ImageCollection:
    def examples():
        for i in range(count):
            yield Example("train", f"{i}.png", lambda i=i: read(i), i % classes if classes else None)

    return ImageCollection(name, "noise", examples, class_names=tuple("abcde"[:classes]))


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    store.write_dataset(collection("noise"), folder, {})
    return folder


@pytest.fixture(scope="module")
def source(data_dir):
    return open_split("noise", data_dir, "train")


def take(source, count: int, **options) -> list[dict]:
    batches = training_batches(source, **({"batch_size": 8, "seed": 3} | SIZES | options))
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


def test_records_are_encoded_bytes_with_label_and_index(source):
    assert len(source) == COUNT
    assert source.class_names == tuple("abcde")
    assert source.num_classes == 5
    assert source[7] == {"image": png(7), "label": 2, "index": 7}
    assert pickle.loads(pickle.dumps(source))[7] == source[7]


def test_a_batch_has_images_labels_and_indices(source):
    [batch] = take(source, 1)
    assert {key: (value.shape, value.dtype.name) for key, value in batch.items()} == {
        "image": ((8, 8, 8, 3), "uint8"),
        "label": ((8,), "int32"),
        "index": ((8,), "int64"),
    }
    np.testing.assert_array_equal(batch["label"], batch["index"] % 5)


def test_every_epoch_has_every_record_once_in_another_order(source):
    epochs = joined(take(source, COUNT), "index").reshape(8, COUNT)  # 23 batches of 8 straddle 8 epochs
    for epoch in epochs:
        assert sorted(epoch) == list(range(COUNT))
    assert len({tuple(epoch) for epoch in epochs}) == 8


def test_crops_are_windows_that_change_with_the_epoch(source):
    taken = take(source, COUNT)
    images = joined(taken, "image")[joined(taken, "index") == 4]
    resized = resize_shorter_side(decode_image(png(4)), SIZES["resize"])
    windows = {
        resized[top : top + 8, left : left + 8].tobytes()
        for top in range(resized.shape[0] - 7)
        for left in range(resized.shape[1] - 7)
    }
    crops = {image.tobytes() for image in images}
    assert crops <= windows
    assert len(crops) > len(images) / 2


def test_the_order_of_a_seed_never_changes(source):
    """A release of Grain that shuffled otherwise would make a resumed run see other images than its first half."""
    assert joined(take(source, 2), "index").tolist() == [4, 22, 16, 7, 21, 3, 18, 19, 20, 0, 2, 13, 14, 8, 11, 10]


def test_seeds_differ_and_one_seed_repeats(source):
    assert_same(take(source, 4), take(source, 4))
    other = take(source, 4, seed=4)
    assert joined(other, "index").tolist() != joined(take(source, 4), "index").tolist()


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
def test_evaluation_sees_every_record_once_and_masks_the_padding(source, process_count):
    parts = [
        list(evaluation_batches(source, batch_size=10, process_index=i, process_count=process_count, **SIZES))
        for i in range(process_count)
    ]
    assert [len(part) for part in parts] == [3] * process_count
    batches = [{key: joined(list(rows), key) for key in rows[0]} for rows in zip(*parts, strict=True)]
    mask = joined(batches, "mask")
    assert mask.tolist() == [True] * COUNT + [False] * 7
    assert joined(batches, "index").tolist() == [*range(COUNT), *[-1] * 7]
    assert joined(batches, "label").tolist() == [*(i % 5 for i in range(COUNT)), *[-1] * 7]
    images = joined(batches, "image")
    assert not images[~mask].any()
    for i in range(COUNT):
        np.testing.assert_array_equal(images[i], centre_crop(resize_shorter_side(decode_image(png(i)), 12), 8))


def test_evaluation_of_a_few_spreads_them_over_the_split(source):
    [batch] = evaluation_batches(source, batch_size=5, examples=5, **SIZES)
    assert batch["index"].tolist() == [0, 4, 9, 13, 18]
    everything = evaluation_batches(source, batch_size=COUNT, examples=1_000, **SIZES)
    assert [b["mask"].sum() for b in everything] == [COUNT]


def test_evaluation_can_resize_without_antialiasing(source):
    [batch] = evaluation_batches(source, batch_size=COUNT, antialias=False, **SIZES)
    expected = centre_crop(resize_shorter_side(decode_image(png(6)), 12, antialias=False), 8)
    np.testing.assert_array_equal(batch["image"][6], expected)


def test_images_without_classes_are_labelled_minus_one(tmp_path):
    store.write_dataset(collection("plain", classes=0), tmp_path, {})
    source = open_split("plain", tmp_path, "train")
    assert source.num_classes == 0
    assert take(source, 1)[0]["label"].tolist() == [-1] * 8


def test_slices_of_a_split_open_too(data_dir):
    assert len(open_split("noise", data_dir, "train[:50%]")) == 12


def test_a_missing_data_set_is_told_how_to_make_it(tmp_path):
    with pytest.raises(UsageError, match=f"'openmoji' in {tmp_path}.* prepare openmoji --data_dir={tmp_path}"):
        open_split("openmoji", tmp_path, "train")


def test_a_missing_split_lists_the_others(data_dir):
    with pytest.raises(UsageError, match="no split 'test'; it has train"):
        open_split("noise", data_dir, "test")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 9, "process_count": 2}, "9 images does not divide among 2 processes"),
        ({"batch_size": 0}, "0 images"),
        ({"image_size": 0}, "image_size=0"),
        ({"image_size": 13}, "resize=12 is smaller than image_size=13"),
        ({"num_threads": -1}, "threads=-1, workers=0: neither"),
    ],
)
def test_sizes_that_do_not_fit(source, options, message):
    options = {"batch_size": 8} | SIZES | options
    with pytest.raises(UsageError, match=message):
        training_batches(source, seed=0, **options)
    with pytest.raises(UsageError, match=message):
        evaluation_batches(source, **options)


@pytest.mark.parametrize(
    ("options", "message"), [({"seed": -1}, "seed=-1: "), ({"num_workers": -2}, "workers=-2: neither")]
)
def test_training_options_out_of_range(source, options, message):
    with pytest.raises(UsageError, match=message):
        training_batches(source, **({"batch_size": 8, "seed": 0} | SIZES | options))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_record_that_is_no_image_is_named(tmp_path, monkeypatch, workers):
    with monkeypatch.context() as patch:
        patch.setattr(store, "decode_image", lambda encoded: None)
        store.write_dataset(collection("bad", read=lambda i: b"junk" if i == 17 else png(i)), tmp_path, {})
    source = open_split("bad", tmp_path, "train")
    with pytest.raises(UsageError, match=f"^data set bad in {tmp_path}, split 'train', record 17 is no image [^\n]*$"):
        take(source, 3, num_workers=workers)


def test_a_damaged_file_is_named(tmp_path):
    written = store.write_dataset(collection("cut"), tmp_path, {})
    next(written.path.glob("*array_record*")).write_bytes(b"")
    with pytest.raises(UsageError, match=r"data set cut in .*, split 'train', record .* is damaged"):
        take(open_split("cut", tmp_path, "train"), 1)


@pytest.mark.parametrize("name", ["dataset_info.json", "features.json"])
def test_damaged_metadata_are_named(tmp_path, name):
    written = store.write_dataset(collection("cut"), tmp_path, {})
    (written.path / name).write_text("{")
    with pytest.raises(UsageError, match=rf"^data set {written.path} has damaged metadata [^\n]*--overwrite$"):
        open_split("cut", tmp_path, "train")
