"""How well a generator predicts the codes of a split: cross-entropy, perplexity, and both at every place of a picture.

Shapes: codes int32 [B, h, w]; labels int32 [B]; mask bool [B], False on the rows that only fill a batch up.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from ibq_jax.base import processes
from ibq_jax.base.sharding import global_batch, replicated

PROTOCOL = "teacher forced, the true class given, first crop, mean over all codes, nats"

# (parameters, codes, labels) -> -log p of every code, float32 [B, h w]: `Trainer.code_losses`.
CodeLosses = Callable[[dict, jax.Array, jax.Array], jax.Array]


@dataclass(frozen=True)
class Likelihood:
    """Of the codes of a split under a generator."""

    by_position: np.ndarray  # float64 [h, w], mean -log p in nats of the codes at each place
    images: int

    @property
    def loss(self) -> float:
        """Mean -log p of a code, nats."""
        return float(self.by_position.mean())

    @property
    def perplexity(self) -> float:
        return float(np.exp(self.loss))

    @property
    def perplexity_by_position(self) -> np.ndarray:
        """[h, w]."""
        return np.exp(self.by_position)


class LikelihoodEvaluator:
    """Evaluates parameters over all devices of `mesh`, on batches that `batches()` makes anew."""

    def __init__(
        self,
        code_losses: CodeLosses,
        grid: tuple[int, int],
        mesh: jax.sharding.Mesh,
        batches: Callable[[], Iterable[Mapping[str, np.ndarray]]],
    ):
        self._grid, self._mesh, self._batches = grid, mesh, batches

        def sums(params, codes, labels, mask):
            return jnp.sum(jnp.where(mask[:, None], code_losses(params, codes, labels), 0.0), axis=0)

        self._sums = processes.jit(sums, mesh, out_shardings=replicated(mesh))

    def __call__(self, params: dict) -> Likelihood:
        total, images = np.zeros(self._grid), 0
        for batch in self._batches():
            arrays = global_batch({name: batch[name] for name in ("codes", "label", "mask")}, self._mesh)
            total += np.asarray(self._sums(params, arrays["codes"], arrays["label"], arrays["mask"])).reshape(
                total.shape
            )
            images += int(jnp.sum(arrays["mask"]))
        return Likelihood(total / images, images)
