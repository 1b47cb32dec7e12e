"""Statistics of features against pytorch-fid's and brute force, however the features come and whoever counts them."""

import numpy as np
import pytest
import released

from ibq_jax.base.errors import UsageError
from ibq_jax.evaluate import statistics
from ibq_jax.evaluate.statistics import FeatureStatistics, inception_score, neighbourhood_flags, precision_recall

GOLDEN = released.load("frechet")
RNG = np.random.default_rng(0)


def of(features, batch=None) -> FeatureStatistics:
    found = FeatureStatistics(features.shape[1])
    for start in range(0, len(features), batch or len(features)):
        found.update(features[start : start + (batch or len(features))])
    return found


@pytest.mark.parametrize("name", ["x1", "x2", "sing1", "sing2"])
def test_mean_and_covariance_are_numpys(name):
    found = of(GOLDEN[name], batch=7)
    np.testing.assert_allclose(found.mean, GOLDEN[f"{name}_mu"], rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(found.covariance, GOLDEN[f"{name}_sigma"], rtol=1e-11, atol=1e-13)
    assert found.count == len(GOLDEN[name]) and found.reliable == (found.count > 24)


def test_distances_are_pytorch_fids():
    x1, x2, few, others = (of(GOLDEN[name]) for name in ("x1", "x2", "sing1", "sing2"))
    assert x1.frechet(x2) == pytest.approx(float(GOLDEN["fid_x1_x2"]), rel=1e-10)
    assert x1.frechet(x1) == pytest.approx(float(GOLDEN["fid_x1_x1"]), abs=1e-9)
    assert few.frechet(others) == pytest.approx(float(GOLDEN["fid_sing1_sing2"]), rel=1e-6)
    assert few.frechet(others) == pytest.approx(float(GOLDEN["fid_sing1_sing2_eigh"]), rel=1e-6)
    assert few.frechet(x2) == pytest.approx(float(GOLDEN["fid_sing1_x2"]), rel=1e-6)
    assert x2.frechet(few) == pytest.approx(few.frechet(x2), rel=1e-10)


def test_batches_masks_and_shards_change_nothing(monkeypatch):
    monkeypatch.setattr(statistics, "BUFFER_ROWS", 37)  # so that batches cross its end
    features, reference = RNG.standard_normal((500, 16)) * 3 + 5, of(GOLDEN["x1"][:, :16])
    expected = of(features)
    for batch in (1, 36, 37, 38, 499):
        found = of(features, batch)
        np.testing.assert_allclose(found.covariance, expected.covariance, rtol=1e-11, atol=1e-12)
        assert found.frechet(reference) == pytest.approx(expected.frechet(reference), rel=1e-10)
    shards = [of(features[number::8], 11) for number in range(8)]
    merged = FeatureStatistics(16)
    for shard in reversed(shards):
        merged = merged.merge(FeatureStatistics.from_array(shard.to_array()))
    assert merged.count == 500 and all(shard.count < 100 for shard in shards)
    assert merged.frechet(reference) == pytest.approx(expected.frechet(reference), rel=1e-10)
    masked = FeatureStatistics(16)
    padded = np.concatenate([features, np.full((12, 16), np.nan)])
    masked.update(padded, np.arange(512) < 500)
    assert masked.frechet(expected) == pytest.approx(0, abs=1e-9)


def test_a_large_offset_costs_no_digits():
    features = RNG.standard_normal((400, 8))
    far = of(features + 2.0**20, 13)
    np.testing.assert_allclose(far.covariance, of(features).covariance, rtol=1e-8, atol=1e-9)


def test_statistics_are_kept_in_pytorch_fids_form(tmp_path):
    features, reference = of(GOLDEN["x1"]), of(GOLDEN["x2"])
    features.save(tmp_path / "mine.npz")
    loaded = FeatureStatistics.load(tmp_path / "mine.npz")
    assert loaded.count == 300 and loaded.merge(reference).count == 580
    np.savez(tmp_path / "theirs.npz", mu=GOLDEN["x1_mu"], sigma=GOLDEN["x1_sigma"], mu_s=np.zeros(3), sigma_s=np.eye(3))
    theirs = FeatureStatistics.load(tmp_path / "theirs.npz")
    assert theirs.count is None and theirs.frechet(reference) == pytest.approx(features.frechet(reference), rel=1e-10)
    assert FeatureStatistics.load(tmp_path / "theirs.npz", "_s").dims == 3
    with pytest.raises(UsageError, match="unknown number of samples"):
        theirs.merge(reference)
    with pytest.raises(UsageError, match=r"mine.npz exists already"):
        features.save(tmp_path / "mine.npz")


def test_what_is_no_feature_or_no_file_of_statistics_is_refused(tmp_path):
    found = FeatureStatistics(4)
    for features, words in (
        (np.zeros((2, 5)), r"features are \[B, 4\] here, not \[2, 5\]"),
        (np.full((2, 4), np.inf), "row 0 holds a value that is not finite"),
    ):
        with pytest.raises(UsageError, match=words):
            found.update(features)
    with pytest.raises(UsageError, match="no samples have no mean"):
        _ = found.mean
    with pytest.raises(UsageError, match="4 features and of 5 do not go together"):
        found.merge(FeatureStatistics(5))
    np.savez(tmp_path / "wide.npz", mu=np.zeros(4), sigma=np.eye(5))
    np.savez(tmp_path / "none.npz", features=np.zeros(4))
    (tmp_path / "text.npz").write_text("text")
    for name, words in (
        ("wide", "sigma is a covariance"),
        ("none", "holds features; statistics are mu and sigma"),
        ("text", "cut short, or not an .npz"),
        ("absent", "no such file"),
    ):
        with pytest.raises(UsageError, match=words):
            FeatureStatistics.load(tmp_path / f"{name}.npz")


def test_inception_scores_are_those_of_their_formula():
    for splits, name in ((10, "is10"), (1, "is1")):
        mean, deviation = inception_score(GOLDEN["is_logits"], splits)
        assert mean == pytest.approx(float(GOLDEN[f"{name}_mean"]), rel=1e-10)
        assert deviation == pytest.approx(float(GOLDEN[f"{name}_std"]), rel=1e-8, abs=1e-12)
    assert inception_score(GOLDEN["is_logits"], split_rows=20) == inception_score(GOLDEN["is_logits"], 10)
    assert inception_score(GOLDEN["is_logits"] + 1e4)[0] == pytest.approx(float(GOLDEN["is1_mean"]), rel=1e-9)


@pytest.mark.parametrize("case", ["pr", "prtie"])
def test_precision_and_recall_are_exact_ties_included(case, monkeypatch):
    reference, generated = GOLDEN[f"{case}_ref"], GOLDEN[f"{case}_gen"]
    for held in (statistics.BLOCK_BYTES, 1000):  # all distances at once, and a few rows at a time
        monkeypatch.setattr(statistics, "BLOCK_BYTES", held)
        inside, recalled = neighbourhood_flags(reference, generated)
        np.testing.assert_array_equal(inside, GOLDEN[f"{case}_gen_in_ref"])
        np.testing.assert_array_equal(recalled, GOLDEN[f"{case}_ref_in_gen"])
    expected = float(GOLDEN[f"{case}_precision"]), float(GOLDEN[f"{case}_recall"])
    assert precision_recall(reference, generated) == expected


def test_too_small_a_set_has_no_neighbourhoods():
    with pytest.raises(UsageError, match="3"):
        precision_recall(np.zeros((3, 2)), np.zeros((9, 2)))
