"""Checkpoints: the retention policy, restoring to other meshes, and what a damaged one costs."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from ibq_jax.base.checkpoint import Checkpoints
from ibq_jax.base.config import renamed_leaves
from ibq_jax.base.errors import UsageError
from ibq_jax.base.sharding import make_mesh


def make_state(value: float):
    return {"weights": value + jnp.arange(4096.0 * 8).reshape(4096, 8), "step": jnp.asarray(int(value))}


def shapes_of(state):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)


def saved(directory: Path, steps, **options) -> Checkpoints:
    checkpoints = Checkpoints(directory, **options)
    for step in steps:
        checkpoints.save(step, make_state(step), {"step": step}, {"psnr": -abs(step - 20.0)})
    checkpoints.wait()
    return checkpoints


def truncate_largest_file(folder: Path) -> None:
    largest = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    with largest.open("r+b") as file:
        file.truncate(largest.stat().st_size // 2)


def test_the_newest_and_the_best_are_kept(tmp_path):
    checkpoints = saved(tmp_path, [10, 20, 30, 40, 50], keep_last=2, keep_best=1, best_metric="psnr")
    assert checkpoints.steps == [20, 40, 50]


def test_a_state_is_restored_to_another_mesh(tmp_path):
    state = make_state(10)
    checkpoints = saved(tmp_path, [10])
    mesh = make_mesh({"data": 2, "codebook": 4})
    shardings = {
        "weights": NamedSharding(mesh, PartitionSpec("codebook")),
        "step": NamedSharding(mesh, PartitionSpec()),
    }
    shapes = jax.tree.map(lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), state, shardings)
    restored = checkpoints.restore(shapes)
    assert restored.step == 10 and restored.metadata == {"step": 10}
    assert restored.state["weights"].sharding == shardings["weights"]
    np.testing.assert_array_equal(restored.state["weights"], state["weights"])


def test_a_large_array_is_split_over_files(tmp_path, monkeypatch):
    monkeypatch.setattr("ibq_jax.base.checkpoint.WRITTEN_AT_ONCE", 2**14)
    checkpoints = saved(tmp_path, [10])
    sizes = [path.stat().st_size for path in (tmp_path / "10").rglob("*") if path.is_file()]
    assert max(sizes) <= 2 * 2**14, "an array of 2**17 bytes lies in one file"
    restored = checkpoints.restore(shapes_of(make_state(0)))
    np.testing.assert_array_equal(restored.state["weights"], make_state(10)["weights"])


def test_leaves_that_are_not_selected_are_not_read(tmp_path):
    checkpoints = saved(tmp_path, [10])
    restored = checkpoints.restore(shapes_of(make_state(0)), select=lambda name: name == "step")
    assert restored.state["weights"] is None and int(restored.state["step"]) == 10


def test_a_truncated_step_is_reported_and_moved_and_the_previous_one_is_used(tmp_path):
    saved(tmp_path, [10, 20], keep_last=2).close()
    truncate_largest_file(tmp_path / "20")
    checkpoints, reported = Checkpoints(tmp_path, keep_last=2), []
    restored = checkpoints.restore(shapes_of(make_state(0)), reported.append)
    assert restored.step == 10
    np.testing.assert_array_equal(restored.state["weights"], make_state(10)["weights"])
    assert len(reported) == 1 and "20 is not whole" in reported[0]
    assert (tmp_path / "broken" / "20").is_dir() and checkpoints.steps == [10]
    checkpoints.save(20, make_state(20), {"step": 20})  # the step is computed and saved again
    checkpoints.wait()
    assert checkpoints.steps == [10, 20]


def test_a_state_saved_under_earlier_names_is_restored_under_todays(tmp_path):
    """Also the optimizer's state, in which the names of the parameters stand below those of optax's tuples."""
    params = {"conv": jnp.arange(6.0).reshape(2, 3), "bias": jnp.arange(3.0)}
    moments = optax.adam(1e-3).init(params)
    part = {"params": params, "optimizer": moments, "lecam": [jnp.ones(()), jnp.zeros(())]}
    before = Checkpoints(tmp_path)
    before.save(10, {"step": jnp.asarray(10), "adversary": part, "adversary_steps": jnp.asarray(7)}, {})
    before.close()
    state = {"step": jnp.asarray(0), "discriminator": part, "adversary_steps": jnp.asarray(0)}
    shapes = shapes_of(jax.tree.map(jnp.zeros_like, state))
    with pytest.raises(UsageError, match="adversary/lecam/0 is"):
        Checkpoints(tmp_path).restore_step(10, shapes)
    renamed = renamed_leaves("tokenizer")
    assert renamed == {"discriminator/": "adversary/"}
    restored = Checkpoints(tmp_path, renamed=renamed).restore(shapes)
    assert jax.tree.structure(restored.state) == jax.tree.structure(state)
    expected = state | {"step": jnp.asarray(10), "adversary_steps": jnp.asarray(7)}
    jax.tree.map(np.testing.assert_array_equal, restored.state, expected)
    without = Checkpoints(tmp_path, renamed=renamed).restore(shapes, select=lambda name: "optimizer" not in name)
    assert jax.tree.leaves(without.state["discriminator"]["optimizer"]) == []  # None everywhere
    np.testing.assert_array_equal(without.state["discriminator"]["params"]["conv"], params["conv"])


def test_when_no_step_is_whole_nothing_is_moved(tmp_path):
    saved(tmp_path, [10]).close()
    truncate_largest_file(tmp_path / "10")
    with pytest.raises(UsageError, match=r"no checkpoint under .* can be read; step 10"):
        Checkpoints(tmp_path).restore(shapes_of(make_state(0)))
    assert (tmp_path / "10").is_dir()


def test_a_step_of_another_model_names_the_array_that_differs(tmp_path):
    saved(tmp_path, [10]).close()
    other = shapes_of({"weights": jnp.zeros((4096, 9)), "step": jnp.zeros((), jnp.int32)})
    with pytest.raises(UsageError, match=r"weights is \(4096, 8\) there and \(4096, 9\) here"):
        Checkpoints(tmp_path).restore(other)


def test_a_foreign_folder_is_a_usage_error(tmp_path):
    (tmp_path / "10").mkdir()
    (tmp_path / "10" / "notes.txt").write_text("not a checkpoint")
    with pytest.raises(UsageError, match="no checkpoint under"):
        Checkpoints(tmp_path).restore(shapes_of(make_state(0)))


def test_an_empty_folder_has_nothing_to_restore(tmp_path):
    assert Checkpoints(tmp_path).restore(shapes_of(make_state(0))) is None
