"""The mesh and the placement of arrays on it."""

from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from ibq_jax.base.errors import UsageError
from ibq_jax.base.sharding import (
    AXES,
    WeightPlacement,
    abstract_state,
    check_batch,
    create_sharded,
    global_batch,
    make_mesh,
    partition_spec,
    process_rows,
    spread,
)


def test_an_axis_of_minus_one_takes_what_is_left():
    assert dict(make_mesh({"data": -1, "codebook": 4}).shape) == {"data": 2, "fsdp": 1, "codebook": 4}


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"data": 3}, "does not fit 8 devices"),
        ({"data": -1, "codebook": 3}, "does not fit 8 devices"),
        ({"data": -1, "fsdp": -1}, "at most one is -1"),
        ({"data": 0}, "sizes are positive"),
        ({"model": 8}, "mesh axis 'model' does not exist"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(sizes, words):
    with pytest.raises(UsageError, match=words):
        make_mesh(sizes)


def test_specs_follow_the_rules():
    mesh = make_mesh({"data": 2, "fsdp": 2, "codebook": 2})
    assert partition_spec(("codes", "code_dim"), (64, 8), mesh) == PartitionSpec("codebook", None)
    assert partition_spec((None, None, "conv_in", "conv_out"), (3, 3, 8, 16), mesh) == PartitionSpec(
        None, None, None, "fsdp"
    )
    assert partition_spec((None, None, "conv_in", "conv_out"), (3, 3, 8, 3), mesh) == PartitionSpec(*[None] * 4)


@pytest.mark.parametrize(
    ("spec", "shape", "expected"),
    [
        ((None, None), (1024, 3072), (AXES, None)),
        ((None, None, None), (16, 1024, 3072), (None, AXES, None)),
        (("codebook", None), (4096, 32), (("codebook", "data", "fsdp"), None)),
        ((None, "fsdp"), (1024, 64), (("data", "codebook"), "fsdp")),
        ((None, None, None, "fsdp"), (3, 3, 6, 1024), (None, None, None, ("fsdp", "data", "codebook"))),
        ((None, None, None, None), (3, 3, 6, 512), (None,) * 4),  # 64 columns would not fill a row of lanes
        ((None,), (65536,), (None,)),
        ((None, None), (64, 64), (None, None)),  # small
    ],
)
def test_a_state_is_spread_over_the_axes_that_its_specs_leave(spec, shape, expected):
    mesh = make_mesh({"data": 2, "fsdp": 2, "codebook": 2})
    assert spread(PartitionSpec(*spec), shape, mesh) == PartitionSpec(*expected)
    assert spread(PartitionSpec(*spec), shape, make_mesh({"data": 1}, jax.devices()[:1])) == PartitionSpec(*spec)


def test_weights_are_gathered_in_the_type_of_products_and_their_gradient_goes_back():
    mesh = make_mesh({"data": 4, "codebook": 2})

    def create():
        leaves = {"kernel": ((256, 128), ("width", None)), "codebook": ((512, 64), ("codes", "code_dim"))}
        normal = {name: jax.random.normal(jax.random.key(0), shape) for name, (shape, _) in leaves.items()}
        return {name: nn.LogicallyPartitioned(normal[name], names) for name, (_, names) in leaves.items()}

    placement = WeightPlacement.of(create, mesh)
    stored = create_sharded(create, mesh)
    assert {shard.data.shape for shard in stored["kernel"].addressable_shards} == {(32, 128)}
    assert {shard.data.shape for shard in stored["codebook"].addressable_shards} == {(64, 64)}
    gathered = jax.jit(lambda params: placement.gather(params, jnp.bfloat16, lambda path: path == ("kernel",)))(stored)
    assert {shard.data.shape for shard in gathered["kernel"].addressable_shards} == {(256, 128)}
    assert {shard.data.shape for shard in gathered["codebook"].addressable_shards} == {(256, 64)}
    np.testing.assert_array_equal(gathered["kernel"], stored["kernel"].astype(jnp.bfloat16))
    np.testing.assert_array_equal(gathered["codebook"], stored["codebook"])
    gradient = jax.jit(placement.scatter)(gathered)
    assert all(leaf.dtype == jnp.float32 for leaf in gradient.values())
    assert all(gradient[name].sharding.is_equivalent_to(stored[name].sharding, 2) for name in stored)
    everywhere = placement.everywhere(stored)
    assert everywhere["kernel"].sharding.is_fully_replicated
    np.testing.assert_array_equal(everywhere["kernel"], stored["kernel"])


@pytest.mark.parametrize(
    ("names", "shape", "words"),
    [
        (("codes", "code_dim"), (63, 8), "codebook of 63 codes does not divide"),
        (("codes", "codes"), (64, 64), "two dimensions fall on"),
        (("code",), (64,), "has no sharding rule"),
    ],
)
def test_a_spec_that_cannot_be_is_refused(names, shape, words):
    with pytest.raises(UsageError, match=words):
        partition_spec(names, shape, make_mesh({"data": 4, "codebook": 2}))


def test_parameters_are_born_where_they_belong():
    mesh = make_mesh({"data": 2, "codebook": 4})

    def create(seed):
        key = jax.random.key(seed)
        rows = nn.LogicallyPartitioned(jax.random.normal(key, (16, 4)), ("codes", "code_dim"))
        return {"codebook": rows, "step": jnp.zeros(())}

    shapes, shardings = abstract_state(create, mesh, 0)
    state = create_sharded(create, mesh, 0)
    assert shapes["codebook"].sharding == shardings["codebook"] == state["codebook"].sharding
    assert state["codebook"].addressable_shards[0].data.shape == (4, 4)
    np.testing.assert_array_equal(state["codebook"], create(0)["codebook"].value)


def test_a_batch_lies_on_every_axis_in_order():
    mesh = make_mesh({"data": 2, "fsdp": 2, "codebook": 2})
    rows = np.arange(16)[:, None]
    batch = global_batch({"x": rows}, mesh)["x"]
    assert batch.sharding.spec == PartitionSpec(AXES)
    assert {shard.data.shape for shard in batch.addressable_shards} == {(2, 1)}
    np.testing.assert_array_equal(batch, rows)


@pytest.mark.parametrize("hosts", [[0, 0, 0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 0, 0], [0, 1, 1, 0, 0, 1, 1, 0]])
def test_a_process_reads_the_rows_that_lie_on_its_devices(hosts, monkeypatch):
    devices = np.array([SimpleNamespace(process_index=host) for host in hosts]).reshape(2, 1, 4)
    mesh, batch = SimpleNamespace(devices=devices, size=8), np.arange(24)
    for host in (0, 1):
        monkeypatch.setattr(jax, "process_index", lambda host=host: host)
        on_devices = [rows for place, rows in zip(hosts, np.split(batch, 8), strict=True) if place == host]
        np.testing.assert_array_equal(process_rows(mesh, 24), np.concatenate(on_devices))


def test_a_batch_that_does_not_divide_is_refused_with_a_number_that_does():
    with pytest.raises(UsageError, match=r"data\.batch_size=12 does not divide over 8 devices; use a multiple of 8"):
        check_batch(12, make_mesh({"data": 8}), 1, "data.batch_size")
