"""Schedules, optimizers and averaged weights, against their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ibq_jax.base.errors import UsageError
from ibq_jax.base.state import AveragedWeights, cosine_schedule, drop_schedule, warmup_hold_decay_schedule

STEPS = 3000


def drops(step, rate, warmup_steps, drop_steps, factor):
    warm = np.minimum(1.0, (step + 1) / max(1, warmup_steps))
    return rate * warm * factor ** sum((step >= drop).astype(float) for drop in drop_steps)


def warmup_hold_decay(step, rate, warmup_fraction, init_lr_factor, hold_fraction, end_lr_factor):
    warmup_steps = round(warmup_fraction * STEPS)
    rising = init_lr_factor + (1 - init_lr_factor) * step / max(1, warmup_steps)
    passed = (step - warmup_steps) / max(1, STEPS - 1 - warmup_steps)
    falling = end_lr_factor + (1 - end_lr_factor) * (1 - passed) / (1 - hold_fraction)
    return rate * np.where(step < warmup_steps, rising, np.where(passed < hold_fraction, 1.0, falling))


def cosine(step, first, last):
    return last + (first - last) * (0.5 + 0.5 * np.cos(np.pi * step / (STEPS - 1)))


def fractions(*values):
    names = ("warmup_fraction", "init_lr_factor", "hold_fraction", "end_lr_factor")
    return dict(zip(names, values, strict=True))


CASES = [
    *(
        pytest.param(drop_schedule(1e-4, *case), lambda step, case=case: drops(step, 1e-4, *case), id=f"drop {case}")
        for case in ((0, (), 0.1), (0, (1000, 2000), 0.1), (300, (1000, 1000), 0.3), (1, (0, 5), 0.5))
    ),
    *(
        pytest.param(
            warmup_hold_decay_schedule(1e-4, STEPS, **fractions(*case)),
            lambda step, case=case: warmup_hold_decay(step, 1e-4, *case),
            id=f"warm-up, hold, decay {case}",
        )
        for case in ((0.02, 0.005, 0.05, 0.1), (0.0, 0.0, 0.0, 0.01), (0.3, 0.1, 0.5, 1.0))
    ),
    *(
        pytest.param(cosine_schedule(*case, STEPS), lambda step, case=case: cosine(step, *case), id=f"cosine {case}")
        for case in ((0.05, 0.05), (0.0, 0.1), (0.1, 0.01), (0.02, 0.2))
    ),
]


@pytest.mark.parametrize(("schedule", "formula"), CASES)
def test_a_schedule_has_the_values_of_its_formula(schedule, formula):
    steps = np.arange(STEPS)
    expected = formula(steps.astype(np.float64))
    single = jax.vmap(schedule)(jnp.asarray(steps, jnp.int32))
    np.testing.assert_allclose(single, expected, rtol=1e-6, atol=2e-7 * expected.max())
    with jax.enable_x64(True):
        exact = jax.vmap(schedule)(jnp.asarray(steps, jnp.float64))
    assert exact.dtype == np.float64
    np.testing.assert_allclose(exact, expected, rtol=1e-7, atol=1e-18)


@pytest.mark.parametrize("ema", [{"a": 2}, None])
def test_weights_are_chosen_by_name(ema):
    state = AveragedWeights()
    state.params, state.ema = {"a": 1}, ema
    assert state.weights("raw") is state.params
    assert state.weights("ema") is (state.params if ema is None else ema)
    with pytest.raises(UsageError, match="weights 'all' do not exist; they are 'ema' or 'raw'"):
        state.weights("all")
