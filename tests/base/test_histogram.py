"""Entropy and perplexity of histograms, on the host and on the devices."""

import jax.numpy as jnp
import numpy as np
import pytest

from ibq_jax.base.histogram import entropy, perplexity


@pytest.mark.parametrize("array", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
def test_perplexity_counts_evenly_used_codes(array):
    assert float(perplexity(array([5.0, 5.0, 5.0, 0.0]))) == pytest.approx(3.0)
    assert float(perplexity(array([9.0, 0.0]))) == pytest.approx(1.0)
    assert float(perplexity(array([0.0, 0.0]))) == 1.0


@pytest.mark.parametrize(("array", "tolerance"), [(np.asarray, 1e-14), (jnp.asarray, 1e-5)], ids=["numpy", "jax"])
def test_entropy_of_counts_of_which_some_are_zero(array, tolerance):
    counts = np.random.default_rng(0).integers(0, 9, 50)
    share = counts[counts > 0] / counts.sum()
    expected = -(share * np.log(share)).sum()
    actual = entropy(array(counts))
    assert actual.dtype == (np.float64 if array is np.asarray else np.float32)
    assert float(actual) == pytest.approx(expected, rel=tolerance)
    assert float(perplexity(array(counts))) == pytest.approx(np.exp(expected), rel=tolerance)
