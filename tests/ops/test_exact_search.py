"""The exact search returns the code of the largest product of the numbers given, whatever the fast pass rounds away."""

import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ibq_jax.base.sharding import make_mesh
from ibq_jax.ops import exact_search, nearest_codes
from ibq_jax.ops.block_scan import BlockScan
from ibq_jax.ops.exact_search import exact_nearest_codes

# Optimized as for users: what LLVM does to sums of rounding errors is part of the promise.
pytestmark = pytest.mark.usefixtures("optimized")

FAST = ("bfloat16", "float32")
TOKENS = 104  # of every case, beside 128 codes: a search is compiled once for all of them


def largest(z: np.ndarray, codebook: np.ndarray) -> np.ndarray:
    """Returns the first code of the largest product, computed in rational numbers where float64 cannot tell."""
    products = z.astype(np.float64) @ codebook.astype(np.float64).T
    margin = 1e-13 * np.linalg.norm(z.astype(np.float64), axis=1) * np.linalg.norm(codebook.astype(np.float64))
    codes = []
    for latent, row, floor in zip(z, products, products.max(axis=1) - margin, strict=True):
        near = np.flatnonzero(row >= floor)
        exact = [
            sum(Fraction(float(a)) * Fraction(float(b)) for a, b in zip(latent, codebook[k], strict=True)) for k in near
        ]
        codes.append(near[exact.index(max(exact))])
    return np.array(codes)


search = jax.jit(exact_nearest_codes, static_argnames=("stream", "fast"))


def found(z: np.ndarray, codebook: np.ndarray, fast: str, stream: BlockScan = BlockScan(16)) -> np.ndarray:  # noqa: B008
    return np.asarray(search(jnp.asarray(z), jnp.asarray(codebook), stream=stream, fast=fast))


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def near_ties() -> tuple[np.ndarray, np.ndarray]:
    """Rows in pairs that differ by one unit in the last place of one element."""
    codebook = np.repeat(normal(64, 24), 2, axis=0)
    codebook[1::2, 5] = np.nextafter(codebook[1::2, 5], np.float32(np.inf))
    return normal(TOKENS, 24, seed=1), codebook


def equal_rows() -> tuple[np.ndarray, np.ndarray]:
    """Every row eight times, far apart."""
    return normal(TOKENS, 24, seed=1), np.tile(normal(16, 24), (8, 1))


def all_rows_equal() -> tuple[np.ndarray, np.ndarray]:
    return normal(TOKENS, 24, seed=1), np.tile(normal(1, 24), (128, 1))


def crowd() -> tuple[np.ndarray, np.ndarray]:
    """All rows are the same up to what bfloat16 rounds away, so that the fast pass rules out nothing."""
    return normal(TOKENS, 24, seed=1), normal(1, 24) + 1e-4 * normal(128, 24, seed=2)


def dense_crowd() -> tuple[np.ndarray, np.ndarray]:
    """All rows are the same up to a few units in the last place, so that float32 products rule out little."""
    return normal(TOKENS, 24, seed=1), (normal(1, 24) * (1 + 3e-7 * normal(128, 24, seed=2))).astype(np.float32)


def cancelling() -> tuple[np.ndarray, np.ndarray]:
    """Products are small differences of large terms."""
    half, codebook = normal(TOKENS, 12, seed=1), 1e-3 * normal(128, 24)
    codebook += np.concatenate([normal(1, 12), -normal(1, 12)], axis=1)
    return np.concatenate([half, half], axis=1), codebook.astype(np.float32)


def huge() -> tuple[np.ndarray, np.ndarray]:
    """Products that overflow float32."""
    return 1e30 * normal(TOKENS, 24, seed=1), 1e30 * normal(128, 24)


def tiny() -> tuple[np.ndarray, np.ndarray]:
    """Products that underflow float32."""
    return 1e-30 * normal(TOKENS, 24, seed=1), 1e-30 * normal(128, 24)


def of_all_sizes() -> tuple[np.ndarray, np.ndarray]:
    codebook = normal(128, 24) * np.float32(10) ** np.arange(-10, 6).repeat(8)[:, None].astype(np.float32)
    return normal(TOKENS, 24, seed=1) * np.float32(10) ** np.linspace(-25, 25, TOKENS, dtype=np.float32)[
        :, None
    ], codebook


CASES = (near_ties, equal_rows, all_rows_equal, crowd, dense_crowd, cancelling, huge, tiny, of_all_sizes)


@pytest.mark.parametrize("fast", FAST)
@pytest.mark.parametrize("case", CASES)
def test_adversarial_inputs_get_the_code_of_the_largest_product(case, fast):
    z, codebook = case()
    np.testing.assert_array_equal(found(z, codebook, fast), largest(z, codebook))


@pytest.mark.parametrize("fast", FAST)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_numbers_get_the_code_of_the_largest_product(fast, data):
    """Few values, so that ties, cancellation and equal rows are common; one shape, so that it compiles once."""
    numbers = st.one_of(
        st.sampled_from([0.0, 1.0, -1.0, 1.0 + 2**-23, 1.0 - 2**-24, 1.0 + 2**-8, 2**-60, 3e38, -3e38]),
        st.builds(math.ldexp, st.integers(-(2**24), 2**24), st.integers(-80, 80)),
    )
    rows = st.lists(st.lists(numbers, min_size=4, max_size=4), min_size=8, max_size=8)
    z, some = (np.array(data.draw(rows), np.float32) for _ in range(2))
    codebook = np.concatenate([some, np.roll(some, 1, axis=1)])
    products = z.astype(np.float64) @ codebook.astype(np.float64).T
    chosen = np.take_along_axis(products, found(z, codebook, fast)[:, None], axis=1)[:, 0]
    largest_terms = np.abs(z).max(axis=1).astype(np.float64) * np.abs(codebook).max()
    # Numbers 2^-100 times smaller than the largest may underflow; what they add is below any rounding error but this.
    assert np.all(products.max(axis=1) - chosen <= 2.0**-40 * largest_terms)


