"""What both stages keep between steps: optimizers, learning-rate schedules, moving averages."""

from collections.abc import Callable, Sequence

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
    return optax.chain(clip_by_global_norm(gradient_clip), optimizer) if gradient_clip else optimizer


def warm_flat_linear_schedule(
    peak: float,
    total_steps: int,
    *,
    warmup_fraction: float,
    init_lr_factor: float,
    hold_fraction: float,
    end_lr_factor: float,
) -> optax.Schedule:
    """Returns the generator's learning-rate schedule, as released: a linear warm-up, then flat, then a linear fall.

    The warm-up takes the share `warmup_fraction` of all steps and starts at `init_lr_factor` times the peak. The flat
    part takes the share `hold_fraction` of the other steps. From there the rate is
    end_lr_factor + (1 - end_lr_factor) * rest / (1 - hold_fraction) times the peak, where `rest` is the share of the
    steps after the warm-up that are still to come.
    """
    warmup_steps = round(warmup_fraction * total_steps)

    def rate(step):
        rising = init_lr_factor + (1 - init_lr_factor) * step / max(1, warmup_steps)
        passed = (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps)
        falling = end_lr_factor + (1 - end_lr_factor) * (1 - passed) / (1 - hold_fraction)
        return peak * jnp.where(step < warmup_steps, rising, jnp.where(passed < hold_fraction, 1.0, falling))

    return rate


def cosine_schedule(first: float, last: float, total_steps: int) -> optax.Schedule:
    """From `first` at step 0 to `last` at the last step, along half a cosine."""
    return lambda step: last + (first - last) * (0.5 + 0.5 * jnp.cos(jnp.pi * step / max(1, total_steps - 1)))


def adamw(
    rate: optax.Schedule,
    weight_decay: optax.Schedule,
    beta1: float,
    beta2: float,
    gradient_clip: float,
    decays: Callable[[str], bool],
) -> optax.GradientTransformation:
    """AdamW; gradients clipped to a global norm first, unless `gradient_clip` is 0.

    Parameters whose name `a/b/c` `decays` accepts shrink by rate * weight_decay a step.
    """

    def mask(params):
        return jax.tree_util.tree_map_with_path(
            lambda path, _: decays(jax.tree_util.keystr(path, simple=True, separator="/")), params
        )

    optimizer = optax.adamw(rate, beta1, beta2, weight_decay=weight_decay, mask=mask)
    return optax.chain(clip_by_global_norm(gradient_clip), optimizer) if gradient_clip else optimizer


def clip_by_global_norm(limit: float) -> optax.GradientTransformation:
    """As optax's of this name, but by one factor for all leaves: XLA multiplies by it where a gradient is read, and
    writes no clipped copy."""

    def update(updates, state, params=None):
        factor = jnp.minimum(1.0, limit / optax.tree.norm(updates))
        return jax.tree.map(lambda leaf: leaf * factor, updates), state

    return optax.GradientTransformation(optax.init_empty_state, update)


def moving_average(average, value, decay: float):
    """decay * average + (1 - decay) * value, leaf by leaf; written so that equal trees stay equal to the bit."""
    return jax.tree.map(lambda a, v: a - (1.0 - decay) * (a - v), average, value)
