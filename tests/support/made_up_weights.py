"""Made-up weights for states before a first step."""

import math

import jax
import numpy as np


def made_up_params(shapes, random: np.random.Generator, **widths: float):
    """Returns random float32 parameters of the shapes in a tree, about as wide as the models' own.

    Kernels are divided by the root of their inputs, scales of norms are 1, and other leaves have a standard deviation
    of 0.1, or that which `widths` gives for their name.
    """
    widths = {"codebook": 0.7, **widths}

    def made_up(path, leaf) -> np.ndarray:
        name = path[-1].key
        if name == "scale":
            return np.ones(leaf.shape, np.float32)
        kernel = 1 / math.sqrt(max(1, math.prod(leaf.shape[:-1])))
        width = kernel if name == "kernel" else widths.get(name, 0.1)
        return (width * random.standard_normal(leaf.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(made_up, shapes)
