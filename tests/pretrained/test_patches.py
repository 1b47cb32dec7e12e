"""Convolutions whose windows touch, as products: values and gradients against the convolution that they are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ibq_jax.pretrained.patches import convolve_patches


@pytest.mark.parametrize(("height", "width", "side"), [(12, 8, 4), (6, 10, 2), (13, 11, 3)])
def test_they_are_the_convolution(height, width, side):
    random = np.random.default_rng(0)
    x, kernel, bias = (
        jnp.asarray(random.normal(size=shape), jnp.float32)
        for shape in ((2, height, width, 5), (side, side, 5, 7), (7,))
    )

    def convolve(layer, x):
        y = jax.lax.conv_general_dilated(
            x, layer["kernel"], (side, side), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return y + layer["bias"].reshape(1, 1, 1, -1)

    layer = {"kernel": kernel, "bias": bias}
    (ours, pull_back), (theirs, pull_theirs) = (
        jax.vjp(function, layer, x) for function in (convolve_patches, convolve)
    )
    assert ours.shape == theirs.shape == (2, height // side, width // side, 7)
    weights = jnp.asarray(random.normal(size=ours.shape), jnp.float32)
    for mine, other in zip(
        jax.tree.leaves((ours, pull_back(weights))), jax.tree.leaves((theirs, pull_theirs(weights))), strict=True
    ):
        np.testing.assert_allclose(mine, other, rtol=0, atol=1e-5 * float(jnp.max(jnp.abs(other))))
