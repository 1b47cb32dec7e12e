"""The state that both stages keep between steps: optimizers, learning-rate schedules and averaged weights."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ibq_jax.base.errors import UsageError

SLOWEST_IN_BFLOAT16 = 0.99  # decay of a moment: 1 - it has to be above the type's half step, 1 / 256 at most


class AveragedWeights:
    """A training state's choice between its raw weights `params` and their average `ema` (None if none is kept)."""

    params: dict
    ema: dict | None

    def weights(self, which: str) -> dict:
        """Returns the averaged weights for "ema", or the raw ones if none are kept; the raw ones for "raw".

        Parts of which no average is kept, because they are not trained, are the raw ones. Raises UsageError for any
        other word.
        """
        if which not in ("ema", "raw"):
            raise UsageError(f"weights {which!r} do not exist; they are 'ema' or 'raw'")
        if which == "raw" or self.ema is None:
            return self.params
        return self.ema if self.ema.keys() == self.params.keys() else {**self.params, **self.ema}


def drop_schedule(
    learning_rate: float, warmup_steps: int, drop_steps: Sequence[int], drop_factor: float
) -> optax.Schedule:
    """Returns a schedule that warms up linearly, then is constant, multiplied by `drop_factor` from each drop step on.

    The rate at step 0 is learning_rate / warmup_steps, and at step warmup_steps - 1 it is `learning_rate`.
    """
    drops = optax.piecewise_constant_schedule(
        learning_rate, {step: drop_factor ** drop_steps.count(step) for step in drop_steps}
    )
    return lambda step: drops(step) * jnp.minimum(1.0, (step + 1) / max(1, warmup_steps))


def warmup_hold_decay_schedule(
    peak: float,
    total_steps: int,
    *,
    warmup_fraction: float,
    init_lr_factor: float,
    hold_fraction: float,
    end_lr_factor: float,
) -> optax.Schedule:
    """Returns a schedule that rises linearly to `peak`, holds it, and falls linearly to the last step.

    Args:
        peak: the highest rate.
        total_steps: steps of the run.
        warmup_fraction: share of all steps in which the rate rises.
        init_lr_factor: the rate at step 0, as a multiple of `peak`.
        hold_fraction: share of the steps after the warm-up in which the rate stays at `peak`.
        end_lr_factor: the rate at the last step, as a multiple of `peak`.
    """
    warmup_steps = round(warmup_fraction * total_steps)
    remaining = max(1, total_steps - 1 - warmup_steps)

    def warmup(step):  # optax.linear_schedule computes this as a difference: 7e-5 off at step 0 of 3,000 in float32
        return peak * (init_lr_factor + (1 - init_lr_factor) * step / max(1, warmup_steps))

    decay = optax.linear_schedule(peak, end_lr_factor * peak, (1 - hold_fraction) * remaining)  # pyright: ignore[reportArgumentType]  (a fraction of a step is fine)
    return optax.join_schedules(
        [warmup, optax.constant_schedule(peak), decay],
        [warmup_steps, warmup_steps + hold_fraction * remaining],  # pyright: ignore[reportArgumentType]  (as above)
    )


def cosine_schedule(first: float, last: float, total_steps: int) -> optax.Schedule:
    """Returns a schedule from `first` at step 0 to `last` at the last step, along half a cosine."""
    decay = optax.cosine_decay_schedule(first - last, max(1, total_steps - 1))
    return lambda step: last + decay(step)


@jax.named_scope("optimizer")
def apply_gradient(
    optimizer: optax.GradientTransformation, gradient, state: optax.OptState, params
) -> tuple[Any, optax.OptState]:
    """Returns (the parameters, the optimizer's state) after one step along `gradient`."""
    updates, state = optimizer.update(gradient, state, params)
    return optax.apply_updates(params, updates), state


def adam(
    schedule: optax.Schedule, *, beta1: float, beta2: float, gradient_clip: float, moment_dtype: str = "float32"
) -> optax.GradientTransformation:
    """Returns Adam without weight decay, after clipping to the global norm `gradient_clip` (0: no clipping).

    Its two moments are kept in `moment_dtype`, "float32" or "bfloat16".
    """
    optimizer = with_moments(optax.adam(schedule, b1=beta1, b2=beta2), moment_dtype)
    return optax.chain(clip_by_global_norm(gradient_clip), optimizer) if gradient_clip else optimizer


def adamw(
    schedule: optax.Schedule,
    weight_decay: optax.Schedule | float,
    *,
    beta1: float,
    beta2: float,
    gradient_clip: float,
    decays: Callable[[str], bool],
    moment_dtype: str = "float32",
) -> optax.GradientTransformation:
    """Returns AdamW, after clipping to the global norm `gradient_clip` (0: no clipping); moments as in `adam`.

    Parameters for whose name `a/b/c` `decays` returns True shrink by rate * weight_decay at every step.
    """

    def mask(params):
        return jax.tree_util.tree_map_with_path(
            lambda path, _: decays(jax.tree_util.keystr(path, simple=True, separator="/")), params
        )

    optimizer = with_moments(optax.adamw(schedule, beta1, beta2, weight_decay=weight_decay, mask=mask), moment_dtype)
    return optax.chain(clip_by_global_norm(gradient_clip), optimizer) if gradient_clip else optimizer


def check_moments(beta1: float, beta2: float, moment_dtype: str) -> None:
    """Raises UsageError for moments in bfloat16 that would never fall, because a step's fall is rounded away."""
    for name, beta in (("beta1", beta1), ("beta2", beta2)):
        if moment_dtype == "bfloat16" and beta > SLOWEST_IN_BFLOAT16:
            raise UsageError(
                f"optimizer.moment_dtype=bfloat16 rounds away what optimizer.{name}={beta} changes in a step; "
                f"use at most {SLOWEST_IN_BFLOAT16}, or float32"
            )


def with_moments(optimizer: optax.GradientTransformation, dtype: str) -> optax.GradientTransformation:
    """Returns an Adam whose two moments are kept in `dtype` between steps; each step computes in float32.

    They are rounded to the nearest, so that in bfloat16, of 8 bits, a moment that should change by less than a 256th of
    itself may stay as it is; see `check_moments`.
    """
    if dtype == "float32":
        return optimizer

    def cast(state, dtype):
        def of_adam(part):
            if not isinstance(part, optax.ScaleByAdamState):
                return part
            mu, nu = jax.tree.map(lambda moment: moment.astype(dtype), (part.mu, part.nu))
            return part._replace(mu=mu, nu=nu)

        return jax.tree.map(of_adam, state, is_leaf=lambda part: isinstance(part, optax.ScaleByAdamState))

    def update(updates, state, params=None):
        updates, state = optimizer.update(updates, cast(state, jnp.float32), params)
        return updates, cast(state, dtype)

    return optax.GradientTransformation(lambda params: cast(optimizer.init(params), dtype), update)


def clip_by_global_norm(limit: float) -> optax.GradientTransformation:
    """Returns what optax's function of this name does, but scales all leaves by one common factor.

    XLA then multiplies by it wherever a gradient is read, and writes no clipped copy of the gradients.
    """

    def update(updates, state, params=None):
        factor = jnp.minimum(1.0, limit / optax.tree.norm(updates))
        return jax.tree.map(lambda leaf: leaf * factor, updates), state

    return optax.GradientTransformation(optax.init_empty_state, update)


@jax.named_scope("average")
def moving_average(average, value, decay: float):
    """Returns decay * average + (1 - decay) * value, leaf by leaf; in this form equal trees stay equal bit for bit."""
    return jax.tree.map(lambda a, v: a - (1.0 - decay) * (a - v), average, value)
