"""Improved precision and recall of feature sets (Kynkaanniemi et al. 2019); float64, on the host."""

import numpy as np

from ibq_jax.base.errors import UsageError
from ibq_jax.evaluate.statistics import check_finite

BLOCK_BYTES = 2**27  # of distances held at a time
GRID_BITS = 25  # 4 (2^25)^2 < 2^53: the distance of any two points of the grid is an integer that float64 holds


def precision_recall(reference, generated, k: int = 3) -> tuple[float, float]:
    """Computes improved precision and recall of features [M, D] and [N, D].

    Arguments and errors are those of `neighbourhood_flags`.

    Returns:
        precision, the fraction of generated points that lie in the reference's neighbourhoods, and recall, the reverse.
    """
    generated_in_reference, reference_in_generated = neighbourhood_flags(reference, generated, k)
    return float(generated_in_reference.mean()), float(reference_in_generated.mean())


def neighbourhood_flags(reference, generated, k: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Finds the points of each set that lie in a neighbourhood of the other set.

    A point's neighbourhood is the closed ball that reaches to its k-th nearest other point of its own set.

    Features are rounded to a grid with steps of at most 2^-24 of the largest distance from the first reference point;
    on that grid distances are exact. So coincident points are at distance 0, equal distances are equal, and neither the
    number of threads nor the order of sums matters. Needs two float64 copies of the features and BLOCK_BYTES for
    distances.

    Args:
        reference: real [M, D].
        generated: real [N, D].
        k: number of the neighbour that defines the radius.

    Returns:
        bool [N], generated points in the reference's neighbourhoods; bool [M], reference points in the generated set's.

    Raises:
        UsageError: the shapes do not match, a value is not finite, or a set has at most k points.
    """
    reference, generated = np.asarray(reference), np.asarray(generated)
    if k < 1:
        raise UsageError(f"k must be at least 1, not {k}")
    for name, features in (("reference", reference), ("generated", generated)):
        if features.ndim != 2 or features.shape[1] != reference.shape[-1]:
            raise UsageError(f"reference and generated are [N, D] of one D, not {reference.shape}, {generated.shape}")
        if len(features) <= k:
            raise UsageError(f"{name}: k={k} needs at least {k + 1} points, not {len(features)}")
        check_finite(name, features)
    reference, generated = _on_grid(reference, generated)
    reference_radii, generated_radii = _radii(reference, k), _radii(generated, k)
    generated_in, reference_in = np.zeros(len(generated), bool), np.zeros(len(reference), bool)
    for rows, distances in _distance_blocks(reference, generated):
        generated_in |= (distances <= reference_radii[rows, None]).any(axis=0)
        reference_in[rows] = (distances <= generated_radii).any(axis=1)
    return generated_in, reference_in


def _on_grid(reference: np.ndarray, generated: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rounds both sets to multiples of a power of two, at most 2^GRID_BITS of them from the first reference point."""
    origin = reference[0].astype(np.float64)  # subtracted, so that a common offset uses no bits
    moved = [features - origin for features in (reference, generated)]
    _, exponent = np.frexp(max(np.sqrt(np.einsum("nd,nd->n", rows, rows).max()) for rows in moved))
    for rows in moved:
        np.rint(np.ldexp(rows, GRID_BITS - exponent, out=rows), out=rows)
    return moved[0], moved[1]


def _distance_blocks(points: np.ndarray, others: np.ndarray):
    """Yields (slice of the points, their squared distances to all others [rows, N]); exact for integers."""
    point_squares, other_squares = (np.einsum("nd,nd->n", rows, rows) for rows in (points, others))
    block = max(1, BLOCK_BYTES // others[:, 0].nbytes)
    for start in range(0, len(points), block):
        rows = slice(start, start + block)
        distances = points[rows] @ others.T
        distances *= -2
        distances += point_squares[rows, None]
        distances += other_squares
        yield rows, distances


def _radii(points: np.ndarray, k: int) -> np.ndarray:
    """Returns each point's squared distance to its k-th nearest other point; index 0 is its distance to itself."""
    radii = np.empty(len(points))
    for rows, distances in _distance_blocks(points, points):
        distances.partition(k, axis=1)
        radii[rows] = distances[:, k]
    return radii
