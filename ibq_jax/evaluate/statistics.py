"""Numbers about sets of features: Frechet distance (FID), Inception Score, precision and recall; float64, on the host.

Shapes: features [N, D], logits [N, C], mask bool [N], False on the rows that only fill a batch up. Everything that
np.asarray takes is taken. What is wrong with an argument is said in a UsageError.
"""

import itertools
from pathlib import Path

import numpy as np

from ibq_jax.base.errors import UsageError, one_line, printable
from ibq_jax.base.files import atomic_file
from ibq_jax.pretrained.archive_limits import open_npz

BUFFER_ROWS = 1024  # features that wait for one product: at D = 2048 four times as fast as 64 at a time
BLOCK_BYTES = 2**27  # of distances held at a time
GRID_BITS = 25  # 4 (2^25)^2 < 2^53: the distance of any two points of the grid is an integer that float64 holds


class FeatureStatistics:
    """Mean and covariance of features that come batch by batch, and how far apart two of them are.

    Scatter matrices about the mean are kept, not raw second moments, and joined as Chan, Golub and LeVeque (1979) do: a
    large common offset costs no digits, and batches and shards may come in any order.
    """

    def __init__(self, dims: int):
        """Of no samples yet; each will have `dims` features."""
        self._count: int | None = 0
        self._mean = np.zeros(dims)
        self._scatter = np.zeros((dims, dims))  # sum of (x - mean) (x - mean)^T; the covariance where count is None
        self._buffer = np.empty((BUFFER_ROWS + 1, dims))  # the last row is for the step from the old mean to the new
        self._waiting = 0

    def update(self, features, mask=None) -> None:
        """Adds samples: real [B, D]; of those where `mask`, bool [B], is False nothing is asked.

        Raises:
            UsageError: another shape, a mask that is not of booleans, a value that is not finite, or no known count.
        """
        self._needs_count("added to")
        features = np.asarray(features)
        if features.ndim != 2 or features.shape[1] != self.dims:
            raise UsageError(f"features are [B, {self.dims}] here, not {list(features.shape)}")
        mask = np.ones(len(features), bool) if mask is None else np.asarray(mask)
        if mask.dtype != bool or mask.shape != features.shape[:1]:
            raise UsageError(
                f"the mask of these features is bool [{len(features)}], not {mask.dtype} {list(mask.shape)}"
            )
        _finite("features", features, mask)
        rows = features[mask]
        while len(rows):
            taken = rows[: BUFFER_ROWS - self._waiting]
            self._buffer[self._waiting : self._waiting + len(taken)] = taken
            self._waiting += len(taken)
            rows = rows[len(taken) :]
            if self._waiting == BUFFER_ROWS:
                self._flush()

    def merge(self, other: "FeatureStatistics") -> "FeatureStatistics":
        """Of the samples of both, which stay as they are. Raises UsageError for other dims or no known count."""
        self._same_dims(other)
        for statistics in (self, other):
            statistics._needs_count("merged")
            statistics._flush()
        merged = FeatureStatistics(self.dims)
        merged._count = self._count + other._count
        share = other._count / max(merged._count, 1)
        step = other._mean - self._mean
        between = np.sqrt(self._count * share) * step  # on both sides of the product: symmetric to the last bit
        merged._mean = self._mean + share * step
        merged._scatter = self._scatter + other._scatter + np.outer(between, between)
        return merged

    @property
    def dims(self) -> int:
        return len(self._mean)

    @property
    def count(self) -> int | None:
        """Samples; None for statistics from a file that does not tell."""
        return None if self._count is None else self._count + self._waiting

    @property
    def mean(self) -> np.ndarray:
        """float64 [D]. Raises UsageError before the first sample."""
        if self.count == 0:
            raise UsageError("no samples have no mean; update these statistics first")
        self._flush()
        return self._mean.copy()

    @property
    def covariance(self) -> np.ndarray:
        """Of a sample, divided by N - 1: float64 [D, D]. Raises UsageError before the second sample."""
        if self.count is None:
            return self._scatter.copy()
        if self.count < 2:
            raise UsageError(f"a covariance needs two samples or more, not {self.count}")
        self._flush()
        return self._scatter / (self._count - 1)

    @property
    def reliable(self) -> bool:
        """False where the samples are too few for a covariance of full rank, so that a Frechet distance says little.

        True where their number is not known.
        """
        return self.count is None or self.count > self.dims

    def frechet(self, other: "FeatureStatistics") -> float:
        """Squared Frechet distance of the two normal distributions, |m1 - m2|^2 + tr(S1) + tr(S2) - 2 tr sqrt(S1 S2).

        With S1 = A A^T and S2 = B B^T, the last trace is the sum of A^T B's singular values. A and B have as many
        columns as their covariances have rank, so that with fewer samples than dims no root of rounding is added up.

        Raises:
            UsageError: other dims, or fewer than two samples in either.
        """
        self._same_dims(other)
        first, second = self.covariance, other.covariance
        overlap = np.linalg.svd(_root(first).T @ _root(second), compute_uv=False).sum()
        step = self.mean - other.mean
        return max(0.0, float(step @ step + np.trace(first) + np.trace(second) - 2 * overlap))

    def save(self, path: str | Path) -> None:
        """An .npz with `mu` [D] and `sigma` [D, D], as pytorch-fid reads and writes them, and `count`.

        Whole or not there. Raises UsageError for another name, one that exists, a full disk, or fewer than two samples.
        """
        path = Path(path)
        if path.suffix != ".npz":
            raise UsageError(f"{path}: statistics are written as .npz")
        arrays = {"mu": self.mean, "sigma": self.covariance}
        if self.count is not None:
            arrays["count"] = np.int64(self.count)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as partial:
            if partial is None:
                raise UsageError(f"{path} exists already, or another process is writing it")
            with partial.open("wb") as out:
                np.savez(out, **arrays)

    @classmethod
    def load(cls, path: str | Path, suffix: str = "") -> "FeatureStatistics":
        """From an .npz with `mu` and `sigma`, and with `count` where it is known; what else is in it is not read.

        `suffix` follows their names: the ADM suite's files have sFID's moments as `mu_s` and `sigma_s`.

        Raises:
            UsageError: the file is absent, cut short or foreign, or its arrays are not a mean and a covariance.
        """
        mean, covariance, count = _read(Path(path), suffix)
        if mean.dtype.kind != "f" or mean.ndim != 1:
            raise UsageError(f"{path}: mu is a mean of floats [D], not {mean.dtype} {list(mean.shape)}")
        if covariance.dtype.kind != "f" or covariance.shape != (len(mean), len(mean)):
            raise UsageError(
                f"{path}: sigma is a covariance of floats [{len(mean)}, {len(mean)}], the width of mu, "
                f"not {covariance.dtype} {list(covariance.shape)}"
            )
        if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
            raise UsageError(f"{path}: mu or sigma holds values that are not finite")
        if count is not None and (count.dtype.kind not in "iu" or count.shape or count < 2):
            raise UsageError(f"{path}: count is an integer of two or more, not {count!r}")
        loaded = cls(len(mean))
        loaded._mean = mean.astype(np.float64)
        loaded._scatter = covariance.astype(np.float64)
        loaded._count = None
        if count is not None:
            loaded._count = int(count)
            loaded._scatter *= loaded._count - 1
        return loaded

    def to_array(self) -> np.ndarray:
        """Count, mean and scatter, row by row, in one vector float64 [1 + D + D D], for processes to exchange.

        Without x64, JAX's collectives round float64 to float32: send `.view(np.uint32)`, and view what comes back as
        float64. Raises UsageError where the count is not known.
        """
        self._needs_count("packed")
        self._flush()
        return np.concatenate([[self._count], self._mean, self._scatter.ravel()])

    @classmethod
    def from_array(cls, packed) -> "FeatureStatistics":
        """What `to_array` packed. Raises UsageError for a vector of another type or length."""
        packed = np.asarray(packed)
        dims = int(np.sqrt(packed.size))  # D^2 < 1 + D + D^2 < (D + 1)^2
        if packed.dtype != np.float64 or packed.shape != (1 + dims + dims**2,):
            raise UsageError(f"packed statistics are float64 [1 + D + D D], not {packed.dtype} {list(packed.shape)}")
        statistics = cls(dims)
        statistics._count = int(packed[0])
        statistics._mean = packed[1 : 1 + dims].copy()
        statistics._scatter = packed[1 + dims :].reshape(dims, dims).copy()
        return statistics

    def _flush(self) -> None:
        """One symmetric product for the samples that wait; the old mean's step to theirs is one more row of it."""
        if not self._waiting:
            return
        rows = self._buffer[: self._waiting]
        origin = self._mean if self._count else rows[0].copy()  # a point nearby, about which small numbers are added
        rows -= origin
        step = rows.mean(axis=0)
        rows -= step
        count = self._count + self._waiting
        self._buffer[self._waiting] = np.sqrt(self._count * self._waiting / count) * step
        used = self._buffer[: self._waiting + 1]
        self._scatter += used.T @ used
        self._mean = origin + step * (self._waiting / count)
        self._count, self._waiting = count, 0

    def _same_dims(self, other: "FeatureStatistics") -> None:
        if self.dims != other.dims:
            raise UsageError(f"statistics of {self.dims} features and of {other.dims} do not go together")

    def _needs_count(self, what: str) -> None:
        if self._count is None:
            raise UsageError(f"statistics of an unknown number of samples can be compared, but not {what}")


