"""How well a generator predicts the codes of a split: cross-entropy and perplexity, overall and by position.

Shapes: codes int32 [B, h, w]; labels int32 [B]; mask bool [B], False in rows that only pad a batch.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from ibq_jax.base.sharding import global_batch, jit_on_mesh, replicated

PROTOCOL = "teacher forced, given the true class, first crop, mean over all codes, nats"

# (parameters, codes, labels) -> -log p of every code, float32 [B, h w]: `Trainer.code_losses`.
CodeLosses = Callable[[dict, jax.Array, jax.Array], jax.Array]


@dataclass(frozen=True)
class Likelihood:
    """The likelihood of a split's codes under a generator."""

    by_position: np.ndarray  # float64 [h, w], mean -log p of the codes at each position, nats
    images: int

    @property
    def loss(self) -> float:
        """Mean -log p per code, nats."""
        return float(self.by_position.mean())

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return float(np.exp(self.loss))

    @property
    def perplexity_by_position(self) -> np.ndarray:
        """exp of the mean -log p at each position, [h, w]."""
        return np.exp(self.by_position)


class LikelihoodEvaluator:
    """Measures the likelihood of a split's codes, on all devices of a mesh.

    Args:
        code_losses: the model's -log p of every code.
        grid: (h, w) of the codes.
        mesh: the devices.
        batches: starts a new pass over the split; batches have "label", "mask" and what `of` names.
        of: the array of a batch whose likelihood it is.
    """

    def __init__(
        self,
        code_losses: CodeLosses,
        grid: tuple[int, int],
        mesh: jax.sharding.Mesh,
        batches: Callable[[], Iterable[Mapping[str, np.ndarray]]],
        of: str = "codes",
    ):
        self._grid, self._mesh, self._batches, self._of = grid, mesh, batches, of

        def sums(params, codes, labels, mask):
            return jnp.sum(jnp.where(mask[:, None], code_losses(params, codes, labels), 0.0), axis=0)

        self._sums = jit_on_mesh(sums, mesh, out_shardings=replicated(mesh))

    def __call__(self, params: dict) -> Likelihood:
        """Evaluates the parameters `params` on the whole split."""
        total, images = np.zeros(self._grid), 0
        for batch in self._batches():
            arrays = global_batch({name: batch[name] for name in (self._of, "label", "mask")}, self._mesh)
            sums = self._sums(params, arrays[self._of], arrays["label"], arrays["mask"])
            total += np.asarray(sums).reshape(total.shape)
            images += int(jnp.sum(arrays["mask"]))
        return Likelihood(total / images, images)
