"""Statistics of feature sets: Frechet distance (FID) and Inception Score; float64, on the host.

Shapes: features [N, D], logits [N, C], mask bool [N], False in rows that only pad a batch. Arguments may be anything
that np.asarray accepts; a wrong one raises UsageError.
"""

import itertools
from pathlib import Path

import numpy as np

from ibq_jax.base.errors import UsageError, one_line, printable
from ibq_jax.base.files import atomic_file
from ibq_jax.pretrained.archive_limits import open_npz

BUFFER_ROWS = 1024  # features collected for one matrix product: at D = 2048 four times as fast as 64 at a time


class FeatureStatistics:
    """Mean and covariance of features that arrive in batches, and the Frechet distance between two such sets.

    Keeps scatter matrices about the mean, not raw second moments, and merges them as Chan, Golub and LeVeque (1979) do:
    a large common offset costs no digits, and batches and shards may come in any order.
    """

    def __init__(self, dims: int):
        """Starts without samples; each will have `dims` features."""
        self._count: int | None = 0
        self._mean = np.zeros(dims)
        self._scatter = np.zeros((dims, dims))  # sum of (x - mean) (x - mean)^T; the covariance if count is None
        self._buffer = np.empty((BUFFER_ROWS + 1, dims))  # the last row is for the step between the means
        self._waiting = 0

    def update(self, features, mask=None) -> None:
        """Adds samples.

        Args:
            features: real [B, D].
            mask: bool [B]; rows where it is False are ignored, whatever they hold.

        Raises:
            UsageError: a wrong shape, a mask that is not boolean, a value that is not finite, or an unknown count.
        """
        self._require_count("added to")
        features = np.asarray(features)
        if features.ndim != 2 or features.shape[1] != self.dims:
            raise UsageError(f"features are [B, {self.dims}] here, not {list(features.shape)}")
        mask = np.ones(len(features), bool) if mask is None else np.asarray(mask)
        if mask.dtype != bool or mask.shape != features.shape[:1]:
            raise UsageError(
                f"the mask of these features is bool [{len(features)}], not {mask.dtype} {list(mask.shape)}"
            )
        check_finite("features", features, mask)
        rows = features[mask]
        while len(rows):
            taken = rows[: BUFFER_ROWS - self._waiting]
            self._buffer[self._waiting : self._waiting + len(taken)] = taken
            self._waiting += len(taken)
            rows = rows[len(taken) :]
            if self._waiting == BUFFER_ROWS:
                self._flush()

    def merge(self, other: "FeatureStatistics") -> "FeatureStatistics":
        """Returns the statistics of both sets together; neither changes.

        Raises UsageError if the dims differ or a count is unknown.
        """
        self._same_dims(other)
        for statistics in (self, other):
            statistics._flush()
        own_count, other_count = (statistics._require_count("merged") for statistics in (self, other))
        merged = FeatureStatistics(self.dims)
        merged._count = own_count + other_count
        share = other_count / max(merged._count, 1)
        step = other._mean - self._mean
        between = np.sqrt(own_count * share) * step  # on both sides of the product: symmetric bit for bit
        merged._mean = self._mean + share * step
        merged._scatter = self._scatter + other._scatter + np.outer(between, between)
        return merged

    @property
    def dims(self) -> int:
        """D, the number of features."""
        return len(self._mean)

    @property
    def count(self) -> int | None:
        """The number of samples; None for statistics from a file that does not have it."""
        return None if self._count is None else self._count + self._waiting

    @property
    def mean(self) -> np.ndarray:
        """The mean, float64 [D]. Raises UsageError before the first sample."""
        if self.count == 0:
            raise UsageError("there is no mean of no samples; call update() first")
        self._flush()
        return self._mean.copy()

    @property
    def covariance(self) -> np.ndarray:
        """The sample covariance (divided by N - 1), float64 [D, D]. Raises UsageError before the second sample."""
        if self.count is None:
            return self._scatter.copy()
        if self.count < 2:
            raise UsageError(f"a covariance needs at least two samples, not {self.count}")
        self._flush()
        return self._scatter / (self.count - 1)

    @property
    def reliable(self) -> bool:
        """False with too few samples for a covariance of full rank, so that a Frechet distance means little.

        True if their number is unknown.
        """
        return self.count is None or self.count > self.dims

    def frechet(self, other: "FeatureStatistics") -> float:
        """Returns the squared Frechet distance between two normal distributions with these means and covariances.

        |m1 - m2|^2 + tr(S1) + tr(S2) - 2 tr sqrt(S1 S2). With S1 = A A^T and S2 = B B^T, the last trace is the sum of
        the singular values of A^T B. A and B have as many columns as their covariances have rank, so that with fewer
        samples than dims no square roots of rounding errors are summed.

        Raises:
            UsageError: the dims differ, or either set has fewer than two samples.
        """
        self._same_dims(other)
        first, second = self.covariance, other.covariance
        overlap = np.linalg.svd(_root(first).T @ _root(second), compute_uv=False).sum()
        step = self.mean - other.mean
        return max(0.0, float(step @ step + np.trace(first) + np.trace(second) - 2 * overlap))

    def save(self, path: str | Path) -> None:
        """Writes an .npz with `mu` [D] and `sigma` [D, D], as pytorch-fid reads and writes them, and `count`.

        The write is atomic. Raises UsageError if the name does not end in .npz or exists, the disk is full, or there
        are fewer than two samples.
        """
        path = Path(path)
        if path.suffix != ".npz":
            raise UsageError(f"{path}: statistics are written as .npz; give a name that ends in .npz")
        arrays = {"mu": self.mean, "sigma": self.covariance}
        if self.count is not None:
            arrays["count"] = np.asarray(self.count, np.int64)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as partial:
            if partial is None:
                raise UsageError(f"{path} exists already, or another process is writing it")
            with partial.open("wb") as out:
                np.savez(out, allow_pickle=False, **arrays)

    @classmethod
    def load(cls, path: str | Path, suffix: str = "") -> "FeatureStatistics":
        """Reads an .npz with `mu` and `sigma`, and `count` if it is there; other arrays are not read.

        Args:
            path: the file.
            suffix: follows these names: the ADM suite's files hold sFID's moments as `mu_s` and `sigma_s`.

        Raises:
            UsageError: the file is absent, cut short or of another format, or its arrays are not a mean and a
                covariance.
        """
        mean, covariance, count = _read(Path(path), suffix)
        if mean.dtype.kind != "f" or mean.ndim != 1:
            raise UsageError(f"{path}: mu must be floats [D], not {mean.dtype} {list(mean.shape)}")
        if covariance.dtype.kind != "f" or covariance.shape != (len(mean), len(mean)):
            raise UsageError(
                f"{path}: sigma must be floats [{len(mean)}, {len(mean)}], as mu has {len(mean)}, "
                f"not {covariance.dtype} {list(covariance.shape)}"
            )
        if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
            raise UsageError(f"{path}: mu or sigma holds values that are not finite")
        if count is not None and (count.dtype.kind not in "iu" or count.shape or count < 2):
            raise UsageError(f"{path}: count must be an integer of at least 2, not {count!r}")
        loaded = cls(len(mean))
        loaded._mean = mean.astype(np.float64)
        loaded._scatter = covariance.astype(np.float64)
        loaded._count = None
        if count is not None:
            loaded._count = int(count)
            loaded._scatter *= loaded._count - 1
        return loaded

    def to_array(self) -> np.ndarray:
        """Packs count, mean and scatter (row by row) into one vector, float64 [1 + D + D D], to send between processes.

        Without x64, JAX's collectives round float64 to float32: send `.view(np.uint32)` and view the result as float64.
        Raises UsageError if the count is unknown.
        """
        self._flush()
        count = self._require_count("packed")
        return np.concatenate([np.asarray([count], np.float64), self._mean, self._scatter.ravel()])

    @classmethod
    def from_array(cls, packed) -> "FeatureStatistics":
        """Unpacks the result of `to_array`. Raises UsageError for a vector of another type or length."""
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
        """Adds the waiting samples by one symmetric product; the step from the old mean to theirs is an extra row."""
        if not self._waiting:
            return
        rows, known = self._buffer[: self._waiting], self._require_count("added to")
        origin = self._mean if known else rows[0].copy()  # a nearby point, so that small numbers are summed
        rows -= origin
        step = rows.mean(axis=0)
        rows -= step
        count = known + self._waiting
        self._buffer[self._waiting] = np.sqrt(known * self._waiting / count) * step
        used = self._buffer[: self._waiting + 1]
        self._scatter += used.T @ used
        self._mean = origin + step * (self._waiting / count)
        self._count, self._waiting = count, 0

    def _same_dims(self, other: "FeatureStatistics") -> None:
        if self.dims != other.dims:
            raise UsageError(f"statistics of {self.dims} features and of {other.dims} cannot be combined")

    def _require_count(self, verb: str) -> int:
        if self._count is None:
            raise UsageError(f"statistics of an unknown number of samples can be compared, but not {verb}")
        return self._count


