"""LFQ and FSQ against plain formulas in NumPy, and against values that their authors publish."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.quantizers import BETA, SHAPE, assert_close, loss_of, normal

from ibq_jax.base.errors import UsageError
from ibq_jax.tokenizer.scalar_quantizers import FiniteScalarQuantizer, LookupFreeQuantizer


@pytest.mark.parametrize("implementation", ["streamed", "dense"])
def test_lfq_s_entropies_are_those_of_all_corners(implementation):
    z, temperature, group = normal(0, *SHAPE, 5) / 4, 0.5, 12
    module = LookupFreeQuantizer(32, BETA, temperature, group, 0.7, 1.3, implementation=implementation)
    corners = np.array([corner[::-1] for corner in itertools.product((-1, 1), repeat=5)])
    np.testing.assert_array_equal(module.lookup(jnp.arange(32)), corners)

    def entropies(z):
        logits = 2 * jnp.einsum("nd,kd->nk", z.reshape(-1, 5), corners) / temperature
        q = jnp.exp(logits) / jnp.exp(logits).sum(axis=1, keepdims=True)
        a = q.reshape(-1, group, 32).mean(axis=1)
        sample = -(q * jnp.log(q)).sum(axis=1).mean()
        return 0.7 * sample + 1.3 * (a * jnp.log(a + 1e-5)).sum(axis=1).mean(), sample

    def losses(z):
        out = module.apply({}, z)
        return out.entropy_loss, out

    (expected, sample), of_expected = jax.value_and_grad(entropies, has_aux=True)(z)
    (entropy_loss, out), gradient = jax.value_and_grad(losses, has_aux=True)(z)
    assert_close(out.sample_entropy, sample)
    assert_close(entropy_loss, expected)
    assert_close(gradient, of_expected, 2e-5)
    assert_close(out.quant_loss, BETA * np.mean((z - np.sign(z)) ** 2))


def test_lfq_is_the_signs():
    z, upstream = normal(0, *SHAPE, 5), normal(2, *SHAPE, 5)
    z[0, 0, 0, 0] = 0.0
    module = LookupFreeQuantizer(32, beta=BETA)
    gradient, out = jax.grad(lambda z: loss_of(module, {}, z, upstream), has_aux=True)(z)
    signs = np.where(z > 0, 1, -1)
    np.testing.assert_array_equal(out.z_q, signs)
    np.testing.assert_array_equal(out.indices, ((signs > 0) * [1, 2, 4, 8, 16]).sum(axis=-1))
    assert_close(gradient, upstream + BETA * 2 * (z - signs) / z.size)


def test_lfq_wants_a_power_of_two():
    with pytest.raises(UsageError, match=r"codebook.size=1000: quantizer lfq takes powers of two, such as 1024"):
        _ = LookupFreeQuantizer(1000).latent_dim
    assert LookupFreeQuantizer(2**18).latent_dim == 18


def test_fsq_s_codes_are_the_paper_s():
    """Checks the implicit codebook of levels (3, 5, 4), and code 10, the example in the authors' notebook."""
    module = FiniteScalarQuantizer(60, levels=(3, 5, 4))
    rows = np.asarray(module.lookup(jnp.arange(60)))
    np.testing.assert_array_equal(rows[:4], [[-1, -1, -1], [0, -1, -1], [1, -1, -1], [-1, -0.5, -1]])
    np.testing.assert_array_equal(rows[[15, 59]], [[-1, -1, -0.5], [1, 1, 0.5]])
    out = module.apply({}, jnp.array([[[[0.25, 0.6, -7.0]]]]))
    np.testing.assert_array_equal(out.z_q.reshape(-1), [0.0, 0.5, -1.0])
    assert out.indices.item() == 10 and out.quant_loss == out.entropy_loss == 0


@pytest.mark.parametrize("levels", [(8, 6, 5), (16, 8, 8), (2, 3), (256,)])
def test_fsq_values_indices_and_gradients(levels):
    size, dim = math.prod(levels), len(levels)
    module = FiniteScalarQuantizer(size, levels=levels)
    z, upstream = 2 * normal(0, *SHAPE, dim), normal(2, *SHAPE, dim)
    gradient, out = jax.grad(lambda z: loss_of(module, {}, z, upstream), has_aux=True)(z)
    for i, level in enumerate(levels):
        half, offset = (level - 1) * 1.001 / 2, 0.0 if level % 2 else 0.5
        inside = z[..., i].astype(np.float64) + math.atanh(offset / half)
        value = np.round(np.tanh(inside) * half - offset)
        np.testing.assert_array_equal(out.z_q[..., i], (value / (level // 2)).astype(np.float32))
        assert_close(gradient[..., i], upstream[..., i] * half / np.cosh(inside) ** 2 / (level // 2), 2e-5)
        digit = out.indices // math.prod(levels[:i]) % level
        np.testing.assert_array_equal(digit, value + level // 2)
    rows = np.asarray(module.lookup(jnp.arange(size)))
    assert len(np.unique(rows, axis=0)) == size


@pytest.mark.parametrize("level", [2, 3, 7, 8, 255, 256])
def test_fsq_reaches_every_level_and_none_beyond(level):
    module = FiniteScalarQuantizer(level, levels=(level,))
    z = jnp.linspace(-20, 20, 40_001).reshape(1, 1, -1, 1)
    assert set(np.unique(module.nearest(z))) == set(range(level))
    assert module.nearest(jnp.zeros((1, 1, 1, 1))).item() == level // 2


@pytest.mark.parametrize(
    ("size", "levels"),
    [
        (64, (8, 8)),
        (240, (8, 6, 5)),
        (1000, (8, 5, 5, 5)),
        (1024, (16, 8, 8)),
        (4375, (7, 5, 5, 5, 5)),
        (8192, (16, 8, 8, 8)),
        (15360, (8, 8, 8, 6, 5)),
        (16384, (16, 16, 8, 8)),
        (64000, (8, 8, 8, 5, 5, 5)),
        (262144, (8,) * 6),
    ],
)
def test_fsq_chooses_levels(size, levels):
    module = FiniteScalarQuantizer(size)
    assert module.latent_dim == len(levels)
    highest = np.float32([(level - 1 - level // 2) / (level // 2) for level in levels])
    np.testing.assert_array_equal(module.lookup(jnp.array(size - 1)), highest)


@pytest.mark.parametrize(
    ("size", "levels", "words"),
    [
        (100, (), "knows no levels for it; set quantizer.levels to numbers of that product"),
        (32, (), "or a power of two from 64 on"),
        (64, (8, 5), "make 40 codes, codebook.size is 64; set codebook.size=40"),
        (64, (64, 1), "each must be an integer from 2 to 256"),
        (64, (8.0, 8), "each must be an integer from 2 to 256"),
        (1024, (1024,), "each must be an integer from 2 to 256"),
    ],
)
def test_levels_that_cannot_be(size, levels, words):
    with pytest.raises(UsageError, match=words):
        _ = FiniteScalarQuantizer(size, levels=levels).latent_dim
