"""Weights from elsewhere as the start of a new run."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from ibq_jax.base.errors import UsageError
from ibq_jax.tokenizer.model import PROJECTION
from ibq_jax.tokenizer.parts import without

SHOWN = 3  # differing weights that an error names


def with_weights(state: Any, weights: Mapping) -> Any:
    """Returns a new training state with other weights, raw and averaged, in the same placement.

    The projection that an alignment loss trains stays as it is in the state.

    Args:
        state: a state before its first step.
        weights: parameters as a tree like `state.params`.

    Raises:
        UsageError: a weight is missing, unknown or of another size than the config's; the message names them.
    """
    weights = without(weights, (PROJECTION,))
    ours, theirs = (_shapes(tree) for tree in (without(state.params, (PROJECTION,)), weights))
    differing = [name for name in sorted(ours.keys() | theirs.keys()) if ours.get(name) != theirs.get(name)]
    if differing:
        words = [f"{name} is {_size(theirs.get(name))}, here {_size(ours.get(name))}" for name in differing[:SHOWN]]
        more = f", and {len(differing) - SHOWN} more" if len(differing) > SHOWN else ""
        raise UsageError(f"the initial weights are of another model than the config: {'; '.join(words)}{more}")

    def place(old, new):
        return jax.device_put(np.asarray(new, old.dtype), old.sharding)

    def placed(tree: dict) -> dict:
        others = without(tree, (PROJECTION,))
        return {**tree, **jax.tree.map(place, others, {name: weights[name] for name in others})}

    return dataclasses.replace(state, params=placed(state.params), ema=state.ema and placed(state.ema))


def _shapes(tree: Mapping) -> dict[str, tuple[int, ...]]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.shape(leaf) for path, leaf in leaves}


def _size(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else "x".join(map(str, shape))
