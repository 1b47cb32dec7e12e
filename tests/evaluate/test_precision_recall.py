"""Inception Score, precision and recall against golden values, ties and extremes included."""

import numpy as np
import pytest
from support import released

from ibq_jax.base.errors import UsageError
from ibq_jax.evaluate import precision_recall as neighbourhoods
from ibq_jax.evaluate.precision_recall import neighbourhood_flags, precision_recall
from ibq_jax.evaluate.statistics import inception_score

GOLDEN = released.load("frechet")


# Inception Score


@pytest.mark.parametrize("splits", [1, 10])
def test_inception_score_agrees(splits):
    logits, expected = GOLDEN["is_logits"], (GOLDEN[f"is{splits}_mean"], GOLDEN[f"is{splits}_std"])
    for way in ({"splits": splits}, {"split_rows": 200 // splits}):
        np.testing.assert_allclose(inception_score(logits, **way), expected, rtol=1e-10, atol=1e-14)
    scores = [inception_score(part)[0] for part in np.split(logits, splits)]
    np.testing.assert_allclose(scores, GOLDEN[f"is{splits}_scores"], rtol=1e-10)


def test_the_last_group_has_the_rest_of_the_rows():
    logits = GOLDEN["is_logits"]
    scores = [inception_score(part)[0] for part in (logits[:90], logits[90:180], logits[180:])]
    np.testing.assert_allclose(inception_score(logits, split_rows=90), (np.mean(scores), np.std(scores)), rtol=1e-14)


def test_splits_are_as_even_as_possible():
    logits = GOLDEN["is_logits"]
    scores = [inception_score(part)[0] for part in (logits[:66], logits[66:133], logits[133:])]
    np.testing.assert_allclose(inception_score(logits, 3), (np.mean(scores), np.std(scores)), rtol=1e-14)


@pytest.mark.parametrize("size", [0.0, 1e3, 1e30])
def test_certain_and_evenly_spread_predictions_score_the_number_of_classes(size):
    """Logits so far apart that probabilities underflow; a class that is never predicted adds nothing."""
    logits = np.tile(np.eye(5, 7), (4, 1)) * size
    np.testing.assert_allclose(inception_score(logits), (5.0 if size else 1.0, 0.0), rtol=1e-14)


def test_logits_of_float32_are_summed_in_float64():
    logits = GOLDEN["is_logits"].astype(np.float32)
    assert inception_score(logits + np.float32(0)) == inception_score(logits.astype(np.float64))


def test_inception_score_refuses_wrong_splits_and_logits():
    logits = np.zeros((5, 3))
    for splits in (0, 6):
        with pytest.raises(UsageError, match=f"split into 1 to 5 groups, not {splits}"):
            inception_score(logits, splits)
    for way in ({"split_rows": 0}, {"split_rows": 2, "splits": 2}):
        with pytest.raises(UsageError, match="give split_rows of at least 1, or splits"):
            inception_score(logits, **way)
    for wrong in (np.zeros(5), np.zeros((0, 3)), np.zeros((2, 3, 4))):
        with pytest.raises(UsageError, match=r"logits must be \[N, C\]"):
            inception_score(wrong)
    with pytest.raises(UsageError, match="logits: row 0 has a value that is not finite"):
        inception_score([[0.0, np.nan]])


# Precision and recall


def plain_flags(reference: np.ndarray, generated: np.ndarray, k: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """The definition, with float64 differences of every pair."""

    def squared(a, b):
        return np.array([[np.sum((x - y) ** 2) for y in b] for x in a])

    radii = [np.sort(squared(points, points), axis=1)[:, k] for points in (reference, generated)]
    between = squared(reference, generated)
    return (between <= radii[0][:, None]).any(axis=0), (between <= radii[1]).any(axis=1)


@pytest.mark.parametrize("block_bytes", [1, 3000, 2**27])
@pytest.mark.parametrize("case", ["pr", "prtie"])
def test_precision_and_recall_agree_in_every_point(monkeypatch, case, block_bytes):
    monkeypatch.setattr(neighbourhoods, "BLOCK_BYTES", block_bytes)
    reference, generated = GOLDEN[f"{case}_ref"], GOLDEN[f"{case}_gen"]
    generated_in, reference_in = neighbourhood_flags(reference, generated)
    np.testing.assert_array_equal(generated_in, GOLDEN[f"{case}_gen_in_ref"])
    np.testing.assert_array_equal(reference_in, GOLDEN[f"{case}_ref_in_gen"])
    assert precision_recall(reference, generated) == (GOLDEN[f"{case}_precision"], GOLDEN[f"{case}_recall"])


@pytest.mark.parametrize("case", ["pr", "prtie"])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_other_numbers_of_neighbours(case, k):
    reference, generated = (GOLDEN[f"{case}_{name}"].astype(np.float64) for name in ("ref", "gen"))
    for found, expected in zip(
        neighbourhood_flags(reference, generated, k), plain_flags(reference, generated, k), strict=True
    ):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(("dims", "scale"), [(16, 1.0), (2048, 0.3), (2048, 1e-20), (2048, 1e20)])
def test_coincident_points_are_at_distance_0(dims, scale):
    """Four equal rows have radius 0: their copies are inside, and points slightly away are not."""
    rng = np.random.default_rng(2)
    reference = np.repeat(rng.normal(size=(6, dims)), 4, axis=0) * scale
    nudged = reference[:12].copy()
    nudged[:, 5] += 1e-3 * scale
    generated = np.concatenate([reference[::-1], nudged])
    generated_in, reference_in = neighbourhood_flags(reference, generated)
    np.testing.assert_array_equal(generated_in, [True] * 24 + [False] * 12)
    assert reference_in.all()


@pytest.mark.parametrize("block_bytes", [1, 2**27])
def test_distances_on_the_grid_are_exact(monkeypatch, block_bytes):
    """No BLAS and no order of sums can change a radius."""
    monkeypatch.setattr(neighbourhoods, "BLOCK_BYTES", block_bytes)
    rng = np.random.default_rng(4)
    reference, generated = neighbourhoods._on_grid(rng.normal(size=(9, 2048)) + 10, rng.normal(size=(7, 2048)) * 3 + 10)
    whole = [[[int(x) for x in row] for row in points] for points in (reference, generated)]
    expected = [[sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) for b in whole[1]] for a in whole[0]]
    found = np.concatenate([distances for _, distances in neighbourhoods._distance_blocks(reference, generated)])
    assert [[int(x) for x in row] for row in found] == expected


@pytest.mark.parametrize("offset", [0.0, 1000.0, -(2.0**20)])
def test_ties_survive_a_common_offset(offset):
    reference, generated = GOLDEN["prtie_ref"] + offset, GOLDEN["prtie_gen"] + offset
    generated_in, reference_in = neighbourhood_flags(reference, generated)
    np.testing.assert_array_equal(generated_in, GOLDEN["prtie_gen_in_ref"])
    np.testing.assert_array_equal(reference_in, GOLDEN["prtie_ref_in_gen"])


def test_an_outlier_a_thousand_times_farther_away_changes_no_other_flag():
    reference = np.concatenate([GOLDEN["pr_ref"], np.full((1, 16), 1e3, np.float32)])
    generated_in, reference_in = neighbourhood_flags(reference, GOLDEN["pr_gen"])
    expected_generated, expected_reference = plain_flags(*(x.astype(np.float64) for x in (reference, GOLDEN["pr_gen"])))
    np.testing.assert_array_equal(generated_in, expected_generated)
    np.testing.assert_array_equal(reference_in, expected_reference)


def test_the_arguments_are_not_changed():
    reference, generated = GOLDEN["pr_ref"].astype(np.float64), GOLDEN["pr_gen"].astype(np.float64)
    precision_recall(reference, generated)
    np.testing.assert_array_equal(reference, GOLDEN["pr_ref"])
    np.testing.assert_array_equal(generated, GOLDEN["pr_gen"])


def test_equal_and_distant_sets():
    points = GOLDEN["pr_ref"]
    assert precision_recall(points, points) == (1.0, 1.0)
    assert precision_recall(points, points + 100) == (0.0, 0.0)
    assert precision_recall(np.zeros((5, 2)), np.zeros((6, 2))) == (1.0, 1.0)


def test_sets_without_a_kth_neighbour_are_refused():
    few, many = np.zeros((3, 4)), np.zeros((4, 4))
    with pytest.raises(UsageError, match="reference: k=3 needs at least 4 points, not 3"):
        precision_recall(few, many)
    with pytest.raises(UsageError, match="generated: k=3 needs at least 4"):
        precision_recall(many, few)
    with pytest.raises(UsageError, match="k must be at least 1, not 0"):
        precision_recall(many, many, k=0)
    with pytest.raises(UsageError, match="of one D"):
        precision_recall(many, np.zeros((4, 5)))
    with pytest.raises(UsageError, match="generated: row 2 has a value that is not finite"):
        precision_recall(many, np.where(np.arange(16).reshape(4, 4) == 9, np.inf, 0.0))