def inception_score(logits, splits: int = 1, *, split_rows: int | None = None) -> tuple[float, float]:
    """Computes the Inception Score (Salimans et al. 2016).

    That is exp of the mean KL divergence, in nats, of each row's class probabilities from their mean.

    Args:
        logits: class logits, real [N, C].
        splits: number of contiguous groups of rows, as even as possible, each with its own score.
        split_rows: instead of `splits`, the rows per group; the last group has the rest. The ADM evaluation suite
            (github.com/openai/guided-diffusion) uses 5000.

    Returns:
        mean and population standard deviation of the groups' scores.

    Raises:
        UsageError: logits have the wrong shape or are not finite, there are fewer rows than splits, or both `splits`
            and `split_rows` are given.
    """
    logits = np.asarray(logits)
    if logits.ndim != 2 or not logits.size:
        raise UsageError(f"logits must be [N, C] and not empty, not {list(logits.shape)}")
    check_finite("logits", logits)
    if split_rows is None:
        if not 1 <= splits <= len(logits):
            raise UsageError(f"{len(logits)} rows of logits can be split into 1 to {len(logits)} groups, not {splits}")
        bounds = [number * len(logits) // splits for number in range(splits + 1)]
    else:
        if splits != 1 or split_rows < 1:
            raise UsageError(f"give split_rows of at least 1, or splits; not {split_rows} and {splits}")
        bounds = [*range(0, len(logits), split_rows), len(logits)]
    scores = [_score(logits[start:stop]) for start, stop in itertools.pairwise(bounds)]
    return float(np.mean(scores)), float(np.std(scores))


def _root(covariance: np.ndarray) -> np.ndarray:
    """Returns A, float64 [D, rank], with A A^T = covariance [D, D].

    This is Cholesky's decomposition with pivoting: of a covariance of few samples it costs a tenth of eigenvectors.
    """
    from scipy.linalg import get_lapack_funcs  # not before it is needed: every command would take longer to start

    (decompose,) = get_lapack_funcs(("pstrf",), (covariance,))
    factor, order, rank, info = decompose(covariance, lower=True)
    assert info >= 0  # 1: the rank is below D
    root = np.empty((len(covariance), rank))
    root[order - 1] = np.tril(factor[:, :rank])
    return root


def _score(logits: np.ndarray) -> float:
    """Returns the Inception Score of one group.

    With rows p_n and their mean m: mean_n sum p_n (log p_n - log m) = mean_n sum p_n log p_n - sum m log m.
    """
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    probabilities = np.exp(shifted)
    sums = probabilities.sum(axis=1, keepdims=True)
    probabilities /= sums
    shifted -= np.log(sums)
    mean = probabilities.mean(axis=0)
    positive = mean[mean > 0]  # a class of probability 0 adds nothing
    return float(np.exp(np.vdot(probabilities, shifted) / len(logits) - positive @ np.log(positive)))


def check_finite(name: str, rows: np.ndarray, mask: np.ndarray | bool = True) -> None:
    """Checks that `rows` [N, D] are finite where `mask` is True; UsageError names the first that is not."""
    bad = np.flatnonzero(~np.isfinite(rows).all(axis=1) & mask)
    if len(bad):
        raise UsageError(f"{name}: row {bad[0]} has a value that is not finite, and so do {len(bad) - 1} more rows")


def _read(path: Path, suffix: str) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Reads (mu, sigma, count or None), and no other array: the ADM suite's files also hold gigabytes of images."""
    if not path.is_file():
        raise UsageError(f"{path}: no such file")
    try:
        with open_npz(path) as arrays:
            mean, covariance = f"mu{suffix}", f"sigma{suffix}"
            if not {mean, covariance} <= set(arrays.names):
                held = printable(", ".join(arrays.names)) or "nothing"
                raise UsageError(f"{path}: holds {held}; statistics need {mean} and {covariance}")
            return arrays[mean], arrays[covariance], arrays["count"] if "count" in arrays.names else None
    except UsageError:
        raise
    except Exception as error:  # from foreign bytes zipfile and NumPy may raise anything
        raise UsageError(f"{path}: cut short, or not an .npz file of plain arrays ({one_line(error)})") from error
