"""The codebook watched while it trains: which codes are used, how evenly, and whether the run has collapsed.

Shapes: K codes; indices of any shape. All of it is part of the train state, so a resumed run reports the same numbers.
"""

import flax.struct
import jax
import jax.numpy as jnp

from ibq_jax.base.loop import TrainingStopped

NEVER = -(2**30)
SATURATED = 0.99  # mean highest probability
MEASURES = {  # of a collapse, where a quantizer has them
    "codebook/max_probability": "mean highest probability",
    "codebook/max_logit": "largest |logit|",
    "codebook/max_norm": "largest code norm",
}


@flax.struct.dataclass
class CodebookWindow:
    """A sliding window over the tokens of training.

    last_used [K] int32: the step a code was last chosen at.
    histogram [K] float32: its counts, decayed by 1 - 1/window a step.
    """

    last_used: jax.Array
    histogram: jax.Array

    @classmethod
    def empty(cls, codebook_size: int) -> "CodebookWindow":
        return cls(jnp.full((codebook_size,), NEVER, jnp.int32), jnp.zeros((codebook_size,), jnp.float32))

    def update(self, indices: jax.Array, step: jax.Array, window: int) -> "CodebookWindow":
        """With the codes of `step` in, seen over the last `window` steps."""
        counts = count_codes(indices, self.histogram.shape[0])
        return CodebookWindow(
            last_used=jnp.where(counts > 0, step, self.last_used),
            histogram=self.histogram * (1.0 - 1.0 / window) + counts,
        )

    def metrics(self, step: jax.Array, window: int) -> dict[str, jax.Array]:
        """usage in [0, 1], dead codes (never chosen inside the window), perplexity in [1, K]."""
        used = step - self.last_used < window
        return {
            "codebook/usage": jnp.mean(used.astype(jnp.float32)),
            "codebook/dead_codes": jnp.sum(~used).astype(jnp.float32),
            "codebook/perplexity": perplexity(self.histogram),
        }


def count_codes(indices: jax.Array, codebook_size: int) -> jax.Array:
    """How often each code occurs: [K] float32."""
    return jnp.zeros((codebook_size,), jnp.float32).at[indices.reshape(-1)].add(1.0)


def perplexity(histogram: jax.Array) -> jax.Array:
    """exp of the entropy (nats) of counts [K]: the number of codes an even use of which would be as varied."""
    share = histogram / jnp.maximum(jnp.sum(histogram), 1.0)
    return jnp.exp(-jnp.sum(jnp.where(share > 0, share * jnp.log(jnp.where(share > 0, share, 1.0)), 0.0)))


def check_collapse(step: int, metrics: dict[str, float], *, usage_floor: float, grace_steps: int) -> None:
    """Raises TrainingStopped when, after the warm-up, fewer codes are in use than the floor."""
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
            "(codebook.size), or let it go on with codebook_monitor.usage_floor=0"
        )
    seen = "".join(f"; {words} {metrics[name]:.3g}" for name, words in MEASURES.items() if name in metrics)
    raise TrainingStopped(
        f"step {step}: the codebook has collapsed: {usage:.2%} of the codes are in use, under "
        f"codebook_monitor.usage_floor={usage_floor:.2%}{seen}; {advice}"
    )
