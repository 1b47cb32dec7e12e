"""Lookup of rows in a split table, and its gradient, against plain indexing."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ibq_jax.base.errors import UsageError
from ibq_jax.base.sharding import AXES, CODEBOOK, make_mesh
from ibq_jax.ops import embedding_lookup
from ibq_jax.plan.hlo import Module

MESHES = [sizes for sizes in itertools.product((1, 2, 4, 8), repeat=3) if math.prod(sizes) == 8]


def rows_and_gradient(table, indices, cotangent, mesh=None):
    rows, pull = jax.vjp(functools.partial(embedding_lookup, indices=indices, mesh=mesh), table)
    return rows, *pull(cotangent)


def random_inputs(batch, length, vocabulary, width):
    """Returns a table, indices with repetitions and both ends of every device's rows, and a cotangent."""
    keys = jax.random.split(jax.random.key(0), 3)
    indices = jax.random.randint(keys[0], (batch, length), 0, vocabulary)
    borders = [border for first in range(0, vocabulary, 12) for border in (first, first + 11)]
    indices = indices.at[0, : len(borders)].set(jnp.array(borders))
    cotangent = jax.random.normal(keys[1], (batch, length, width))
    return jax.random.normal(keys[2], (vocabulary, width)), indices, cotangent


@pytest.mark.parametrize("sizes", [None, *MESHES])
def test_rows_and_gradient(sizes):
    """One device, and all factorisations of eight."""
    table, indices, cotangent = random_inputs(16, 20, 96, 8)
    expected = np.zeros_like(table)
    np.add.at(expected, np.asarray(indices), np.asarray(cotangent))
    mesh = sizes and make_mesh(dict(zip(AXES, sizes, strict=True)))
    if mesh:
        table = jax.device_put(table, NamedSharding(mesh, P(CODEBOOK)))
        indices = jax.device_put(indices, NamedSharding(mesh, P(AXES)))
    rows, gradient = jax.jit(functools.partial(rows_and_gradient, mesh=mesh))(table, indices, cotangent)
    np.testing.assert_array_equal(rows, np.asarray(table)[np.asarray(indices)])
    np.testing.assert_allclose(gradient, expected, rtol=0, atol=1e-5)
    if mesh:
        assert rows.sharding.is_equivalent_to(indices.sharding, 3)
        assert gradient.sharding.is_equivalent_to(table.sharding, 2)


@pytest.mark.parametrize("mesh_sizes", [None, {"data": 2, CODEBOOK: 4}])
def test_indices_out_of_range_give_the_nearest_row(mesh_sizes):
    table, indices, _ = random_inputs(8, 16, 96, 8)
    indices = indices.at[:, 0].set(-1).at[:, 1].set(96)
    rows = embedding_lookup(table, indices, mesh=mesh_sizes and make_mesh(mesh_sizes))
    np.testing.assert_array_equal(rows, np.asarray(table)[np.clip(indices, 0, 95)])


@pytest.mark.parametrize("mesh_sizes", [None, {"data": 2, CODEBOOK: 4}])
def test_bfloat16_rows_are_exact(mesh_sizes):
    table, indices, _ = random_inputs(8, 16, 96, 8)
    table = table.astype(jnp.bfloat16)
    rows = embedding_lookup(table, indices, mesh=mesh_sizes and make_mesh(mesh_sizes))
    assert rows.dtype == jnp.bfloat16
    np.testing.assert_array_equal(rows, table[indices])


def largest_array(mesh, vocabulary, width):
    """Returns the number of elements of the largest array in the compiled program of rows and gradient."""
    shapes = [
        jax.ShapeDtypeStruct((vocabulary, width), jnp.float32, sharding=NamedSharding(mesh, P(CODEBOOK))),
        jax.ShapeDtypeStruct((8, 4), jnp.int32, sharding=NamedSharding(mesh, P(AXES))),
        jax.ShapeDtypeStruct((8, 4, width), jnp.float32, sharding=NamedSharding(mesh, P(AXES))),
    ]
    step = jax.jit(functools.partial(rows_and_gradient, mesh=mesh)).lower(*shapes).compile()
    computations = Module(step.as_text()).computations.values()
    return max(math.prod(a.shape) for c in computations for i in c.instructions.values() for a in i.arrays)


def test_mesh_never_gathers_the_table():
    vocabulary, width = 4096, 16
    assert largest_array(make_mesh({"data": 2, CODEBOOK: 4}), vocabulary, width) == vocabulary * width // 4
    assert largest_array(make_mesh({"data": 8}), vocabulary, width) == vocabulary * width  # the table is not split


@pytest.mark.parametrize(
    ("batch", "vocabulary", "message"),
    [
        (12, 96, "12 sequences do not divide over the 8 devices"),
        (8, 90, "a table of 90 rows does not divide over mesh axis codebook=4"),
    ],
)
def test_sizes_that_a_mesh_does_not_divide(batch, vocabulary, message):
    with pytest.raises(UsageError, match=message):
        table, indices = jnp.ones((vocabulary, 8)), jnp.zeros((batch, 4), jnp.int32)
        embedding_lookup(table, indices, mesh=make_mesh({"data": 2, CODEBOOK: 4}))


@pytest.mark.parametrize(
    ("table", "indices"),
    [
        (jnp.ones((16, 8)), jnp.zeros(4, jnp.int32)),
        (jnp.ones(16), jnp.zeros((4, 4), jnp.int32)),
        (jnp.ones((16, 8)), jnp.zeros((4, 4))),
        (jnp.ones((16, 8), jnp.int32), jnp.zeros((4, 4), jnp.int32)),
        (jnp.ones((16, 8)), jnp.zeros((0, 4), jnp.int32)),
    ],
)
def test_bad_arrays(table, indices):
    with pytest.raises(ValueError, match="expected"):
        embedding_lookup(table, indices)