@pytest.mark.parametrize("fast", FAST)
def test_numbers_below_the_normal_range_count_as_zero(fast):
    z, codebook = normal(20, 8, seed=1), normal(32, 8)
    np.testing.assert_array_equal(found(1e-42 * z, codebook, fast), 0)
    np.testing.assert_array_equal(found(z, 1e-42 * codebook, fast), 0)
    z[:, 3:] *= np.float32(1e-42)
    flushed = np.where(np.arange(8) < 3, z, 0).astype(np.float32)
    np.testing.assert_array_equal(found(z, codebook, fast), largest(flushed, codebook))


@pytest.mark.parametrize("fast", FAST)
def test_a_latent_with_a_nan_gets_code_0_and_leaves_the_others_alone(fast):
    z, codebook = normal(20, 8, seed=1), normal(32, 8)
    expected = largest(z, codebook)
    z[7, 2], expected[7] = np.nan, 0
    np.testing.assert_array_equal(found(z, codebook, fast), expected)


@pytest.mark.parametrize("fast", FAST)
@pytest.mark.parametrize(
    ("tokens", "codes", "block_size"), [(1, 96, 8), (5, 7, 1), (97, 96, 96), (64, 1, 1), (144, 128, 1)]
)
def test_any_number_of_tokens_codes_and_chunks(tokens, codes, block_size, fast, monkeypatch):
    monkeypatch.setattr(exact_search, "TOKENS_AT_ONCE", 48)
    z, codebook = normal(tokens, 12, seed=1), normal(codes, 12)
    search = jax.jit(lambda z, codebook: exact_nearest_codes(z, codebook, BlockScan(block_size), fast))
    np.testing.assert_array_equal(np.asarray(search(z, codebook)), largest(z, codebook))


@pytest.mark.parametrize("fast", FAST)
@pytest.mark.parametrize("sizes", [{"codebook": 8}, {"data": 2, "fsdp": 2, "codebook": 2}])
@pytest.mark.parametrize("case", [near_ties, equal_rows, crowd, dense_crowd])
def test_devices_agree_with_one(case, sizes, fast):
    """Ties between codes of different devices too."""
    z, codebook = case()
    np.testing.assert_array_equal(found(z, codebook, fast, BlockScan(8, make_mesh(sizes))), largest(z, codebook))


def test_few_tokens_need_a_second_search():
    """The fast pass decides nearly all random latents; a bound that is far too wide would show here."""
    z, codebook = normal(512, 64, seed=1), normal(4096, 64)
    scale = jnp.float32(1)
    first = exact_search._search(jnp.asarray(z), jnp.asarray(codebook), scale, BlockScan(256), "bfloat16")
    assert np.mean(np.isfinite(first.unseen)) < 0.05
    assert np.mean((first.codes != exact_search.NO_CODE).sum(axis=1) > 1) < 0.05


def test_bfloat16_inputs_are_taken_as_the_numbers_they_are():
    z, codebook = (jnp.asarray(array, jnp.bfloat16) for array in (normal(64, 12, seed=1), normal(128, 12)))
    expected = largest(np.asarray(z, np.float32), np.asarray(codebook, np.float32))
    np.testing.assert_array_equal(nearest_codes(z, codebook), expected)


def test_a_zero_latent_needs_no_comparison():
    """All its products are equal; looking through all codes for each padded token would take for ever."""
    z, codebook = np.zeros((20, 24), np.float32), normal(4096, 24)
    first = exact_search._search(jnp.asarray(z), jnp.asarray(codebook), jnp.float32(1), BlockScan(256), "float32")
    assert np.all(np.isneginf(first.unseen))
    np.testing.assert_array_equal(found(z, codebook, "float32"), 0)


def test_an_exact_product_has_three_times_the_precision():
    a, b = normal(200, 33), normal(200, 33, seed=1)
    for last in (-2, -1):  # what is left is far below float32's rounding error, then below that of twice its precision
        rest = (a[:, :last].astype(np.longdouble) * b[:, :last]).sum(axis=1)
        a[:, last] = (-rest / b[:, last]).astype(np.float32)
    products = jax.jit(exact_search._exact_product)(a.T, b.T)
    exact = [
        sum(Fraction(float(x)) * Fraction(float(y)) for x, y in zip(*rows, strict=True))
        for rows in zip(a, b, strict=True)
    ]
    parts = [sum(Fraction(float(part)) for part in token) for token in zip(*products, strict=True)]
    errors = np.array([float(abs(part - right)) for part, right in zip(parts, exact, strict=True)])
    terms = np.abs(a.astype(np.float64) * b).sum(axis=1)
    np.testing.assert_array_less(errors, 2.0**-64 * terms)
    twice = np.array(
        [
            float(abs(sum(Fraction(float(part)) for part in token[:2]) - right))
            for token, right in zip(zip(*products, strict=True), exact, strict=True)
        ]
    )
    assert np.any(twice > 0)
