"""Inputs and plain formulas for the tests of quantizers."""

import jax.numpy as jnp
import numpy as np

TOLERANCE = 2e-6  # of a tensor's largest magnitude
SHAPE = (2, 3, 4)  # B, h, w
BETA = 0.3


def assert_close(ours, theirs, tolerance: float = TOLERANCE) -> None:
    theirs = np.asarray(theirs)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * max(1e-30, np.abs(theirs).max()))


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def distances(z: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Returns |z - e|^2 in float64, [N, K]."""
    z, rows = z.reshape(-1, z.shape[-1]).astype(np.float64), rows.astype(np.float64)
    return ((z[:, None] - rows[None]) ** 2).sum(axis=-1)


def loss_of(module, params: dict, z, upstream):
    """Returns (a loss whose gradients are tested: z_q times a random cotangent, plus quant_loss; the output)."""
    out = module.apply({"params": params}, z)
    return jnp.sum(out.z_q * upstream) + out.quant_loss, out
