"""Schedules, optimizers and averaged weights, against their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from ibq_jax.base.errors import UsageError
from ibq_jax.base.state import (
    AveragedWeights,
    adam,
    adamw,
    apply_gradient,
    check_moments,
    cosine_schedule,
    drop_schedule,
    warmup_hold_decay_schedule,
)

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


RANDOM = np.random.default_rng(0)
PARAMS = {"conv": {"kernel": RANDOM.normal(size=(4, 6)), "bias": RANDOM.normal(size=6)}}
GRADIENTS = [jax.tree.map(lambda leaf: RANDOM.normal(size=leaf.shape), PARAMS) for _ in range(20)]
BETAS = dict(beta1=0.5, beta2=0.9, gradient_clip=0.0)


def trained(optimizer: optax.GradientTransformation) -> tuple[dict, optax.OptState]:
    """Returns (parameters, the optimizer's state) after steps along GRADIENTS."""
    params = jax.tree.map(jnp.float32, PARAMS)
    state = optimizer.init(params)
    for gradient in GRADIENTS:
        params, state = apply_gradient(optimizer, jax.tree.map(jnp.float32, gradient), state, params)
    return params, state


def test_adamw_is_pytorchs():
    ours, _ = trained(adamw(lambda step: 1e-2, 0.3, decays=lambda name: name.endswith("/kernel"), **BETAS))
    theirs = {name: torch.tensor(value, requires_grad=True) for name, value in PARAMS["conv"].items()}
    groups = [
        {"params": [theirs["kernel"]], "weight_decay": 0.3},
        {"params": [theirs["bias"]], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.5, 0.9))
    for gradient in GRADIENTS:
        for name, value in theirs.items():
            value.grad = torch.tensor(gradient["conv"][name])
        optimizer.step()
    for name, value in theirs.items():
        np.testing.assert_allclose(ours["conv"][name], value.detach().numpy(), rtol=1e-5, atol=1e-6)


def test_moments_in_bfloat16_are_the_rounded_ones():
    exact, rounded = (adam(lambda step: 1e-2, **BETAS, moment_dtype=dtype) for dtype in ("float32", "bfloat16"))
    (_, first), (_, second) = trained(exact), trained(rounded)
    assert jax.tree.structure(first) == jax.tree.structure(second)
    for ours, theirs in zip(jax.tree.leaves(second[0].mu), jax.tree.leaves(first[0].mu), strict=True):
        assert ours.dtype == jnp.bfloat16 and theirs.dtype == jnp.float32
    # The first step starts from zeros, so that what is kept is the exact moment, rounded.
    params, gradient = (jax.tree.map(jnp.float32, tree) for tree in (PARAMS, GRADIENTS[0]))
    states = [
        apply_gradient(optimizer, gradient, optimizer.init(params), params)[1][0] for optimizer in (exact, rounded)
    ]
    for name in ("mu", "nu"):
        expected = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), getattr(states[0], name))
        jax.tree.map(np.testing.assert_array_equal, getattr(states[1], name), expected)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_moments_in_bfloat16_train_as_float32_does(weight_decay):
    def end(dtype: str) -> dict:
        return trained(adamw(lambda step: 1e-2, weight_decay, decays=lambda name: True, moment_dtype=dtype, **BETAS))[0]

    moved = jax.tree.map(np.subtract, end("float32"), jax.tree.map(np.float32, PARAMS))
    error = jax.tree.map(np.subtract, end("bfloat16"), end("float32"))
    assert 0 < optax.tree.norm(error) < 0.01 * optax.tree.norm(moved)


def test_moments_that_bfloat16_cannot_keep_are_refused():
    check_moments(0.5, 0.99, "bfloat16")
    check_moments(0.9, 0.999, "float32")
    with pytest.raises(UsageError, match=r"bfloat16 rounds away what optimizer.beta2=0.999 changes.*at most 0.99"):
        check_moments(0.9, 0.999, "bfloat16")
    falling = jnp.bfloat16(1.0)
    assert jnp.bfloat16(0.99 * falling) < falling == jnp.bfloat16(0.999 * falling.astype(jnp.float32))
