"""How good generated pictures are: Frechet distances, Inception Score, precision and recall against reference pictures.

Shapes: N pictures uint8 [N, H, W, 3]; features [N, D]; B pictures of a batch, mask bool [B].
"""

import math
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import jax
import numpy as np

from ibq_jax.base import processes
from ibq_jax.base.errors import UsageError, one_line
from ibq_jax.base.sharding import global_batch, replicated
from ibq_jax.evaluate.feature_nets import DIMS, FD, FID, LOGITS, SFID, FeatureNets, features_of
from ibq_jax.evaluate.gather import merge_across_processes, own_rows, to_host_async
from ibq_jax.evaluate.protocols import Protocol
from ibq_jax.evaluate.statistics import FeatureStatistics, inception_score, precision_recall
from ibq_jax.pretrained.archive_limits import check_archive

PICTURES = "arr_0"  # in an .npz, as ADM's evaluation reads it
MOST_PIXELS = 2**22  # of a picture: a batch of larger ones would not fit into memory
MOMENTS = {FID: "", SFID: "_s"}  # what follows "mu" and "sigma" there


@dataclass
class Features:
    """What the nets saw of a set of pictures: `statistics` by distance, and picture by picture the `features` that
    precision and recall are of, and the Inception's logits. Of a file of statistics, the first alone."""

    images: int = 0
    side: int = 0
    statistics: dict[str, FeatureStatistics] = field(default_factory=dict)
    features: dict[str, np.ndarray] = field(default_factory=dict)


class FeatureExtractor:
    """Looks at pictures with all devices of `mesh`."""

    def __init__(self, feature_nets: FeatureNets, protocol: Protocol, mesh: jax.sharding.Mesh):
        self._mesh, self._distances = mesh, feature_nets.distances
        self._weights = jax.device_put(dict(feature_nets.weights), replicated(mesh))
        self._features = processes.jit(
            lambda weights, pictures: features_of(weights, protocol.as_seen(pictures), protocol),
            mesh,
            out_shardings=replicated(mesh),
        )
        self._everywhere = jax.jit(lambda mask: mask, out_shardings=replicated(mesh))

    def __call__(self, batches: Iterable[Mapping[str, np.ndarray]]) -> Features:
        """Of batches with this process's rows of "image" and "mask". Raises UsageError when there is no picture."""
        seen = Features(statistics={name: FeatureStatistics(DIMS[name]) for name in self._distances})
        rows = defaultdict(list)
        for features, mask in to_host_async(self._look(batches, seen)):
            seen.images += int(mask.sum())
            for name, values in features.items():
                if name in seen.statistics:
                    seen.statistics[name].update(values, own_rows(mask))
                if name != SFID:
                    rows[name].append(values[mask])
        if not seen.images:
            raise UsageError("there is no picture to evaluate")
        seen.statistics = {name: merge_across_processes(statistics) for name, statistics in seen.statistics.items()}
        seen.features = {name: np.concatenate(parts) for name, parts in rows.items()}
        return seen

    def _look(self, batches: Iterable[Mapping[str, np.ndarray]], seen: Features) -> Iterator[tuple[dict, jax.Array]]:
        """(features, mask) of every batch, queued."""
        for batch in batches:
            seen.side = batch["image"].shape[1]
            arrays = global_batch({"image": batch["image"], "mask": batch["mask"]}, self._mesh)
            yield self._features(self._weights, arrays["image"]), self._everywhere(arrays["mask"])


def compare(generated: Features, reference: Features, protocol: Protocol) -> Iterator[tuple[str, float]]:
    """Yields (name, value): the distances that both have statistics for, inception_score and its deviation between
    groups of the protocol's size, precision and recall of the first features that both have, images."""
    for name, statistics in generated.statistics.items():
        if name in reference.statistics:
            yield name, statistics.frechet(reference.statistics[name])
    if LOGITS in generated.features:
        rows = protocol.score_rows or generated.images
        mean, deviation = inception_score(generated.features[LOGITS], split_rows=rows)
        yield from (("inception_score", mean), ("inception_score_deviation", deviation))
    for name, words in ((FID, ""), (FD, f" ({FD.removeprefix('FD-')})")):
        if name in generated.features and name in reference.features:
            precision, recall = precision_recall(reference.features[name], generated.features[name])
            yield from ((f"precision{words}", precision), (f"recall{words}", recall))
            break
    yield "images", float(generated.images)


