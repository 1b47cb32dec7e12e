"""Draws made together: the same bits as one by one, by fewer operations."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ibq_jax.base import batched_draws
from ibq_jax.base.batched_draws import draw_together

SHAPES = ((3, 4), (12,), (2, 6), (5, 3), ())


def draws(seed, scale):
    """Draws of three sizes by nested jits, with keys made of keys, next to what no draw is needed for."""
    cases = list(itertools.product(KINDS.items(), SHAPES))
    keys = [jax.random.fold_in(jax.random.key(seed), number) for number in range(len(cases))]
    keys[0] = jax.random.fold_in(keys[0], seed)
    drawn = {f"{name}{shape}": draw(key, shape) for key, ((name, draw), shape) in zip(keys, cases, strict=True)}
    return drawn | {"scaled": scale * drawn["normal(12,)"], "zeros": jnp.zeros(3), "seed": seed, "constant": 2.0}


KINDS = {
    "normal": jax.random.normal,
    "uniform": lambda key, shape: jax.random.uniform(key, shape, minval=-0.3),
    "truncated": lambda key, shape: jax.random.truncated_normal(key, -2.0, 2.0, shape),
    "bfloat16": lambda key, shape: jax.random.uniform(key, shape, jnp.bfloat16),
}


def check(function, *arguments):
    """Checks that draws made together give the same bits; returns the number of Threefry's loops without and with."""
    plain, together = (jax.jit(made).lower(*arguments).compile() for made in (function, draw_together(function)))
    jax.tree.map(np.testing.assert_array_equal, together(*arguments), plain(*arguments))
    return [program.as_text().count(" while(") for program in (plain, together)]


def test_bits_are_the_same_and_draws_of_one_size_are_one_operation():
    plain, together = check(draws, 7, jnp.full(12, 1.5))
    assert plain > 20
    assert together == 2 + 2 * 3  # two generations of keys; three sizes, of 32 and of 16 bits


def test_draws_in_a_loop_over_layers_and_split_keys_stay():
    def layers(seed):
        def layer(key, number):
            return key, jax.random.normal(jax.random.fold_in(key, number), (4,))

        key = jax.random.key(seed)
        first, second = jax.random.split(key)
        return jax.lax.scan(layer, first, jnp.arange(3))[1], jax.random.normal(second, (4,)), jax.random.key_data(key)

    check(layers, 3)


@pytest.mark.parametrize("kind", ["rbg", "unsafe_rbg"])
def test_keys_of_other_kinds_are_left_alone(kind):
    """Their draws with an array of keys have other bits."""

    def draws(seed):
        key = jax.random.key(seed, impl=kind)
        return [jax.random.normal(jax.random.fold_in(key, number), (8,)) for number in range(3)]

    check(draws, 5)


def test_large_draws_are_left_alone(monkeypatch):
    monkeypatch.setattr(batched_draws, "LARGEST", 11)
    together = check(draws, 7, jnp.full(12, 1.5))[1]
    assert together > 8


def test_what_no_result_needs_is_not_computed():
    def draws(seed):
        forward = jnp.sin(jax.random.normal(jax.random.key(seed), (64, 64))) @ jnp.ones((64, 64))
        return jax.eval_shape(lambda: forward).shape[0] * jax.random.uniform(jax.random.key(seed + 1), (4,))

    operations = str(jax.make_jaxpr(draw_together(draws))(0))
    assert "dot_general" not in operations and "sin" not in operations
    check(draws, 0)
