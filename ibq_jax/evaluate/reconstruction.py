"""How well a tokenizer reconstructs a split: PSNR, SSIM, LPIPS, Frechet distances, and the use of its codebook.

The protocol says how. Every number is taken image by image on the devices and put together on the host in the split's
order, in float64: it does not depend on how images were batched or spread over devices and processes.

Shapes: images uint8 [B, H, W, 3]; codes [B, h, w]; mask bool [B], False on the rows that only fill a batch up.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from ibq_jax.base import processes
from ibq_jax.base.errors import UsageError
from ibq_jax.base.histogram import entropy, perplexity
from ibq_jax.base.sharding import batch_sharding, global_batch, replicated, to_host
from ibq_jax.data.preprocess import to_float, to_uint8
from ibq_jax.evaluate.feature_nets import DIMS, FID, LPIPS_NETS, NO_FEATURE_NETS, SFID, FeatureNets, features_of
from ibq_jax.evaluate.gather import merge_across_processes, own_rows, to_host_async
from ibq_jax.evaluate.image_metrics import psnr, ssim
from ibq_jax.evaluate.protocols import PROTOCOLS, Protocol
from ibq_jax.evaluate.statistics import FeatureStatistics
from ibq_jax.pretrained.lpips import lpips
from ibq_jax.tokenizer.codebook_monitor import count_codes

# (parameters, images uint8) -> (reconstructions float [-1, 1], codes): `Trainer.reconstruct`.
Reconstruct = Callable[[dict, jax.Array], tuple[jax.Array, jax.Array]]


class ReconstructionEvaluator:
    """Evaluates parameters over all devices of `mesh`, on batches that `batches(examples)` makes anew.

    batches: from a number of examples, spread evenly over the split (0: all), to batches with "image" and "mask".
    examples: how many to measure on.
    """

    def __init__(
        self,
        reconstruct: Reconstruct,
        codebook_size: int,
        mesh: jax.sharding.Mesh,
        batches: Callable[[int], Iterable[Mapping[str, np.ndarray]]],
        examples: int = 0,
        protocol: Protocol = PROTOCOLS["clean"],
        feature_nets: FeatureNets = NO_FEATURE_NETS,
    ):
        self._batches, self._examples, self._mesh, self._num_codes = batches, examples, mesh, codebook_size
        self.protocol = protocol
        self._distances = tuple(name for name in feature_nets.distances if name != SFID)
        self._weights = jax.device_put(dict(feature_nets.weights), replicated(mesh))
        self._measure = processes.jit(
            lambda *arguments: _measure(reconstruct, codebook_size, protocol, *arguments),
            mesh,
            out_shardings=replicated(mesh),
        )
        self._reconstruct = processes.jit(
            lambda params, images: to_uint8(reconstruct(params, images)[0]),
            mesh,
            out_shardings=batch_sharding(mesh),
        )

    def __call__(self, params: dict) -> Iterator[tuple[str, float]]:
        """Yields (name, value): psnr (dB), ssim, l1 (of [-1, 1] values), lpips_vgg16 and lpips_alexnet, Frechet
        distances (FID as "rFID"), usage, perplexity and entropy (nats) of the codes, images; what there are nets for.

        Raises UsageError when the split is empty.
        """
        tally = _Tally(self._num_codes, self._distances)
        for measured in self._measured(params):
            tally.add(measured)
        if not tally.images:
            raise UsageError("there is no image to evaluate on: the split is empty")
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
        """How often the images choose each code: float [K]."""
        tally = _Tally(self._num_codes, ())
        for measured in self._measured(params):
            tally.add(measured)
        return tally.histogram

    def _measured(self, params: dict) -> Iterator[dict]:
        """What `_measure` gives of every batch, on the host."""
        batches = self._batches(self._examples)
        arrays = (global_batch({"image": b["image"], "mask": b["mask"]}, self._mesh) for b in batches)
        return to_host_async(self._measure(params, self._weights, a["image"], a["mask"]) for a in arrays)

    def picture(self, params: dict, columns: int, rows: int = 1) -> np.ndarray:
        """A row of originals above a row of their reconstructions, `rows` times: uint8 [2 rows H, columns W, 3].

        The images are spread evenly over the split; black where it has fewer than asked for.
        """
        count, pairs = columns * rows, []
        for batch in self._batches(count):
            arrays = global_batch({"image": batch["image"], "mask": batch["mask"]}, self._mesh)
            pair = np.stack([to_host(arrays["image"]), to_host(self._reconstruct(params, arrays["image"]))])
            pairs.append(pair[:, to_host(arrays["mask"])])
        images = np.concatenate(pairs, axis=1)  # [2, up to count, H, W, 3]
        missing = count - images.shape[1]
        images = np.pad(images, ((0, 0), (0, missing), (0, 0), (0, 0), (0, 0)))
        two, _, height, width, channels = images.shape
        grid = images.reshape(two, rows, columns, height, width, channels).transpose(1, 0, 3, 2, 4, 5)
        return grid.reshape(rows * two * height, columns * width, channels)


class _Tally:
    """What was measured so far."""

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
                statistics.update(features[name], own_rows(mask))


def _measure(
    reconstruct: Reconstruct,
    codebook_size: int,
    protocol: Protocol,
    params: dict,
    weights: Mapping[str, dict],
    images: jax.Array,
    mask: jax.Array,
) -> dict:
    """Of a batch: values [B] by name, features of originals and of reconstructions, counts of codes [K], the mask."""
    reconstructions, codes = reconstruct(params, images)
    originals, clipped = to_float(images), jnp.clip(reconstructions, -1.0, 1.0)
    shown = [array.astype(jnp.float32) / 255.0 for array in protocol.as_shown(images, reconstructions)]
    error = jnp.mean(jnp.abs(reconstructions - originals), axis=(1, 2, 3))
    values = {"psnr": psnr(*shown), "ssim": ssim(*shown), "l1": error}
    for net in LPIPS_NETS:
        if net in weights:
            values[f"lpips_{net}"] = lpips(weights[net], originals, clipped, net=net)
    features = [features_of(weights, protocol.as_seen(pictures), protocol) for pictures in (images, clipped)]
    counted = jnp.where(mask[:, None, None], codes, codebook_size)  # padding is out of range, which a scatter drops
    return {"values": values, "features": features, "counts": count_codes(counted, codebook_size), "mask": mask}
