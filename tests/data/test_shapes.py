"""The choice of a few shapes for images of many sizes, against trying every choice."""

import itertools
from collections import Counter

import numpy as np
import pytest

from ibq_jax.data.shapes import aspect_change, choose_shapes, nearest_shape, stretch


def total_stretch(counts: dict, shapes) -> float:
    return sum(count * min(stretch(size, shape) for shape in shapes) for size, count in counts.items())


def test_few_sizes_are_all_shapes():
    counts = {(8, 8): 1, (4, 16): 100, (16, 4): 2}
    assert choose_shapes(counts, 3) == [(4, 16), (8, 8), (16, 4)]


@pytest.mark.parametrize("seed", range(5))
def test_one_shape_is_the_best_and_more_are_nearly_so(seed):
    rng = np.random.default_rng(seed)
    counts = {tuple(map(int, rng.integers(4, 40, 2))): int(rng.integers(1, 50)) for _ in range(12)}
    for most in (1, 2, 3):
        best = min(total_stretch(counts, chosen) for chosen in itertools.combinations(counts, most))
        found = choose_shapes(counts, most)
        assert len(found) == most and set(found) <= set(counts)
        assert total_stretch(counts, found) <= best * (1 if most == 1 else 1.35) + 1e-9


def test_many_sizes_are_covered_within_a_few_percent():
    rng = np.random.default_rng(0)
    sizes = [(int(32 * 2**t), round(1024 / int(32 * 2**t))) for t in rng.uniform(-1, 1, 20_000)]  # one area, 1:4 to 4:1
    counts = Counter(sizes)
    shapes = choose_shapes(counts, 24)
    assert len(counts) > 40 and len(shapes) == 24
    changes = {size: aspect_change(size, nearest_shape(size, shapes)) for size in counts}
    assert max(changes.values()) < 0.09  # 0.080
    assert sum(counts[size] * changes[size] for size in counts) / len(sizes) < 0.02  # 0.018


def test_far_sizes_are_stretched_in_area_rather_than_squeezed():
    """Areas over a range of 16, which 24 shapes cannot all have."""
    rng = np.random.default_rng(0)
    areas, aspects = np.exp(rng.uniform(np.log(256), np.log(4096), 2000)), np.exp(rng.normal(0, 0.35, 2000))
    sizes = [
        (round((area * aspect) ** 0.5), round((area / aspect) ** 0.5))
        for area, aspect in zip(areas, aspects, strict=True)
    ]
    shapes = choose_shapes(Counter(sizes), 24)
    change = {size: aspect_change(size, nearest_shape(size, shapes)) for size in set(sizes)}
    changes = sorted(change[size] for size in sizes)
    assert np.mean(changes) < 0.06 and changes[int(0.99 * len(changes))] < 0.2


def test_an_images_own_shape_is_the_nearest():
    assert nearest_shape((10, 10), [(10, 11), (10, 10), (9, 10)]) == (10, 10)
    assert nearest_shape((10, 20), [(20, 10), (12, 24), (10, 18)]) == (12, 24)  # larger rather than squeezed
    assert aspect_change((10, 10), (10, 11)) == pytest.approx(0.1)
    assert aspect_change((10, 10), (11, 10)) == pytest.approx(0.1)
    assert stretch((10, 10), (20, 20)) == pytest.approx(0.05 * np.log(4) ** 2)
    assert stretch((10, 10), (10, 20)) == pytest.approx(1.05 * np.log(2) ** 2)