def inception_score(logits, splits: int = 1, *, split_rows: int | None = None) -> tuple[float, float]:
    """exp of the mean KL divergence, in nats, of each row's class probabilities from their mean (Salimans et al. 2016).

    Args:
        logits: of the classes, real [N, C].
        splits: contiguous runs of rows, as even as can be, each with a score of its own.
        split_rows: in place of `splits`, the rows of a run, the last of which takes what is left; 5000 is the ADM
            evaluation suite's (github.com/openai/guided-diffusion).

    Returns:
        mean and population standard deviation of the runs' scores.

    Raises:
        UsageError: logits of another shape or not finite, fewer rows than splits, or both ways to split given.
    """
    logits = np.asarray(logits)
    if logits.ndim != 2 or not logits.size:
        raise UsageError(f"logits are [N, C], at least one of each, not {list(logits.shape)}")
    _finite("logits", logits)
    if split_rows is None:
        if not 1 <= splits <= len(logits):
            raise UsageError(f"{len(logits)} rows of logits can be split into 1 to {len(logits)} runs, not {splits}")
        bounds = [number * len(logits) // splits for number in range(splits + 1)]
    else:
        if splits != 1 or split_rows < 1:
            raise UsageError(f"give split_rows of 1 or more, or splits; not {split_rows} and {splits}")
        bounds = [*range(0, len(logits), split_rows), len(logits)]
    scores = [_score(logits[start:stop]) for start, stop in itertools.pairwise(bounds)]
    return float(np.mean(scores)), float(np.std(scores))


def precision_recall(reference, generated, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019) of features [M, D] and [N, D]: `neighbourhood_flags`.

    Returns:
        precision, the share of generated points that lie in the reference's neighbourhoods, and recall, the reverse.
    """
    generated_in_reference, reference_in_generated = neighbourhood_flags(reference, generated, k)
    return float(generated_in_reference.mean()), float(reference_in_generated.mean())


def neighbourhood_flags(reference, generated, k: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Which points of a set lie in a neighbourhood of the other's.

    A point's neighbourhood is the ball that reaches to its k-th nearest other point of its own set, rim included.

    Distances are exact on a grid with steps of at most 2^-24 of the largest distance from the first reference point,
    to which features are rounded: coincident points are at distance 0, equal distances are equal, and no number of
    threads or order of sums decides. Two float64 copies of the features are held, and BLOCK_BYTES of distances.

    Args:
        reference: real [M, D].
        generated: real [N, D].
        k: neighbours within the radius.

    Returns:
        bool [N], generated points in the reference's neighbourhoods; bool [M], reference points in the generated ones'.

    Raises:
        UsageError: sets of other shapes, values that are not finite, or a set of k points or fewer.
    """
    reference, generated = np.asarray(reference), np.asarray(generated)
    if k < 1:
        raise UsageError(f"k is the number of a neighbour, 1 or more, not {k}")
    for name, features in (("reference", reference), ("generated", generated)):
        if features.ndim != 2 or features.shape[1] != reference.shape[-1]:
            raise UsageError(f"reference and generated are [N, D] of one D, not {reference.shape}, {generated.shape}")
        if len(features) <= k:
            raise UsageError(f"{name}: the {k}-th nearest other point wants over {k} points, not {len(features)}")
        _finite(name, features)
    reference, generated = _on_grid(reference, generated)
    reference_radii, generated_radii = _radii(reference, k), _radii(generated, k)
    generated_in, reference_in = np.zeros(len(generated), bool), np.zeros(len(reference), bool)
    for rows, distances in _distance_blocks(reference, generated):
        generated_in |= (distances <= reference_radii[rows, None]).any(axis=0)
        reference_in[rows] = (distances <= generated_radii).any(axis=1)
    return generated_in, reference_in


def _root(covariance: np.ndarray) -> np.ndarray:
    """A, float64 [D, rank], with A A^T = covariance [D, D]."""
    values, vectors = np.linalg.eigh(covariance)
    kept = values > len(values) * np.finfo(np.float64).eps * values[-1]
    return vectors[:, kept] * np.sqrt(values[kept])


def _score(logits: np.ndarray) -> float:
    """Of rows p_n and their mean m: mean_n sum p_n (log p_n - log m) = mean_n sum p_n log p_n - sum m log m."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    probabilities = np.exp(shifted)
    sums = probabilities.sum(axis=1, keepdims=True)
    probabilities /= sums
    shifted -= np.log(sums)
    mean = probabilities.mean(axis=0)
    seen = mean[mean > 0]  # one that vanishes adds nothing
    return float(np.exp(np.vdot(probabilities, shifted) / len(logits) - seen @ np.log(seen)))


def _on_grid(reference: np.ndarray, generated: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both in whole steps of a power of two from the first reference point; none lies over 2^GRID_BITS steps away."""
    origin = reference[0].astype(np.float64)  # so that a common offset takes no bits
    moved = [features - origin for features in (reference, generated)]
    _, exponent = np.frexp(max(np.sqrt(np.einsum("nd,nd->n", rows, rows).max()) for rows in moved))
    for rows in moved:
        np.rint(np.ldexp(rows, GRID_BITS - exponent, out=rows), out=rows)
    return moved[0], moved[1]


def _distance_blocks(points: np.ndarray, others: np.ndarray):
    """Yields (slice of the points, their squared distances to all others [rows, N]); of whole numbers, exact."""
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
    """Squared distance of each point to its k-th nearest other; its own 0 is the first of the sorted row."""
    radii = np.empty(len(points))
    for rows, distances in _distance_blocks(points, points):
        distances.partition(k, axis=1)
        radii[rows] = distances[:, k]
    return radii


def _finite(name: str, rows: np.ndarray, mask: np.ndarray | bool = True) -> None:
    """Raises UsageError for the first row of `rows` [N, D], of those in `mask`, that is not finite all through."""
    bad = np.flatnonzero(~np.isfinite(rows).all(axis=1) & mask)
    if len(bad):
        raise UsageError(f"{name}: row {bad[0]} holds a value that is not finite, and so do {len(bad) - 1} more")


def _read(path: Path, suffix: str) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Array by array: the ADM suite's reference files hold gigabytes of pictures beside their statistics."""
    if not path.is_file():
        raise UsageError(f"{path}: no such file")
    try:
        with open_npz(path) as arrays:
            mean, covariance = f"mu{suffix}", f"sigma{suffix}"
            if not {mean, covariance} <= set(arrays.names):
                held = printable(", ".join(arrays.names)) or "nothing"
                raise UsageError(f"{path}: holds {held}; statistics are {mean} and {covariance}")
            return arrays[mean], arrays[covariance], arrays["count"] if "count" in arrays.names else None
    except UsageError:
        raise
    except Exception as error:  # from foreign bytes zipfile and NumPy may raise anything
        raise UsageError(f"{path}: cut short, or not an .npz file of plain arrays ({one_line(error)})") from error