class ImageSet:
    """The pictures of an .npz, read batch by batch: a set of 50,000 at 256 pixels is larger than many a memory."""

    def __init__(self, path: Path):
        """Raises UsageError for a file that is absent, cut short, or without uint8 [N, H, W, 3] as `arr_0`."""
        self.path = path
        try:
            with zipfile.ZipFile(path) as archive, archive.open(f"{PICTURES}.npy") as member:
                check_archive(path, archive)
                self.shape, fortran, dtype = _header(member)
                held = archive.getinfo(f"{PICTURES}.npy").file_size - member.tell()
        except FileNotFoundError as error:
            raise UsageError(f"{path}: no such file") from error
        except Exception as error:  # from foreign bytes zipfile and NumPy may raise anything
            words = one_line(error)
            raise UsageError(f"{path}: not a whole .npz file with pictures as {PICTURES!r} ({words})") from error
        if dtype != np.uint8 or fortran or len(self.shape) != 4 or self.shape[-1] != 3:
            raise UsageError(f"{path}: {PICTURES} is {dtype} {list(self.shape)}, pictures are uint8 [N, H, W, 3]")
        if min(self.shape) < 0 or not 1 <= math.prod(self.shape[1:3]) <= MOST_PIXELS:
            raise UsageError(
                f"{path}: pictures of {self.shape[1]}x{self.shape[2]}; they have 1 to {MOST_PIXELS:,} pixels"
            )
        if held != math.prod(self.shape):
            raise UsageError(f"{path}: cut short ({held} bytes of pictures {list(self.shape)})")

    def __len__(self) -> int:
        return self.shape[0]

    def batches(self, batch_size: int) -> Iterator[dict[str, np.ndarray]]:
        """This process's rows of all pictures, in order; the last batch is filled up with black ones, mask False."""
        index, rows = jax.process_index(), batch_size // jax.process_count()
        own = slice(index * rows, (index + 1) * rows)
        bytes_each = int(np.prod(self.shape[1:]))
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(f"{PICTURES}.npy") as member:
                _header(member)
                for start in range(0, len(self), batch_size):
                    count = min(batch_size, len(self) - start)
                    read = np.frombuffer(member.read(count * bytes_each), np.uint8).reshape(count, *self.shape[1:])
                    images = np.zeros((batch_size, *self.shape[1:]), np.uint8)
                    images[:count] = read
                    yield {"image": images[own], "mask": (np.arange(batch_size) < count)[own]}
        except Exception as error:  # from foreign bytes zipfile may raise anything
            raise UsageError(f"{self.path}: cut short ({one_line(error)})") from error


def _header(member) -> tuple[tuple[int, ...], bool, np.dtype]:
    """(shape, whether in Fortran's order, type) of the array whose bytes follow."""
    version = np.lib.format.read_magic(member)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(member)


def read_moments(path: Path) -> dict[str, FeatureStatistics]:
    """The statistics in an .npz, by distance; none where it has pictures alone.

    Raises UsageError for a file that is absent, cut short, or has moments that are not the Inception's.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.removesuffix(".npy") for name in archive.namelist()}
    except Exception as error:  # from foreign bytes zipfile may raise anything
        raise UsageError(f"{path}: no such file, or not a whole .npz file ({one_line(error)})") from error
    moments = {}
    for name, suffix in MOMENTS.items():
        if f"mu{suffix}" in names:
            moments[name] = FeatureStatistics.load(path, suffix)
            if moments[name].dims != DIMS[name]:
                raise UsageError(f"{path}: mu{suffix} has {moments[name].dims} features, {name}'s are {DIMS[name]}")
    return moments
