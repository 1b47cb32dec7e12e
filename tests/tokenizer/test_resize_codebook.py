"""Growing and pruning a trained codebook: which code each one copies, and its moments, averages and window."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ibq_jax.base.config import load_config
from ibq_jax.base.errors import UsageError
from ibq_jax.base.sharding import abstract_state, make_mesh
from ibq_jax.tokenizer.codebook_monitor import NEVER
from ibq_jax.tokenizer.resize_codebook import grow_index_map, inverse_index_map, prune_index_map, resize_codebook
from ibq_jax.tokenizer.step import TokenizerTrainer

FIELDS = ("data.image_size=16", "data.resize=16", "model.resolution=16", "codebook.size=12", "codebook.dim=8")


@pytest.fixture(scope="module")
def state():
    config = load_config("configs/tokenizer.py:openmoji32", [f"--config.{field}" for field in FIELDS])
    trainer = TokenizerTrainer(config, make_mesh({"data": -1}), steps_per_epoch=1)
    shapes, _ = abstract_state(trainer.create_state, trainer.mesh, 0)
    random = np.random.default_rng(0)
    state = jax.tree.map(lambda leaf: jnp.asarray(random.normal(size=leaf.shape), leaf.dtype), shapes)
    return state.replace(window=state.window.replace(last_used=jnp.arange(12), histogram=jnp.arange(12.0)))


def moments(state):
    adam = state.optimizer[0]
    return adam.mu["quantize"]["codebook"], adam.nu["quantize"]["codebook"]


def test_growing_keeps_the_old_codes_and_puts_children_near_them(state):
    index_map = grow_index_map(12, 30)
    np.testing.assert_array_equal(index_map, [*range(12), *range(12), *range(6)])
    grown = resize_codebook(state, index_map, spread=0.02, seed=3)
    old, new = (np.asarray(s.params["quantize"]["codebook"]) for s in (state, grown))
    np.testing.assert_array_equal(new[:12], old)
    moved = new - old[index_map]
    assert np.std(moved[12:]) == pytest.approx(0.02 * np.sqrt(np.mean(old**2)), rel=0.2)
    assert len(np.unique(new, axis=0)) == 30
    averaged = np.asarray(grown.ema["quantize"]["codebook"]) - np.asarray(state.ema["quantize"]["codebook"])[index_map]
    np.testing.assert_allclose(averaged, moved, atol=1e-6)


def test_copies_share_adams_moments_so_that_its_steps_stay_as_large(state):
    index_map = grow_index_map(12, 30)
    copies = np.where(np.arange(12) < 6, 3, 2)[index_map][:, None]
    (mu, nu), (old_mu, old_nu) = moments(resize_codebook(state, index_map, spread=0.02, seed=3)), moments(state)
    np.testing.assert_allclose(mu, old_mu[index_map] / copies, rtol=1e-6)
    np.testing.assert_allclose(nu, old_nu[index_map] / copies**2, rtol=1e-6)


def test_children_count_as_unused_until_they_are_chosen(state):
    window = resize_codebook(state, grow_index_map(12, 20), spread=0.02, seed=3).window
    np.testing.assert_array_equal(window.last_used, [*range(12), *[NEVER] * 8])
    np.testing.assert_array_equal(window.histogram, [*range(12), *[0] * 8])


def test_pruning_keeps_what_is_used_as_it_was_and_nothing_else_changes(state):
    counts = np.array([3, 0, 0, 5, 0, 1, 1, 0, 0, 0, 2, 0])
    np.testing.assert_array_equal(prune_index_map(counts, 1), [0, 3, 5, 6, 10])
    index_map = prune_index_map(counts, 4)
    np.testing.assert_array_equal(index_map, [0, 1, 2, 3, 4, 5, 6, 10])  # three unused ones make it a multiple of 4
    pruned = resize_codebook(state, index_map, spread=0.02, seed=3)
    for new, old in zip(moments(pruned), moments(state), strict=True):
        np.testing.assert_array_equal(new, old[index_map])
    np.testing.assert_array_equal(pruned.window.last_used, index_map)
    leaves, old_leaves = (jax.tree_util.tree_flatten_with_path(s)[0] for s in (pruned, state))
    for (path, new), (_, old) in zip(leaves, old_leaves, strict=True):
        if new.shape != old.shape:
            np.testing.assert_array_equal(new, old[index_map], err_msg=str(path))
        else:
            np.testing.assert_array_equal(new, old, err_msg=str(path))


def test_sizes_that_cannot_be():
    with pytest.raises(UsageError, match="the codebook has 12 codes already"):
        grow_index_map(12, 12)
    with pytest.raises(UsageError, match="9 of 12 codes are in use; rounded up to a multiple of 4 none can be dropped"):
        prune_index_map(np.arange(12) < 9, 4)


def test_old_codes_are_renumbered_by_the_inverse_map():
    """Others apply it to codes that they stored: what is kept stays the same row, what is dropped is -1."""
    index_map = prune_index_map(np.array([3, 0, 0, 5, 0, 1, 0, 2]), multiple=5)
    np.testing.assert_array_equal(index_map, [0, 1, 3, 5, 7])
    inverse = inverse_index_map(index_map, 8)
    assert inverse.dtype == np.int32 and inverse.tolist() == [0, 1, -1, 2, -1, 3, -1, 4]
    codes = np.array([[0, 3], [7, 5]])
    np.testing.assert_array_equal(index_map[inverse[codes]], codes)
    assert inverse_index_map(grow_index_map(4, 10), 4).tolist() == [0, 1, 2, 3]
