"""Streamed statistics and Frechet distances against golden values, for any order and size of the batches."""

import functools
import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from support import released

from ibq_jax.base.errors import UsageError
from ibq_jax.evaluate import statistics
from ibq_jax.evaluate.statistics import FeatureStatistics

GOLDEN = released.load("frechet")
SETS = ("x1", "x2", "sing1", "sing2")


def statistics_of(*batches: np.ndarray) -> FeatureStatistics:
    result = FeatureStatistics(batches[0].shape[1])
    for batch in batches:
        result.update(batch)
    return result


def assert_same(found: FeatureStatistics, expected: FeatureStatistics, tolerance: float = 1e-12) -> None:
    assert found.count == expected.count
    for name in ("mean", "covariance"):
        a, b = getattr(found, name), getattr(expected, name)
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * np.abs(b).max(), err_msg=name)


def dyadic(*shape: int) -> np.ndarray:
    """Correlated features that are multiples of 2^-16, so that adding 1e4 to them is exact."""
    rng = np.random.default_rng(3)
    values = rng.normal(size=shape) @ rng.normal(size=(shape[1], shape[1]))
    return np.rint(values * 2**16) / 2**16


@pytest.fixture
def small_buffer(monkeypatch):
    monkeypatch.setattr(statistics, "BUFFER_ROWS", 32)


# Mean and covariance


