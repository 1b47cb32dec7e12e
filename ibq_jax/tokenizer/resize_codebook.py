"""Changing the size of a trained codebook: codes split into children, or dropped. The run continues from the result.

Shapes: K codes before, L after; an index map int32 [L] names, for every code after, the code before that it came from.
"""

import jax
import jax.numpy as jnp
import numpy as np

from ibq_jax.base.errors import UsageError
from ibq_jax.tokenizer.codebook_monitor import NEVER
from ibq_jax.tokenizer.step import TokenizerState

CODEBOOK = "quantize/codebook"


def grow_index_map(codes: int, target: int) -> np.ndarray:
    """The index map that grows K codes to `target`: codes 0..K-1 stay where they are, children follow, evenly spread.

    Raises UsageError unless there are to be more.
    """
    if target <= codes:
        raise UsageError(f"the codebook has {codes} codes already; it grows to more than that, not to {target}")
    return (np.arange(target) % codes).astype(np.int32)


def prune_index_map(counts: np.ndarray, multiple: int) -> np.ndarray:
    """The index map that drops codes with a count [K] of 0, in order, but for as many as `multiple` asks to be kept.

    Raises UsageError when no code would go.
    """
    codes, used = len(counts), int(np.count_nonzero(counts))
    size = -(-max(used, 1) // multiple) * multiple
    if size >= codes:
        raise UsageError(f"{used} of {codes} codes are in use; rounded up to a multiple of {multiple} none is to go")
    first_unused = np.flatnonzero(counts == 0)[: size - used]
    return np.sort(np.concatenate([np.flatnonzero(counts), first_unused])).astype(np.int32)


def resize_codebook(state: TokenizerState, index_map: np.ndarray, spread: float, seed: int) -> TokenizerState:
    """`state` with the codes that `index_map` names, on the devices it was on.

    Where a code comes n times, its first copy stays as it was; the others move by normal noise of `spread` times the
    codebook's root mean square; averaged codes move alike. The copies share the gradient that the code had, so Adam's
    first moments are divided by n and its second by n^2, and its steps stay as large as they were. All but the first
    count as unused until they are chosen.
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

    window = state.window.replace(
        last_used=jnp.where(is_copy, NEVER, state.window.last_used[index_map]),
        histogram=jnp.where(is_copy, 0.0, state.window.histogram[index_map]),
    )
    return jax.tree_util.tree_map_with_path(change, state).replace(window=window)
