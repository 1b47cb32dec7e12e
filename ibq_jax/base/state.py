"""What both stages keep between steps: optimizers, learning-rate schedules, moving averages."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax


def drop_schedule(
    learning_rate: float, warmup_steps: int, drop_steps: Sequence[int], drop_factor: float
) -> optax.Schedule:
    """Linear warm-up, then constant, multiplied by `drop_factor` from each of `drop_steps` on."""

    def rate(step):
        warm = jnp.minimum(1.0, (step + 1) / max(1, warmup_steps))
        drops = sum(jnp.where(step >= drop, 1, 0) for drop in drop_steps)
        return learning_rate * warm * jnp.asarray(drop_factor, jnp.float32) ** drops

    return rate


def adam(schedule: optax.Schedule, beta1: float, beta2: float, gradient_clip: float) -> optax.GradientTransformation:
    """Adam without weight decay; gradients clipped to a global norm first, unless `gradient_clip` is 0."""
    optimizer = optax.adam(schedule, b1=beta1, b2=beta2)
    return optax.chain(optax.clip_by_global_norm(gradient_clip), optimizer) if gradient_clip else optimizer


def moving_average(average, value, decay: float):
    """decay * average + (1 - decay) * value, leaf by leaf; written so that equal trees stay equal to the bit."""
    return jax.tree.map(lambda a, v: a - (1.0 - decay) * (a - v), average, value)