@pytest.mark.parametrize("name", SETS)
def test_mean_and_covariance_are_numpys(name):
    found = statistics_of(GOLDEN[name])
    np.testing.assert_allclose(found.mean, GOLDEN[f"{name}_mu"], rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(found.covariance, GOLDEN[f"{name}_sigma"], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("size", [1, 7, 31, 32, 33, 64, 300])
def test_batches_of_any_size_give_the_same(small_buffer, size):
    x1 = GOLDEN["x1"]
    found = statistics_of(*(x1[start : start + size] for start in range(0, len(x1), size)))
    assert_same(found, statistics_of(x1))
    np.testing.assert_allclose(found.covariance, GOLDEN["x1_sigma"], rtol=1e-12, atol=1e-14)


def test_the_order_of_the_batches_does_not_matter(small_buffer):
    parts = np.split(GOLDEN["x1"], [3, 50, 51, 130, 222])
    for order in ([5, 4, 3, 2, 1, 0], [2, 0, 5, 1, 4, 3]):
        assert_same(statistics_of(*(parts[index] for index in order)), statistics_of(GOLDEN["x1"]))


def test_reading_between_updates_changes_nothing(small_buffer):
    found = FeatureStatistics(24)
    for number, batch in enumerate(np.split(GOLDEN["x1"], 20)):
        found.update(batch)
        assert found.count == 15 * (number + 1)
        np.testing.assert_allclose(found.mean, GOLDEN["x1"][: found.count].mean(axis=0), rtol=1e-12, atol=1e-14)
    assert_same(found, statistics_of(GOLDEN["x1"]))


def test_results_are_copies():
    found = statistics_of(GOLDEN["x1"])
    found.mean[:] = 0
    found.covariance[:] = 0
    assert_same(found, statistics_of(GOLDEN["x1"]))


def test_features_may_be_overwritten_after_an_update():
    batch = GOLDEN["x1"].copy()
    found = statistics_of(batch)
    batch[:] = 0
    assert_same(found, statistics_of(GOLDEN["x1"]))


def test_masked_rows_do_not_count_whatever_they_hold(small_buffer):
    rng = np.random.default_rng(0)
    found = FeatureStatistics(24)
    for batch in np.split(GOLDEN["x1"], 10):
        mask = np.zeros(40, bool)
        mask[rng.permutation(40)[:30]] = True
        padded = np.full((40, 24), np.nan)
        padded[mask] = batch
        found.update(padded, mask)
    found.update(np.full((4, 24), np.inf), np.zeros(4, bool))
    assert_same(found, statistics_of(GOLDEN["x1"]))


@pytest.mark.parametrize("shards", [1, 8])
def test_a_large_common_offset_costs_no_digits(small_buffer, shards):
    features = dyadic(1600, 24)
    offset = [statistics_of(*np.split(part + 1e4, 8)) for part in np.split(features, shards)]
    found, expected = functools.reduce(FeatureStatistics.merge, offset), statistics_of(features)
    np.testing.assert_allclose(found.mean - 1e4, features.mean(axis=0), atol=4e-12)  # float64 resolution near 1e4
    scale = np.abs(expected.covariance).max()
    np.testing.assert_allclose(found.covariance, expected.covariance, rtol=0, atol=1e-13 * scale)


def test_the_first_batch_costs_no_digits_either():
    """Summing a thousand numbers near 2^33 directly would lose nine bits of their mean and of the next step."""
    features = dyadic(1500, 24)
    found, expected = statistics_of(features[:1024] + 2.0**33, features[1024:] + 2.0**33), statistics_of(features)
    np.testing.assert_allclose(found.mean - 2.0**33, features.mean(axis=0), rtol=0, atol=2.0**-19)
    scale = np.abs(expected.covariance).max()
    np.testing.assert_allclose(found.covariance, expected.covariance, rtol=0, atol=1e-8 * scale)


def test_features_may_be_bfloat16_jax_arrays():
    features = jnp.asarray(GOLDEN["x1"], jnp.bfloat16)
    assert_same(statistics_of(features), statistics_of(np.asarray(features, np.float64)))


def test_covariances_are_symmetric_bit_for_bit():
    merged = statistics_of(GOLDEN["x1"]).merge(statistics_of(GOLDEN["x2"] + 3))
    np.testing.assert_array_equal(merged.covariance, merged.covariance.T)


@pytest.mark.parametrize(
    ("features", "mask", "message"),
    [
        (np.zeros((5, 23)), None, r"\[B, 24\] here, not \[5, 23\]"),
        (np.zeros(24), None, r"\[B, 24\] here, not \[24\]"),
        (np.zeros((5, 24)), np.ones(4, bool), r"bool \[5\], not bool \[4\]"),
        (np.zeros((5, 24)), np.ones(5, int), r"bool \[5\], not int64 \[5\]"),
    ],
)
def test_another_shape_is_refused(features, mask, message):
    found = statistics_of(GOLDEN["x1"])
    with pytest.raises(UsageError, match=message):
        found.update(features, mask)
    assert found.count == 300


def test_values_that_are_not_finite_are_named_and_nothing_is_added():
    found, batch = statistics_of(GOLDEN["x1"]), GOLDEN["x2"].copy()
    batch[17, 5], batch[200, 0] = np.nan, np.inf
    with pytest.raises(UsageError, match="row 17 has a value that is not finite"):
        found.update(batch)
    with pytest.raises(UsageError, match="row 200 has a value that is not finite"):
        found.update(batch, np.arange(280) > 17)
    assert_same(found, statistics_of(GOLDEN["x1"]))


def test_too_few_samples_have_no_mean_or_covariance():
    found = FeatureStatistics(24)
    assert found.count == 0
    with pytest.raises(UsageError, match="there is no mean of no samples"):
        _ = found.mean
    found.update(GOLDEN["x1"][:1])
    np.testing.assert_array_equal(found.mean, GOLDEN["x1"][0])
    with pytest.raises(UsageError, match="at least two samples, not 1"):
        found.frechet(statistics_of(GOLDEN["x1"]))


# Merging and exchanging


@pytest.mark.parametrize("exchanged", [False, True])
def test_eight_shards_merge_to_one_pass_in_any_order(exchanged):
    shards = [
        statistics_of(part) for part in np.split(GOLDEN["x1"], [1, 30, 31, 90, 200, 200, 260])
    ]  # one of 1, one of 0
    if exchanged:
        shards = [FeatureStatistics.from_array(shard.to_array()) for shard in shards]
    expected, other = statistics_of(GOLDEN["x1"]), statistics_of(GOLDEN["x2"])
    for order in (range(8), range(7, -1, -1), [3, 0, 5, 7, 1, 6, 2, 4]):
        merged = functools.reduce(FeatureStatistics.merge, (shards[index] for index in order))
        assert_same(merged, expected)
        np.testing.assert_allclose(merged.frechet(other), expected.frechet(other), rtol=1e-10)
    pairs = [first.merge(second) for first, second in zip(shards[::2], shards[1::2], strict=True)]
    assert_same(pairs[0].merge(pairs[1]).merge(pairs[2].merge(pairs[3])), expected)


def test_merging_leaves_both_as_they_were():
    first, second = statistics_of(GOLDEN["x1"]), statistics_of(GOLDEN["x2"])
    merged = first.merge(second)
    merged.update(GOLDEN["sing1"])
    assert_same(first, statistics_of(GOLDEN["x1"]))
    assert_same(second, statistics_of(GOLDEN["x2"]))
    first.update(GOLDEN["sing1"])
    assert_same(merged, statistics_of(GOLDEN["x1"], GOLDEN["x2"], GOLDEN["sing1"]))


def test_merging_empty_statistics_gives_empty_statistics():
    assert FeatureStatistics(3).merge(FeatureStatistics(3)).count == 0


def test_a_packed_vector_is_float64_and_can_be_sent_as_uint32():
    packed = statistics_of(GOLDEN["x1"]).to_array()
    assert packed.dtype == np.float64 and packed.shape == (1 + 24 + 24 * 24,)
    through_jax = np.asarray(jnp.asarray(packed.view(np.uint32))).view(np.float64)
    unpacked = FeatureStatistics.from_array(through_jax)
    np.testing.assert_array_equal(unpacked.covariance, statistics_of(GOLDEN["x1"]).covariance)
    unpacked.update(GOLDEN["x2"])
    assert_same(unpacked, statistics_of(GOLDEN["x1"], GOLDEN["x2"]))


@pytest.mark.parametrize("packed", [np.zeros(600), np.zeros(601, np.float32), np.zeros(0), np.zeros((1, 601))])
def test_another_vector_is_not_unpacked(packed):
    with pytest.raises(UsageError, match="packed statistics are float64"):
        FeatureStatistics.from_array(packed)


@pytest.mark.parametrize("method", ["merge", "frechet"])
def test_statistics_of_different_widths_cannot_be_combined(method):
    with pytest.raises(UsageError, match="of 24 features and of 23"):
        getattr(statistics_of(GOLDEN["x1"]), method)(statistics_of(GOLDEN["x1"][:, :23]))


# Frechet distance


@pytest.mark.parametrize(
    ("first", "second", "tolerance"),
    [
        ("x1", "x2", {"rtol": 1e-10}),
        ("x1", "x1", {"atol": 1e-9}),
        ("sing1", "sing2", {"rtol": 1e-6}),
        ("sing1", "x2", {"rtol": 1e-6}),
    ],
)
def test_frechet_distance_is_pytorch_fids(first, second, tolerance):
    for name in ("", "_eigh"):
        found = statistics_of(GOLDEN[first]).frechet(statistics_of(GOLDEN[second]))
        np.testing.assert_allclose(found, GOLDEN[f"fid_{first}_{second}{name}"], **tolerance)


@pytest.mark.parametrize(("first", "second"), list(itertools.product(SETS, SETS)))
def test_frechet_distance_is_symmetric_and_exact_whatever_the_rank(first, second):
    """The expected overlap is computed from the samples, without a root of a covariance."""
    a, b = ((GOLDEN[name] - GOLDEN[name].mean(axis=0)) / np.sqrt(len(GOLDEN[name]) - 1) for name in (first, second))
    step = GOLDEN[first].mean(axis=0) - GOLDEN[second].mean(axis=0)
    overlap = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    expected = step @ step + np.sum(a**2) + np.sum(b**2) - 2 * overlap
    found = statistics_of(GOLDEN[first]).frechet(statistics_of(GOLDEN[second]))
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(
        statistics_of(GOLDEN[second]).frechet(statistics_of(GOLDEN[first])), found, rtol=1e-12, atol=1e-12
    )


def test_frechet_distance_of_commuting_covariances_is_the_closed_form():
    rng = np.random.default_rng(1)
    features, scales = rng.normal(size=(50, 4)), np.array([0.0, 0.5, 2.0, 3.0])
    basis = np.linalg.qr(features - features.mean(axis=0))[0]  # 50 samples, mean 0, covariance I / 49
    found = statistics_of(basis).frechet(statistics_of(basis * scales + 7))
    np.testing.assert_allclose(found, 4 * 49 + np.sum((1 - scales) ** 2) / 49, rtol=1e-12)


def test_frechet_distance_is_never_negative():
    """For equal sets it is only rounding, of either sign."""
    for seed in range(20):
        found = statistics_of(np.random.default_rng(seed).normal(size=(40, 8)))
        assert 0 <= found.frechet(found) < 1e-12


def test_frechet_distance_of_sets_that_do_not_vary_is_that_of_their_means():
    assert statistics_of(np.zeros((5, 3))).frechet(statistics_of(np.full((4, 3), 2.0))) == 12


def test_reliable_needs_more_samples_than_dims():
    assert not statistics_of(GOLDEN["x1"][:24]).reliable
    assert statistics_of(GOLDEN["x1"][:25]).reliable


# Files


def test_saved_statistics_come_back(tmp_path):
    statistics_of(GOLDEN["x1"]).save(tmp_path / "made" / "x1.npz")
    loaded = FeatureStatistics.load(str(tmp_path / "made" / "x1.npz"))
    assert_same(loaded, statistics_of(GOLDEN["x1"]), 1e-15)
    loaded.update(GOLDEN["x2"])
    assert_same(
        loaded.merge(statistics_of(GOLDEN["sing1"])), statistics_of(GOLDEN["x1"], GOLDEN["x2"], GOLDEN["sing1"])
    )
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["x1.npz"]


def test_files_are_what_pytorch_fid_reads(tmp_path):
    statistics_of(GOLDEN["x1"]).save(tmp_path / "x1.npz")
    with np.load(tmp_path / "x1.npz", allow_pickle=False) as file:
        assert {name: file[name].dtype for name in file} == {"mu": np.float64, "sigma": np.float64, "count": np.int64}
        np.testing.assert_allclose(file["mu"], GOLDEN["x1_mu"], rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(file["sigma"], GOLDEN["x1_sigma"], rtol=1e-12, atol=1e-14)
        assert file["count"] == 300


def test_published_statistics_are_compared_but_not_added_to(tmp_path):
    path, again = tmp_path / "published.npz", tmp_path / "again.npz"
    np.savez(path, mu=GOLDEN["x2_mu"], sigma=GOLDEN["x2_sigma"])
    loaded, ours = FeatureStatistics.load(path), statistics_of(GOLDEN["x1"])
    assert loaded.count is None and loaded.reliable
    for found in (loaded.frechet(ours), ours.frechet(loaded)):
        np.testing.assert_allclose(found, GOLDEN["fid_x1_x2"], rtol=1e-10)
    for add in (lambda: loaded.update(GOLDEN["x1"]), lambda: ours.merge(loaded), loaded.to_array):
        with pytest.raises(UsageError, match="unknown number of samples can be compared, but not"):
            add()
    loaded.save(again)
    assert FeatureStatistics.load(again).count is None
    np.testing.assert_array_equal(FeatureStatistics.load(again).covariance, GOLDEN["x2_sigma"])


def test_other_arrays_of_a_file_are_not_even_read(tmp_path):
    path = tmp_path / "adm.npz"
    np.savez(
        path, arr_0=np.array([object()]), mu=GOLDEN["x1_mu"], sigma=GOLDEN["x1_sigma"]
    )  # reading a pickled array fails
    np.testing.assert_array_equal(FeatureStatistics.load(path).mean, GOLDEN["x1_mu"])


def test_a_suffix_picks_the_adm_suites_spatial_statistics(tmp_path):
    np.savez(tmp_path / "adm.npz", mu=np.zeros(3), sigma=np.eye(3), mu_s=GOLDEN["x1_mu"], sigma_s=GOLDEN["x1_sigma"])
    np.testing.assert_array_equal(FeatureStatistics.load(tmp_path / "adm.npz", "_s").mean, GOLDEN["x1_mu"])
    with pytest.raises(UsageError, match="statistics need mu_t and sigma_t"):
        FeatureStatistics.load(tmp_path / "adm.npz", "_t")


def test_float32_statistics_are_read(tmp_path):
    mean, covariance = GOLDEN["x1_mu"].astype(np.float32), GOLDEN["x1_sigma"].astype(np.float32)
    np.savez(tmp_path / "x.npz", mu=mean, sigma=covariance)
    loaded = FeatureStatistics.load(tmp_path / "x.npz")
    assert loaded.covariance.dtype == loaded.mean.dtype == np.float64
    np.testing.assert_array_equal(loaded.covariance, covariance)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": np.zeros(3)}, "holds mu; statistics need mu and sigma"),
        ({"images": np.zeros(3)}, "holds images; statistics need mu and sigma"),
        ({"mu": np.zeros(3), "sigma": np.eye(4)}, r"sigma must be floats \[3, 3\], as mu has 3, not float64 \[4, 4\]"),
        ({"mu": np.zeros((1, 3)), "sigma": np.eye(3)}, r"mu must be floats \[D\], not float64 \[1, 3\]"),
        ({"mu": np.zeros(3, int), "sigma": np.eye(3)}, r"mu must be floats \[D\], not int64"),
        ({"mu": np.zeros(3), "sigma": np.eye(3, dtype=complex)}, r"sigma must be .* not complex128"),
        ({"mu": np.zeros(3), "sigma": np.full((3, 3), np.nan)}, "not finite"),
        ({"mu": np.zeros(3), "sigma": np.eye(3), "count": 2.5}, "count must be an integer of at least 2"),
        ({"mu": np.zeros(3), "sigma": np.eye(3), "count": [7, 7]}, "count must be an integer of at least 2"),
        ({"mu": np.zeros(3), "sigma": np.eye(3), "count": 1}, "count must be an integer of at least 2"),
        ({"mu": np.array([object()]), "sigma": np.eye(1)}, "cut short, or not an .npz file of plain arrays"),
    ],
)
def test_foreign_statistics_are_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "foreign.npz", **arrays)
    with pytest.raises(UsageError, match=rf"foreign\.npz: .*{message}"):
        FeatureStatistics.load(tmp_path / "foreign.npz")


