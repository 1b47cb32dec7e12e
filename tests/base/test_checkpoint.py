"""Checkpoints: kept by policy, and a damaged one costs no more than itself."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from ibq_jax.base.checkpoint import Checkpoints
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


def test_what_is_saved_comes_back_to_another_mesh(tmp_path):
    state = make_state(10)
    checkpoints = saved(tmp_path, [10])
    mesh = make_mesh({"data": 2, "codebook": 4})
    place = {"weights": NamedSharding(mesh, PartitionSpec("codebook")), "step": NamedSharding(mesh, PartitionSpec())}
    shapes = jax.tree.map(lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), state, place)
    restored = checkpoints.restore(shapes)
    assert restored.step == 10 and restored.metadata == {"step": 10}
    assert restored.state["weights"].sharding == place["weights"]
    np.testing.assert_array_equal(restored.state["weights"], state["weights"])


def test_a_large_array_is_written_piece_by_piece(tmp_path, monkeypatch):
    monkeypatch.setattr("ibq_jax.base.checkpoint.WRITTEN_AT_ONCE", 2**14)
    checkpoints = saved(tmp_path, [10])
    sizes = [path.stat().st_size for path in (tmp_path / "10").rglob("*") if path.is_file()]
    assert max(sizes) <= 2 * 2**14, "an array of 2**17 bytes lies in one file"
    restored = checkpoints.restore(shapes_of(make_state(0)))
    np.testing.assert_array_equal(restored.state["weights"], make_state(10)["weights"])


def test_what_is_not_wanted_is_not_read(tmp_path):
    checkpoints = saved(tmp_path, [10])
    restored = checkpoints.restore(shapes_of(make_state(0)), wanted=lambda name: name == "step")
    assert restored.state["weights"] is None and int(restored.state["step"]) == 10


def test_a_truncated_step_is_said_set_aside_and_the_one_before_it_used(tmp_path):
    saved(tmp_path, [10, 20], keep_last=2).close()
    truncate_largest_file(tmp_path / "20")
    checkpoints, said = Checkpoints(tmp_path, keep_last=2), []
    restored = checkpoints.restore(shapes_of(make_state(0)), said.append)
    assert restored.step == 10
    np.testing.assert_array_equal(restored.state["weights"], make_state(10)["weights"])
    assert len(said) == 1 and "20 is not whole" in said[0]
    assert (tmp_path / "broken" / "20").is_dir() and checkpoints.steps == [10]
    checkpoints.save(20, make_state(20), {"step": 20})  # the step is computed and saved again
    checkpoints.wait()
    assert checkpoints.steps == [10, 20]


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
