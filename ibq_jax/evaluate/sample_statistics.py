"""How good samples are: Frechet distances, Inception Score, precision and recall against reference images.

Shapes: images uint8 [N, H, W, 3]; features [N, D]; mask bool [B] of a batch, False in rows that only pad it.
"""

import math
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import jax
import numpy as np

from ibq_jax.base.errors import UsageError, one_line
from ibq_jax.base.sharding import global_batch, jit_on_mesh, replicated
from ibq_jax.evaluate.feature_nets import DIMS, FD, FID, LOGITS, SFID, FeatureNets, features_of
from ibq_jax.evaluate.gather import mask_for_process, merge_across_processes, to_host_async
from ibq_jax.evaluate.precision_recall import precision_recall
from ibq_jax.evaluate.protocols import Protocol
from ibq_jax.evaluate.statistics import FeatureStatistics, inception_score
from ibq_jax.pretrained.archive_limits import check_archive

IMAGES = "arr_0"  # the array's name in an .npz, as in the ADM evaluation suite
MAX_PIXELS = 2**22  # per image: a batch of larger ones would not fit into memory
MOMENT_SUFFIXES = {FID: "", SFID: "_s"}  # of "mu" and "sigma" in the ADM suite's statistics files


@dataclass
class Features:
    """The features of a set of images. If they come from a file of statistics, only `statistics` is known."""

    num_images: int = 0
    image_size: int = 0  # pixels of a side
    statistics: dict[str, FeatureStatistics] = field(default_factory=dict)  # by distance
    features: dict[str, np.ndarray] = field(default_factory=dict)  # [N, D] by distance but sFID; [N, 1008] LOGITS


class FeatureExtractor:
    """Computes the features of images, on all devices of a mesh."""

    def __init__(self, feature_nets: FeatureNets, protocol: Protocol, mesh: jax.sharding.Mesh):
        self._mesh, self._distances = mesh, feature_nets.distances
        self._weights = jax.device_put(dict(feature_nets.weights), replicated(mesh))
        self._features = jit_on_mesh(
            lambda weights, images: features_of(weights, protocol.to_net_input(images), protocol),
            mesh,
            out_shardings=replicated(mesh),
        )
        self._replicate = jax.jit(lambda mask: mask, out_shardings=replicated(mesh))

    def __call__(self, batches: Iterable[Mapping[str, np.ndarray]]) -> Features:
        """Returns the features of all images in `batches`, which have this process's rows of "image" and "mask".

        Raises UsageError when there are no images.
        """
        found = Features(statistics={name: FeatureStatistics(DIMS[name]) for name in self._distances})
        rows = defaultdict(list)
        for features, mask in to_host_async(self._queue(batches, found)):
            found.num_images += int(mask.sum())
            for name, values in features.items():
                if name in found.statistics:
                    found.statistics[name].update(values, mask_for_process(mask))
                if name != SFID:
                    rows[name].append(values[mask])
        if not found.num_images:
            raise UsageError("there are no images to evaluate")
        found.statistics = {name: merge_across_processes(statistics) for name, statistics in found.statistics.items()}
        found.features = {name: np.concatenate(parts) for name, parts in rows.items()}
        return found

    def _queue(self, batches: Iterable[Mapping[str, np.ndarray]], found: Features) -> Iterator[tuple[dict, jax.Array]]:
        """Yields (features, mask) of every batch, still being computed on the devices."""
        for batch in batches:
            found.image_size = batch["image"].shape[1]
            arrays = global_batch({"image": batch["image"], "mask": batch["mask"]}, self._mesh)
            yield self._features(self._weights, arrays["image"]), self._replicate(arrays["mask"])


