"""Batches of images and of codes are a pure function of (seed, step), for any number of processes and threads."""

from functools import partial

import numpy as np
import pytest
from support.batches import assert_same, joined, side_by_side, take
from support.image_files import COUNT, write_noise
from support.token_caches import settings, write_cache

from ibq_jax.base.errors import UsageError
from ibq_jax.data.pipeline import evaluation_batches, open_split, training_batches
from ibq_jax.data.token_cache import evaluation_code_batches, open_token_cache, training_code_batches

SIZES = dict(image_size=8, resize=12)


@pytest.fixture(scope="module", params=["images", "codes"])
def kind(request, tmp_path_factory):
    """(the source, its training batches, its evaluation batches) of COUNT examples in 5 classes."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "images":
        write_noise("noise", folder)
        source = open_split("noise", folder, "train")
        return source, partial(training_batches, source, **SIZES), partial(evaluation_batches, source, **SIZES)
    write_cache(folder / "cache", settings(images=COUNT))
    source = open_token_cache(folder / "cache", "train")
    return source, partial(training_code_batches, source), partial(evaluation_code_batches, source)


@pytest.fixture
def source(kind):
    return kind[0]


@pytest.fixture
def train(kind):
    """Takes some training batches."""
    return lambda count, **options: take(kind[1](**({"batch_size": 8, "seed": 3} | options)), count)


@pytest.fixture
def evaluate(kind):
    return kind[2]


def test_every_epoch_has_every_record_once_in_another_order(train):
    epochs = joined(train(COUNT), "index").reshape(8, COUNT)  # 23 batches of 8 straddle 8 epochs
    for epoch in epochs:
        assert sorted(epoch) == list(range(COUNT))
    assert len({tuple(epoch) for epoch in epochs}) == 8


def test_labels_are_those_of_the_records(train):
    [batch] = train(1)
    np.testing.assert_array_equal(batch["label"], batch["index"] % 5)
    assert [batch[key].shape for key in ("label", "index")] == [(8,), (8,)]
    assert [batch[key].dtype.name for key in ("label", "index")] == ["int32", "int64"]


def test_the_order_of_a_seed_never_changes(train):
    """A release of Grain that shuffled otherwise would make a resumed run see other examples than its first half."""
    assert joined(train(2), "index").tolist() == [4, 22, 16, 7, 21, 3, 18, 19, 20, 0, 2, 13, 14, 8, 11, 10]


def test_seeds_differ_and_one_seed_repeats(train):
    assert_same(train(4), train(4))
    assert joined(train(4, seed=4), "index").tolist() != joined(train(4), "index").tolist()


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_read_their_rows_of_the_global_batch(train, processes):
    parts = [train(5, rows=rows) for rows in np.arange(8).reshape(processes, -1)]
    assert_same(side_by_side(parts), train(5))


@pytest.mark.parametrize("options", [{"num_threads": 1}, {"num_threads": 5}, {"num_workers": 2, "num_threads": 1}])
def test_workers_and_threads_change_nothing(train, options):
    assert_same(train(6, **options), train(6))


@pytest.mark.parametrize("options", [{}, {"rows": range(4, 8)}])
def test_starting_at_a_step_gives_what_follows_it(train, options):
    assert_same(train(3, start_step=5, **options), train(8, **options)[5:])


def test_starting_far_out_replays_nothing(source, train, monkeypatch):
    read = []
    original = type(source).__getitem__
    monkeypatch.setattr(type(source), "__getitem__", lambda self, i: read.append(i) or original(self, i))
    train(1, start_step=10**9, num_threads=1)
    assert len(read) <= 3 * 8


@pytest.mark.parametrize("processes", [1, 2])
def test_evaluation_sees_every_record_once_and_masks_the_padding(evaluate, processes):
    parts = [list(evaluate(batch_size=10, rows=rows)) for rows in np.arange(10).reshape(processes, -1)]
    assert [len(part) for part in parts] == [3] * processes
    batches = side_by_side(parts)
    assert joined(batches, "mask").dtype == bool
    assert joined(batches, "mask").tolist() == [True] * COUNT + [False] * 7
    assert joined(batches, "index").tolist() == [*range(COUNT), *[-1] * 7]
    assert joined(batches, "label").tolist()[:COUNT] == [i % 5 for i in range(COUNT)]


def test_evaluation_of_a_few_spreads_them_over_the_split(evaluate):
    [batch] = evaluate(batch_size=5, examples=5)
    assert batch["index"].tolist() == [0, 4, 9, 13, 18]
    assert [b["mask"].sum() for b in evaluate(batch_size=COUNT, examples=1_000)] == [COUNT]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "0 images"),
        ({"num_threads": -1}, "num_threads=-1, num_workers=0: neither"),
    ],
)
def test_options_out_of_range(train, evaluate, options, message):
    with pytest.raises(UsageError, match=message):
        train(1, **options)
    with pytest.raises(UsageError, match=message):
        evaluate(**{"batch_size": 8} | options)


@pytest.mark.parametrize(
    ("options", "message"), [({"seed": -1}, "seed=-1: "), ({"num_workers": -2}, "num_workers=-2: neither")]
)
def test_training_options_out_of_range(train, options, message):
    with pytest.raises(UsageError, match=message):
        train(1, **options)
