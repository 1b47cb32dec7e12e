"""How well a tokenizer reconstructs a split: PSNR, SSIM, mean absolute error, and the use of its codebook.

Protocol: centre crops of the split, reconstructions rounded to uint8 (for L1 not), each metric the mean over images,
not over batches. Usage is the share of the codebook the images chose among them; perplexity, of their codes' counts.

Shapes: images uint8 [B, H, W, 3]; codes [B, h, w]; mask bool [B], False on the rows that only fill a batch up.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from ibq_jax.base.sharding import batch_sharding, global_batch, replicated
from ibq_jax.evaluate.image_metrics import psnr, ssim
from ibq_jax.tokenizer.train import to_uint8
from ibq_jax.tokenizer.watch import count_codes, perplexity

PROTOCOL = "centre crops, antialiased resize, rounded to uint8, mean over images"

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
        num_codes: int,
        mesh: jax.sharding.Mesh,
        batches: Callable[[int], Iterable[Mapping[str, np.ndarray]]],
        examples: int = 0,
    ):
        self._batches, self._examples, self._mesh, self._num_codes = batches, examples, mesh, num_codes
        self._sums = jax.jit(lambda *args: _sums(reconstruct, num_codes, *args), out_shardings=replicated(mesh))
        self._reconstruct = jax.jit(
            lambda params, images: to_uint8(reconstruct(params, images)[0]), out_shardings=batch_sharding(mesh)
        )

    def __call__(self, params: dict) -> Iterator[tuple[str, float]]:
        """Yields (name, value): psnr (dB), ssim, l1 (of [-1, 1] values), usage, perplexity, images."""
        totals, histogram = self._totals(params)
        images = totals.pop("images")
        yield from ((name, total / images) for name, total in totals.items())
        yield "usage", float(np.mean(histogram > 0))
        yield "perplexity", float(perplexity(jnp.asarray(histogram, jnp.float32)))
        yield "images", images

    def histogram(self, params: dict) -> np.ndarray:
        """How often the images choose each code: float [K]."""
        return self._totals(params)[1]

    def _totals(self, params: dict) -> tuple[dict[str, float], np.ndarray]:
        totals = {"psnr": 0.0, "ssim": 0.0, "l1": 0.0, "images": 0.0}
        histogram = np.zeros(self._num_codes)
        for batch in self._batches(self._examples):
            arrays = global_batch({"image": batch["image"], "mask": batch["mask"]}, self._mesh)
            sums, counts = jax.device_get(self._sums(params, arrays["image"], arrays["mask"]))
            totals = {name: total + float(sums[name]) for name, total in totals.items()}
            histogram += counts
        return totals, histogram

    def picture(self, params: dict, columns: int, rows: int = 1) -> np.ndarray:
        """A row of originals above a row of their reconstructions, `rows` times: uint8 [2 rows H, columns W, 3].

        The images are spread evenly over the split; black where a process has fewer than asked for.
        """
        count, pairs = columns * rows, []
        for batch in self._batches(count):
            arrays = global_batch({"image": batch["image"]}, self._mesh)
            shards = _first_copies(self._reconstruct(params, arrays["image"]))
            pair = np.stack([batch["image"], np.concatenate([np.asarray(shard.data) for shard in shards])])
            pairs.append(pair[:, batch["mask"]])
        images = np.concatenate(pairs, axis=1)  # [2, up to count, H, W, 3]
        missing = count - images.shape[1]
        images = np.pad(images, ((0, 0), (0, missing), (0, 0), (0, 0), (0, 0)))
        two, _, height, width, channels = images.shape
        grid = images.reshape(two, rows, columns, height, width, channels).transpose(1, 0, 3, 2, 4, 5)
        return grid.reshape(rows * two * height, columns * width, channels)


def _sums(reconstruct: Reconstruct, num_codes: int, params: dict, images: jax.Array, mask: jax.Array):
    reconstructions, codes = reconstruct(params, images)
    original, shown = images.astype(jnp.float32) / 255.0, to_uint8(reconstructions).astype(jnp.float32) / 255.0
    error = jnp.mean(jnp.abs(reconstructions - (original * 2.0 - 1.0)), axis=(1, 2, 3))
    values = {"psnr": psnr(original, shown), "ssim": ssim(original, shown), "l1": error, "images": jnp.ones(mask.shape)}
    sums = {name: jnp.sum(jnp.where(mask, value, 0.0)) for name, value in values.items()}
    counted = jnp.where(mask[:, None, None], codes, num_codes)  # padding is out of range, which a scatter drops
    return sums, count_codes(counted, num_codes)


def _first_copies(array: jax.Array) -> list:
    """This process's shards in row order, one of each."""
    shards = {shard.index[0].start or 0: shard for shard in array.addressable_shards}
    return [shards[start] for start in sorted(shards)]
