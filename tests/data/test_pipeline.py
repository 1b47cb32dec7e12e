"""Images from a data set: records, crops, padding, and what is wrong with files. test_batches.py tests the order."""

import pickle

import numpy as np
import pytest
from support.batches import joined, take
from support.image_files import COUNT, noise_png, write_noise

from ibq_jax.base.errors import UsageError
from ibq_jax.data import store
from ibq_jax.data.pipeline import evaluation_batches, open_split, training_batches
from ibq_jax.data.preprocess import centre_crop, decode_image, resize_shorter_side

SIZES = dict(image_size=8, resize=12)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_noise("noise", folder)
    return folder


@pytest.fixture(scope="module")
def source(data_dir):
    return open_split("noise", data_dir, "train")


def train(source, count: int, **options) -> list[dict]:
    return take(training_batches(source, **({"batch_size": 8, "seed": 3} | SIZES | options)), count)


def test_records_are_encoded_bytes_with_label_and_index(source):
    assert len(source) == COUNT
    assert source.class_names == tuple("abcde")
    assert source.num_classes == 5
    assert source[7] == {"image": noise_png(7), "label": 2, "index": 7}
    assert pickle.loads(pickle.dumps(source))[7] == source[7]


def test_a_batch_has_images_labels_and_indices(source):
    [batch] = train(source, 1)
    assert {key: (value.shape, value.dtype.name) for key, value in batch.items()} == {
        "image": ((8, 8, 8, 3), "uint8"),
        "label": ((8,), "int32"),
        "index": ((8,), "int64"),
    }


def test_crops_are_windows_that_change_with_the_epoch(source):
    taken = train(source, COUNT)
    images = joined(taken, "image")[joined(taken, "index") == 4]
    resized = resize_shorter_side(decode_image(noise_png(4)), SIZES["resize"])
    windows = {
        resized[top : top + 8, left : left + 8].tobytes()
        for top in range(resized.shape[0] - 7)
        for left in range(resized.shape[1] - 7)
    }
    crops = {image.tobytes() for image in images}
    assert crops <= windows
    assert len(crops) > len(images) / 2


def test_evaluation_has_centre_crops_and_black_padding(source):
    batches = list(evaluation_batches(source, batch_size=10, **SIZES))
    images, labels = joined(batches, "image"), joined(batches, "label")
    for i in range(COUNT):
        np.testing.assert_array_equal(images[i], centre_crop(resize_shorter_side(decode_image(noise_png(i)), 12), 8))
    assert not images[COUNT:].any() and labels[COUNT:].tolist() == [-1] * 7


def test_evaluation_can_resize_without_antialiasing(source):
    [batch] = evaluation_batches(source, batch_size=COUNT, method="plain", **SIZES)
    expected = centre_crop(resize_shorter_side(decode_image(noise_png(6)), 12, "plain"), 8)
    np.testing.assert_array_equal(batch["image"][6], expected)


def test_images_without_classes_are_labelled_minus_one(tmp_path):
    write_noise("plain", tmp_path, classes=0)
    source = open_split("plain", tmp_path, "train")
    assert source.num_classes == 0
    assert train(source, 1)[0]["label"].tolist() == [-1] * 8


def test_slices_of_a_split_open_too(data_dir):
    assert len(open_split("noise", data_dir, "train[:50%]")) == 12


def test_a_missing_data_set_is_told_how_to_make_it(tmp_path):
    with pytest.raises(UsageError, match=f"'openmoji' in {tmp_path}.* prepare openmoji --data-dir={tmp_path}"):
        open_split("openmoji", tmp_path, "train")


def test_a_missing_split_lists_the_others(data_dir):
    with pytest.raises(UsageError, match="no split 'test'; it has train"):
        open_split("noise", data_dir, "test")


@pytest.mark.parametrize(
    ("sizes", "message"),
    [({"image_size": 0}, "image_size=0"), ({"image_size": 13}, "resize=12 is smaller than image_size=13")],
)
def test_sizes_that_do_not_fit(source, sizes, message):
    options = {"batch_size": 8} | SIZES | sizes
    with pytest.raises(UsageError, match=message):
        training_batches(source, seed=0, **options)
    with pytest.raises(UsageError, match=message):
        evaluation_batches(source, **options)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_record_that_is_no_image_is_named(tmp_path, monkeypatch, num_workers):
    with monkeypatch.context() as patch:
        patch.setattr(store, "decode_image", lambda encoded: None)
        write_noise("bad", tmp_path, read=lambda i: b"junk" if i == 17 else noise_png(i))
    source = open_split("bad", tmp_path, "train")
    with pytest.raises(UsageError, match=f"^data set bad in {tmp_path}, split 'train', record 17 is no image [^\n]*$"):
        train(source, 3, num_workers=num_workers)


def test_a_damaged_file_is_named(tmp_path):
    next(write_noise("cut", tmp_path).glob("*array_record*")).write_bytes(b"")
    with pytest.raises(UsageError, match=r"data set cut in .*, split 'train', record .* is damaged"):
        train(open_split("cut", tmp_path, "train"), 1)


@pytest.mark.parametrize("name", ["dataset_info.json", "features.json"])
def test_damaged_metadata_are_named(tmp_path, name):
    path = write_noise("cut", tmp_path)
    (path / name).write_text("{")
    with pytest.raises(UsageError, match=rf"^data set {path} has damaged metadata [^\n]*--overwrite$"):
        open_split("cut", tmp_path, "train")
