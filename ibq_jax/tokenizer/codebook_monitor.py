"""Monitors the codebook during training: which codes are used, how evenly, and whether it has collapsed.

Shapes: K codes; indices of any shape. The window is part of the train state, so a resumed run reports the same numbers.
"""

from collections.abc import Mapping

import flax.struct
import jax
import jax.numpy as jnp

from ibq_jax.base.histogram import perplexity
from ibq_jax.base.loop import TrainingStopped

NEVER = -(2**30)  # the step at which an unused code was last chosen
SATURATED = 0.99  # mean highest probability
MEASURES = {  # symptoms that the message about a collapse quotes, if the quantizer has them
    "codebook/max_probability": "mean highest probability",
    "codebook/max_logit": "largest |logit|",
    "codebook/max_norm": "largest code norm",
}


@flax.struct.dataclass
class CodebookWindow:
    """A sliding window over the codes chosen during training.

    Attributes:
        last_used: int32 [K], the step at which each code was last chosen.
        histogram: float32 [K], how often each was chosen, decayed by 1 - 1/window per step.
    """

    last_used: jax.Array
    histogram: jax.Array

    @classmethod
    def empty(cls, codebook_size: int) -> "CodebookWindow":
        """Returns the window before the first step."""
        return cls(jnp.full((codebook_size,), NEVER, jnp.int32), jnp.zeros((codebook_size,), jnp.float32))

    def update(self, indices: jax.Array, step: jax.Array, window: int) -> "CodebookWindow":
        """Returns the window with the codes chosen at `step` added; it spans `window` steps."""
        counts = count_codes(indices, self.histogram.shape[0])
        return CodebookWindow(
            last_used=jnp.where(counts > 0, step, self.last_used),
            histogram=self.histogram * (1.0 - 1.0 / window) + counts,
        )

    def metrics(self, step: jax.Array, window: int) -> dict[str, jax.Array]:
        """Returns the usage in [0, 1], the number of codes not chosen within the window, and the perplexity."""
        used = step - self.last_used < window
        return {
            "codebook/usage": jnp.mean(used.astype(jnp.float32)),
            "codebook/dead_codes": jnp.sum(~used).astype(jnp.float32),
            "codebook/perplexity": perplexity(self.histogram),
        }


def count_codes(indices: jax.Array, codebook_size: int) -> jax.Array:
    """Returns how often each code occurs, float32 [K]; codes out of range are not counted."""
    return jnp.zeros((codebook_size,), jnp.float32).at[indices.reshape(-1)].add(1.0)


def check_collapse(step: int, metrics: Mapping[str, float], *, usage_floor: float, grace_steps: int) -> None:
    """Raises TrainingStopped if, from step `grace_steps` on, the share of codes in use is below `usage_floor`."""
    usage = metrics["codebook/usage"]
    if step < grace_steps or usage >= usage_floor:
        return
    if metrics.get("codebook/max_probability", 0.0) > SATURATED:
        advice = (
            "the softmax is saturated, so the encoder gets no gradient: try a lower optimizer.learning_rate or a "
            "smaller codebook.dim"
        )
    elif "codebook/batch_entropy" in metrics or "codebook/max_probability" in metrics:
        advice = "try a larger loss.entropy_weight (docs/collapse.md)"
    else:
        advice = (
            "this quantizer has no loss against it: try quantizer.name=ibq (docs/codebook_scaling.md) or fewer codes "
            "(codebook.size), or continue regardless with codebook_monitor.usage_floor=0"
        )
    seen = "".join(f"; {words} {metrics[name]:.3g}" for name, words in MEASURES.items() if name in metrics)
    raise TrainingStopped(
        f"step {step}: the codebook has collapsed: {usage:.2%} of the codes are in use, under "
        f"codebook_monitor.usage_floor={usage_floor:.2%}{seen}; {advice}"
    )
