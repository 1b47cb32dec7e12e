"""The loop that draws codes: against the whole network's logits, the draws' distribution, and logit filters."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.small_generators import generator, guided_logits, softmax

from ibq_jax.autoregressive import generate as module
from ibq_jax.autoregressive.generate import (
    LogitFilter,
    _attention,
    _attention_of_padded_rows,
    _stages,
    generate,
    step_weights,
)
from ibq_jax.autoregressive.sample_codes import Guidance, Sampler
from ibq_jax.base.sharding import make_mesh


@pytest.mark.parametrize("changes", [{}, dict(num_kv_heads=1, grid=(2, 8))], ids=["square", "oblong, shared keys"])
@pytest.mark.parametrize("scale", [1.0, 2.25])
def test_greedy_codes_are_the_most_likely_of_the_whole_network(changes, scale):
    drawn, labels = generator(**changes), np.array([0, 1, 4, 4, 2])
    codes = np.asarray(drawn.sample(labels, cfg_scale=scale, temperature=0))
    assert codes.shape == (5, *drawn.model.grid) and len(np.unique(codes)) > 5
    expected = guided_logits(drawn, codes, labels, scale).argmax(axis=-1)
    np.testing.assert_array_equal(codes.reshape(5, -1), expected)
    np.testing.assert_array_equal(codes[2], codes[3])


def test_codes_are_drawn_with_noise_of_the_samples_number_and_position():
    drawn, labels, first, seed = generator(), np.array([0, 1, 4]), 7, 3
    codes = drawn.sample(labels, cfg_scale=2.25, temperature=0.8, seed=seed, first=first)
    logits = guided_logits(drawn, codes, labels, 2.25) / np.float32(0.8)
    for i in range(len(labels)):
        key = jax.random.fold_in(jax.random.key(seed), first + i)
        noise = np.stack([jax.random.gumbel(jax.random.fold_in(key, s), (64,)) for s in range(16)])
        np.testing.assert_array_equal(np.ravel(codes[i]), (logits[i] + noise).argmax(axis=-1))


@pytest.mark.parametrize(("given", "scale"), [(7, 2.25), (15, 1.0)])
def test_a_prefix_stays_and_the_rest_follows_it(given, scale):
    drawn, labels = generator(), np.array([0, 4, 2])
    prefix = np.random.default_rng(0).integers(0, 64, (3, given))
    codes = np.asarray(drawn.sample(labels, cfg_scale=scale, temperature=0, prefix=prefix)).reshape(3, -1)
    np.testing.assert_array_equal(codes[:, :given], prefix)
    expected = guided_logits(drawn, codes, labels, scale).argmax(axis=-1)
    assert np.any(expected[:, :given] != prefix)
    np.testing.assert_array_equal(codes[:, given:], expected[:, given:])


@pytest.mark.parametrize("given", [0, 7])
def test_caches_that_grow_in_stages_hold_what_was_seen(given, monkeypatch):
    monkeypatch.setattr(module, "LEAST_STAGE", 5)
    drawn, labels = generator(grid=(2, 9)), np.array([0, 4, 2])
    prefix = np.random.default_rng(0).integers(0, 64, (3, given))
    codes = np.asarray(drawn.sample(labels, cfg_scale=2.25, temperature=0, prefix=prefix)).reshape(3, -1)
    expected = guided_logits(drawn, codes, labels, 2.25).argmax(axis=-1)
    np.testing.assert_array_equal(codes[:, given:], expected[:, given:])


def test_stages_end_at_the_same_positions_after_any_prefix():
    assert [*_stages(1, 256)] == [(1, 64), (64, 128), (128, 192), (192, 256)]
    assert [*_stages(100, 256)] == [(100, 128), (128, 192), (192, 256)]
    assert [*_stages(1, 64)] == [(1, 64)] and [*_stages(64, 64)] == []
    assert [*_stages(1, 1030)] == [(1, 258), (258, 516), (516, 774), (774, 1030)]


def test_whole_rows_are_a_prefix_too():
    rows = np.random.default_rng(0).integers(0, 64, (3, 2, 4))
    sample = functools.partial(generator().sample, np.array([0, 4, 2]), cfg_scale=1.5)
    np.testing.assert_array_equal(sample(prefix=rows), sample(prefix=rows.reshape(3, 8)))
    np.testing.assert_array_equal(sample(prefix=rows)[:, :2], rows)


def test_an_empty_prefix_is_none():
    sample = functools.partial(generator().sample, np.array([0, 4]))
    np.testing.assert_array_equal(sample(prefix=np.zeros((2, 0), np.int32)), sample())


def test_samples_of_two_codes_follow_the_guided_distribution():
    changes, scale, temperature, count = dict(vocab_size=6, grid=(1, 2)), 1.7, 4.0, 16384
    drawn, label = generator(**changes), np.array([3])
    sampler = Sampler(drawn.model, drawn.params, make_mesh({"data": 8}), per_device_batch=512)
    settings = dict(logit_filter=LogitFilter(), temperature=temperature, seed=0)
    codes = sampler(np.repeat(label, count), guidance=Guidance(scale), **settings).reshape(-1, 2)
    counts = np.zeros((6, 6))
    np.add.at(counts, tuple(codes.T), 1)

    def probabilities(scale: float, temperature: float) -> np.ndarray:
        """Returns p(first code) p(second code | first) of every pair."""
        pairs = np.stack((np.arange(6), np.arange(6)), axis=1)
        p = softmax(guided_logits(drawn, pairs, np.repeat(label, 6), scale) / temperature)
        return p[0, 0][:, None] * p[:, 1]

    def chi_square(expected: np.ndarray) -> float:
        return float(((counts - count * expected) ** 2 / (count * expected)).sum())

    assert count * probabilities(scale, temperature).min() > 5  # where chi square is chi square distributed
    bound = 35 + 5 * math.sqrt(2 * 35)  # mean and five deviations at 35 degrees of freedom
    assert chi_square(probabilities(scale, temperature)) < bound
    for wrong in (probabilities(1.0, temperature), probabilities(scale, 3.5)):
        assert chi_square(wrong) > bound


def kept_by_reference(logits: np.ndarray, top_k: int, top_p: float) -> np.ndarray:
    """Returns a mask of the codes kept, found one by one from the most likely on; equal logits are kept together."""
    order = sorted(range(len(logits)), key=lambda code: -logits[code])
    if top_k:
        order = [code for code in order if logits[code] >= logits[order[min(top_k, len(order)) - 1]]]
    p, kept, mass = softmax(logits[order]), [], 0.0
    for code, probability in zip(order, p, strict=True):
        if mass < top_p or logits[code] == logits[kept[-1]]:
            kept.append(code)
            mass += probability
    return np.isin(np.arange(len(logits)), kept)


@pytest.mark.parametrize("top_p", [1.0, 0.99, 0.9, 0.5, 0.05, 1e-6])
@pytest.mark.parametrize("top_k", [0, 1, 3, 10, 40, 64, 1000])
def test_filters_keep_what_a_plain_loop_keeps(top_k, top_p):
    random = np.random.default_rng(0)
    logits = np.concatenate((random.normal(size=(20, 40)) * 3, random.integers(-2, 3, (20, 40)))).astype(np.float32)
    actual = np.asarray(LogitFilter(top_k, top_p)(jnp.asarray(logits)))
    expected = np.stack([kept_by_reference(row, top_k, top_p) for row in logits])
    np.testing.assert_array_equal(np.isfinite(actual), expected)
    np.testing.assert_array_equal(actual[expected], logits[expected])


def test_the_code_that_crosses_the_threshold_stays():
    logits = jnp.log(jnp.asarray([[0.15, 0.4, 0.05, 0.3, 0.1]]))
    for top_p, kept in ((0.39, [1]), (0.41, [1, 3]), (0.69, [1, 3]), (0.71, [0, 1, 3]), (0.96, [0, 1, 2, 3, 4])):
        np.testing.assert_array_equal(np.flatnonzero(np.isfinite(LogitFilter(top_p=top_p)(logits)[0])), kept)


def test_top_p_counts_what_top_k_left():
    logits = jnp.log(jnp.asarray([[0.4, 0.3, 0.2, 0.1]]))
    assert np.isfinite(LogitFilter(top_p=0.5)(logits)).sum() == 2
    assert np.isfinite(LogitFilter(top_k=2, top_p=0.5)(logits)).sum() == 1  # 0.4 is 0.57 of the two


def test_only_kept_codes_are_drawn():
    drawn, labels, keep = generator(), np.arange(12) % 5, dict(top_k=5, top_p=0.8)
    codes = drawn.sample(labels, cfg_scale=1.5, temperature=2.0, **keep)
    logits = jnp.asarray(guided_logits(drawn, codes, labels, 1.5).reshape(-1, 64) / 2.0)
    kept = np.isfinite(LogitFilter(**keep)(logits))
    assert np.all(kept[np.arange(len(kept)), np.ravel(codes)])
    assert np.mean(np.ravel(codes) != logits.argmax(axis=-1)) > 0.2


def test_filters_that_keep_everything_change_nothing():
    logits = jax.random.normal(jax.random.key(0), (8, 64))
    for keep in (LogitFilter(), LogitFilter(top_k=64), LogitFilter(top_k=1000), LogitFilter(top_p=1.0)):
        np.testing.assert_array_equal(keep(logits), logits)
    drawn, labels = generator(), np.arange(4)
    np.testing.assert_array_equal(drawn.sample(labels, top_k=None), drawn.sample(labels, top_k=0, top_p=1.0))


def test_without_guidance_no_row_is_doubled():
    drawn = generator()
    weights = step_weights(drawn.model, drawn.params)

    def shapes(guided: bool) -> set[str]:
        arguments = dict(
            labels=jnp.zeros(7, jnp.int32),
            keys=jax.random.split(jax.random.key(0), 7),
            prefix=jnp.zeros((7, 3), jnp.int32),
            guidance_scales=jnp.ones(16),
            temperature=jnp.float32(1),
        )
        program = jax.make_jaxpr(functools.partial(generate, drawn.model, logit_filter=LogitFilter(), guided=guided))(
            drawn.params, weights, **arguments
        )
        return set(re.findall(r"\d+", " ".join(re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", str(program)))))

    assert "14" in shapes(guided=True)
    assert "7" in shapes(guided=False) and "14" not in shapes(guided=False)


@pytest.mark.parametrize("queries", [1, 3, 8])
def test_attention_with_rows_of_zeros_is_attention(queries):
    """The form for TPUs, which `plan` compiles, beside the one that runs here."""
    rng = np.random.default_rng(0)
    query, keys, values = (jnp.asarray(rng.normal(size=(5, 2, rows, 16)), jnp.float32) for rows in (queries, 12, 12))
    seen = jnp.arange(12) <= 7
    plain, padded = (form(query, keys, values, seen) for form in (_attention, _attention_of_padded_rows))
    np.testing.assert_allclose(padded, plain, rtol=1e-6, atol=1e-6)
    weights = jax.nn.softmax(jnp.einsum("rgqd,rgsd->rgqs", query, keys)[..., :8] / 4, axis=-1)
    np.testing.assert_allclose(plain, jnp.einsum("rgqs,rgsd->rgqd", weights, values[:, :, :8]), rtol=1e-5, atol=1e-6)
