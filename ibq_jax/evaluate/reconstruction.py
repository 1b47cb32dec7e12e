"""How well a tokenizer reconstructs a split: PSNR, SSIM, LPIPS, Frechet distances, and its use of the codebook.

The protocol defines how. Numbers are computed per image on the devices and averaged on the host in the split's order,
in float64, so that they do not depend on the batch size or the number of devices and processes.

Shapes: images uint8 [B, H, W, 3]; codes [B, h, w]; mask bool [B], False in rows that only pad a batch.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from ibq_jax.base.errors import UsageError
from ibq_jax.base.histogram import entropy, perplexity
from ibq_jax.base.sharding import batch_sharding, global_batch, jit_on_mesh, replicated, to_host
from ibq_jax.data.preprocess import to_float, to_uint8
from ibq_jax.evaluate.feature_nets import DIMS, FID, LPIPS_NETS, NO_FEATURE_NETS, SFID, FeatureNets, features_of
from ibq_jax.evaluate.gather import mask_for_process, merge_across_processes, to_host_async
from ibq_jax.evaluate.image_metrics import psnr, ssim
from ibq_jax.evaluate.protocols import PROTOCOLS, Protocol
from ibq_jax.evaluate.statistics import FeatureStatistics
from ibq_jax.pretrained.lpips import lpips
from ibq_jax.tokenizer.codebook_monitor import count_codes

# (parameters, images uint8) -> (reconstructions float [-1, 1], codes): `Trainer.reconstruct`.
Reconstruct = Callable[[dict, jax.Array], tuple[jax.Array, jax.Array]]


class ReconstructionEvaluator:
    """Measures reconstructions of a split, on all devices of a mesh.

    Args:
        reconstruct: (parameters, images) -> (reconstructions, codes).
        codebook_size: K.
        mesh: the devices.
        batches: `batches(n)` starts a pass over n images, evenly spaced in the split (0: all); batches have "image" and
            "mask".
        num_images: how many images to measure (0: all).
        protocol: how to measure.
        feature_nets: networks for LPIPS and Frechet distances.
    """

    def __init__(
        self,
        reconstruct: Reconstruct,
        codebook_size: int,
        mesh: jax.sharding.Mesh,
        batches: Callable[[int], Iterable[Mapping[str, np.ndarray]]],
        num_images: int = 0,
        protocol: Protocol = PROTOCOLS["clean"],
        feature_nets: FeatureNets = NO_FEATURE_NETS,
    ):
        self._batches, self._num_images, self._mesh, self._codebook_size = batches, num_images, mesh, codebook_size
        self.protocol = protocol
        self._distances = tuple(name for name in feature_nets.distances if name != SFID)
        self._weights = jax.device_put(dict(feature_nets.weights), replicated(mesh))
        # The networks are compiled once for all methods, and what a batch is measured by is a program of its own.
        self._reconstruct = jit_on_mesh(reconstruct, mesh, out_shardings=batch_sharding(mesh))
        self._measure = jit_on_mesh(
            lambda *arguments: _measure(codebook_size, protocol, *arguments), mesh, out_shardings=replicated(mesh)
        )
        self._to_uint8 = jit_on_mesh(to_uint8, mesh, out_shardings=batch_sharding(mesh))

    def __call__(self, params: dict) -> Iterator[tuple[str, float]]:
        """Evaluates the parameters `params`; yields (name, value) of every metric.

        These are psnr (dB), ssim, l1 (of values in [-1, 1]), usage, perplexity and entropy (nats) of the codes, and
        images; with the feature nets that they need, also lpips_vgg16, lpips_alexnet and Frechet distances (FID is
        called "rFID").

        Raises:
            UsageError: the split is empty.
        """
        tally = _Tally(self._codebook_size, self._distances)
        for measured in self._measured(params):
            tally.add(measured)
        if not tally.images:
            raise UsageError("there are no images to evaluate: the split is empty")
        for name, parts in tally.values.items():
            value = np.concatenate(parts).astype(np.float64)
            yield name, self.protocol.mean(value) if name in ("psnr", "ssim") else float(value.mean())
        for name, (originals, reconstructions) in tally.statistics.items():
            distance = merge_across_processes(originals).frechet(merge_across_processes(reconstructions))
            yield ("rFID" if name == FID else name), distance
        yield "usage", float(np.mean(tally.histogram > 0))
        yield "perplexity", float(perplexity(tally.histogram))
        yield "entropy", float(entropy(tally.histogram))
        yield "images", float(tally.images)

    def histogram(self, params: dict) -> np.ndarray:
        """Counts how often each code is chosen in the split: float [K]."""
        tally = _Tally(self._codebook_size, ())
        for measured in self._measured(params):
            tally.add(measured)
        return tally.histogram

    def codes(self, params: dict, count: int) -> np.ndarray:
        """Returns the codes of `count` images, evenly spaced in the split (0: all): int32 [N, h, w]."""
        batches = self._on_devices(count)
        return np.concatenate([to_host(self._reconstruct(params, b["image"])[1])[to_host(b["mask"])] for b in batches])

    def _on_devices(self, count: int) -> Iterator[dict[str, jax.Array]]:
        """Yields {"image", "mask"} of every batch of `count` images, on the mesh."""
        for batch in self._batches(count):
            yield global_batch({"image": batch["image"], "mask": batch["mask"]}, self._mesh)

    def _measured(self, params: dict) -> Iterator[dict]:
        """Yields the result of `_measure` for every batch, on the host."""
        batches = self._on_devices(self._num_images)
        return to_host_async(
            self._measure(self._weights, b["image"], b["mask"], *self._reconstruct(params, b["image"])) for b in batches
        )

    def comparison_grid(self, params: dict, columns: int, rows: int = 1) -> np.ndarray:
        """Draws `rows` rows of originals, each above the row of its reconstructions: uint8 [2 rows H, columns W, 3].

        The images are evenly spaced in the split; if it has fewer than columns x rows, the rest is black.
        """
        count, pairs = columns * rows, []
        for batch in self._on_devices(count):
            reconstructions = self._to_uint8(self._reconstruct(params, batch["image"])[0])
            pair = np.stack([to_host(batch["image"]), to_host(reconstructions)])
            pairs.append(pair[:, to_host(batch["mask"])])
        images = np.concatenate(pairs, axis=1)  # [2, up to count, H, W, 3]
        missing = count - images.shape[1]
        images = np.pad(images, ((0, 0), (0, missing), (0, 0), (0, 0), (0, 0)))
        two, _, height, width, channels = images.shape
        grid = images.reshape(two, rows, columns, height, width, channels).transpose(1, 0, 3, 2, 4, 5)
        return grid.reshape(rows * two * height, columns * width, channels)


class _Tally:
    """Sums over the batches so far."""

    def __init__(self, codebook_size: int, distances: Iterable[str]):
        self.values: dict[str, list[np.ndarray]] = defaultdict(list)
        self.histogram = np.zeros(codebook_size)
        self.statistics = {name: (FeatureStatistics(DIMS[name]), FeatureStatistics(DIMS[name])) for name in distances}
        self.images = 0

    def add(self, measured: Mapping) -> None:
        mask = measured["mask"]
        self.images += int(mask.sum())
        self.histogram += measured["counts"]
        for name, value in measured["values"].items():
            self.values[name].append(value[mask])
        for name, pair in self.statistics.items():
            for statistics, features in zip(pair, measured["features"], strict=True):
                statistics.update(features[name], mask_for_process(mask))


def _measure(
    codebook_size: int,
    protocol: Protocol,
    weights: Mapping[str, dict],
    images: jax.Array,
    mask: jax.Array,
    reconstructions: jax.Array,
    codes: jax.Array,
) -> dict:
    """Measures a batch: values [B] by name, features of originals and reconstructions, code counts [K], the mask."""
    originals, clipped = to_float(images), jnp.clip(reconstructions, -1.0, 1.0)
    pair = [array.astype(jnp.float32) / 255.0 for array in protocol.to_grey_levels(images, reconstructions)]
    error = jnp.mean(jnp.abs(reconstructions - originals), axis=(1, 2, 3))
    values = {"psnr": psnr(*pair), "ssim": ssim(*pair), "l1": error}
    for net in LPIPS_NETS:
        if net in weights:
            values[f"lpips_{net}"] = lpips(weights[net], originals, clipped, net=net)
    features = [features_of(weights, protocol.to_net_input(batch), protocol) for batch in (images, clipped)]
    counted = jnp.where(mask[:, None, None], codes, codebook_size)  # padding gets index K, which a scatter drops
    return {"values": values, "features": features, "counts": count_codes(counted, codebook_size), "mask": mask}