def test_files_that_are_not_npz_are_refused(tmp_path):
    with pytest.raises(UsageError, match="no such file"):
        FeatureStatistics.load(tmp_path / "absent.npz")
    statistics_of(GOLDEN["x1"]).save(tmp_path / "whole.npz")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "whole.npz").read_bytes()[:-100])
    np.save(tmp_path / "one.npy", GOLDEN["x1_mu"])
    for name in ("cut.npz", "one.npy"):
        with pytest.raises(UsageError, match=r"cut short, or not an \.npz"):
            FeatureStatistics.load(tmp_path / name)


def test_statistics_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    found = statistics_of(GOLDEN["x1"])
    with pytest.raises(UsageError, match=r"written as \.npz"):
        found.save(tmp_path / "x.npy")
    with pytest.raises(UsageError, match="at least two samples"):
        statistics_of(GOLDEN["x1"][:1]).save(tmp_path / "x.npz")

    def killed(out, **arrays):
        out.write(b"half of it")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(np, "savez", killed)
        with pytest.raises(KeyboardInterrupt):
            found.save(tmp_path / "x.npz")
    assert not (tmp_path / "x.npz").exists()
    found.save(tmp_path / "x.npz")
    before = (tmp_path / "x.npz").read_bytes()
    with pytest.raises(UsageError, match="exists already"):
        statistics_of(GOLDEN["x2"]).save(tmp_path / "x.npz")
    assert (tmp_path / "x.npz").read_bytes() == before
