"""Grows or shrinks a trained codebook, by splitting codes into copies or dropping them. Training continues from there.

Shapes: K codes before, L after. An index map int32 [L] holds, for each new code, the index of the old code it copies.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from ibq_jax.base.errors import UsageError
from ibq_jax.tokenizer.codebook_monitor import NEVER
from ibq_jax.tokenizer.step import TokenizerState

CODEBOOK = "quantize/codebook"
DROPPED = -1  # in the inverse of an index map


def grow_index_map(codes: int, target: int) -> np.ndarray:
    """Returns the index map that grows K codes to `target`: codes 0..K-1 keep their indices, and copies follow, spread
    evenly over them.

    Raises UsageError unless `target` is larger than K.
    """
    if target <= codes:
        raise UsageError(f"the codebook has {codes} codes already; it can grow to more than that, not to {target}")
    return (np.arange(target) % codes).astype(np.int32)


def prune_index_map(counts: np.ndarray, multiple: int) -> np.ndarray:
    """Returns the index map that drops the codes whose count [K] is 0 and keeps the others in order.

    As many unused codes are kept as it takes to make the new size a multiple of `multiple`. Raises UsageError if no
    code would be dropped.
    """
    codes, used = len(counts), int(np.count_nonzero(counts))
    size = -(-max(used, 1) // multiple) * multiple
    if size >= codes:
        raise UsageError(
            f"{used} of {codes} codes are in use; rounded up to a multiple of {multiple} none can be dropped"
        )
    first_unused = np.flatnonzero(counts == 0)[: size - used]
    return np.sort(np.concatenate([np.flatnonzero(counts), first_unused])).astype(np.int32)


def inverse_index_map(index_map: np.ndarray, codes: int) -> np.ndarray:
    """Returns the new index of every one of K old codes, int32 [K]: of its first copy, or DROPPED.

    Codes [...] of the old tokenizer become those of the new one by `inverse[codes]`.
    """
    inverse = np.full(codes, DROPPED, np.int32)
    kept, first = np.unique(index_map, return_index=True)
    inverse[kept] = first
    return inverse


def resize_codebook(state: TokenizerState, index_map: np.ndarray, spread: float, seed: int) -> TokenizerState:
    """Returns `state` with the codes that `index_map` names, on the same devices.

    Of n copies of a code the first stays unchanged. The others move by normal noise of `spread` times the codebook's
    root mean square, the averaged (EMA) codes by the same noise, and count as unused until they are chosen. The copies
    share the gradient that the code had: Adam's first moment is divided by n and its second by n^2, so that its steps
    keep their size.
    """
    copies = np.bincount(index_map)[index_map].astype(np.float32)
    _, first = np.unique(index_map, return_index=True)
    is_copy = np.ones(len(index_map), bool)
    is_copy[first] = False
    codebook = state.params["quantize"]["codebook"]
    scale = spread * jnp.sqrt(jnp.mean(codebook**2))
    noise = scale * jax.random.normal(jax.random.key(seed), (len(index_map), codebook.shape[1]))
    noise = jnp.where(is_copy[:, None], noise, 0.0)

    def change(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if not name.endswith(CODEBOOK):
            return leaf
        rows = jnp.take(leaf, index_map, axis=0)
        if "/mu/" in name:
            return rows / copies[:, None]
        if "/nu/" in name:
            return rows / copies[:, None] ** 2
        return rows + noise

    window = dataclasses.replace(
        state.window,
        last_used=jnp.where(is_copy, NEVER, state.window.last_used[index_map]),
        histogram=jnp.where(is_copy, 0.0, state.window.histogram[index_map]),
    )
    return jax.tree_util.tree_map_with_path(change, state).replace(window=window)