def compare(samples: Features, reference: Features, protocol: Protocol) -> Iterator[tuple[str, float]]:
    """Compares samples with a reference; yields (name, value) of every metric.

    These are the distances that both have statistics for, inception_score and its standard deviation over groups of the
    protocol's size, precision and recall of the first kind of features that both have, and images.
    """
    for name, statistics in samples.statistics.items():
        if name in reference.statistics:
            yield name, statistics.frechet(reference.statistics[name])
    if LOGITS in samples.features:
        rows = protocol.score_group or samples.num_images
        mean, deviation = inception_score(samples.features[LOGITS], split_rows=rows)
        yield from (("inception_score", mean), ("inception_score_deviation", deviation))
    for name, net in ((FID, ""), (FD, f" ({FD.removeprefix('FD-')})")):
        if name in samples.features and name in reference.features:
            precision, recall = precision_recall(reference.features[name], samples.features[name])
            yield from ((f"precision{net}", precision), (f"recall{net}", recall))
            break
    yield "images", float(samples.num_images)


class ImageSet:
    """The images of an .npz, read batch by batch: 50,000 at 256 pixels take 10 GB."""

    def __init__(self, path: Path):
        """Reads the header. Raises UsageError if the file is absent or damaged, or `arr_0` not uint8 [N, H, W, 3]."""
        self.path = path
        try:
            with zipfile.ZipFile(path) as archive, archive.open(f"{IMAGES}.npy") as member:
                check_archive(path, archive)
                self.shape, fortran, dtype = _header(member)
                held = archive.getinfo(f"{IMAGES}.npy").file_size - member.tell()
        except FileNotFoundError as error:
            raise UsageError(f"{path}: no such file") from error
        except Exception as error:  # from foreign bytes zipfile and NumPy may raise anything
            reason = one_line(error)
            raise UsageError(f"{path}: not a whole .npz file with images as {IMAGES!r} ({reason})") from error
        if dtype != np.uint8 or fortran or len(self.shape) != 4 or self.shape[-1] != 3:
            raise UsageError(f"{path}: {IMAGES} is {dtype} {list(self.shape)}; images are uint8 [N, H, W, 3]")
        if min(self.shape) < 0 or not 1 <= math.prod(self.shape[1:3]) <= MAX_PIXELS:
            raise UsageError(
                f"{path}: images of {self.shape[1]}x{self.shape[2]}; they may have 1 to {MAX_PIXELS:,} pixels"
            )
        if held != math.prod(self.shape):
            raise UsageError(f"{path}: cut short ({held} bytes of images {list(self.shape)})")

    def __len__(self) -> int:
        return self.shape[0]

    def batches(self, batch_size: int) -> Iterator[dict[str, np.ndarray]]:
        """Yields this process's rows of all images, in order; the last batch is padded with black ones, mask False."""
        index, rows = jax.process_index(), batch_size // jax.process_count()
        own = slice(index * rows, (index + 1) * rows)
        bytes_per_image = int(np.prod(self.shape[1:]))
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(f"{IMAGES}.npy") as member:
                _header(member)
                for start in range(0, len(self), batch_size):
                    count = min(batch_size, len(self) - start)
                    read = np.frombuffer(member.read(count * bytes_per_image), np.uint8).reshape(count, *self.shape[1:])
                    images = np.zeros((batch_size, *self.shape[1:]), np.uint8)
                    images[:count] = read
                    yield {"image": images[own], "mask": (np.arange(batch_size) < count)[own]}
        except Exception as error:  # from foreign bytes zipfile may raise anything
            raise UsageError(f"{self.path}: cut short ({one_line(error)})") from error


def _header(member) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Reads an .npy header: (shape, whether in Fortran order, dtype); the array's bytes follow."""
    version = np.lib.format.read_magic(member)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(member)


def read_moments(path: Path) -> dict[str, FeatureStatistics]:
    """Reads the statistics in an .npz, by distance; empty if it has only images.

    Raises UsageError if the file is absent or cut short, or its moments do not have the size of Inception's features.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.removesuffix(".npy") for name in archive.namelist()}
    except Exception as error:  # from foreign bytes zipfile may raise anything
        raise UsageError(f"{path}: no such file, or not a whole .npz file ({one_line(error)})") from error
    moments = {}
    for name, suffix in MOMENT_SUFFIXES.items():
        if f"mu{suffix}" in names:
            moments[name] = FeatureStatistics.load(path, suffix)
            if moments[name].dims != DIMS[name]:
                raise UsageError(f"{path}: mu{suffix} has {moments[name].dims} features, {name}'s are {DIMS[name]}")
    return moments
