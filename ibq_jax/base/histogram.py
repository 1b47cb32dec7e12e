"""Entropy and perplexity of a histogram, on the host or on the devices."""

import jax
import numpy as np


def entropy(histogram: np.ndarray | jax.Array):
    """Returns the entropy (nats) of counts [K]: a float64 of a NumPy array, a float32 scalar of a JAX array."""
    xp = histogram.__array_namespace__()
    share = histogram / xp.maximum(xp.sum(histogram), 1.0)
    return -xp.sum(xp.where(share > 0, share * xp.log(xp.where(share > 0, share, 1.0)), 0.0))


def perplexity(histogram: np.ndarray | jax.Array):
    """Returns exp of the entropy of counts [K]: in [1, K], the number of codes if all occurred equally often."""
    return histogram.__array_namespace__().exp(entropy(histogram))
