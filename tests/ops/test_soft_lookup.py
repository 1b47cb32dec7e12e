"""The differentiable index: values of another width than the keys, against PyTorch's autograd and the dense form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from support.compiled_text import largest_array
from support.meshes import MESHES

from ibq_jax.base.errors import UsageError
from ibq_jax.base.sharding import AXES, CODEBOOK, make_mesh
from ibq_jax.ops import index_backprop, soft_lookup

TOLERANCE = 1e-5  # relative to the largest magnitude, between two forms of the same float32 formula
BFLOAT16 = 2**-7  # two roundings to 8 bits: the logits' gradient before its products, and the result
TOKENS, CODES, WIDTH, VALUE_WIDTH = 192, 96, 16, 24


def assert_close(actual, expected, tolerance=TOLERANCE):
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * np.abs(expected).max())


@functools.cache
def inputs(dtype=jnp.float32):
    """Returns z, keys, values and a cotangent for the looked-up values."""
    keys = jax.random.split(jax.random.key(3), 4)
    shapes = (TOKENS, WIDTH), (CODES, WIDTH), (CODES, VALUE_WIDTH), (TOKENS, VALUE_WIDTH)
    z, table, values, cotangent = (jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))
    return *(array.astype(dtype) for array in (z * 0.5, table, values)), cotangent


def entropies_share(out, cotangent):
    return jnp.abs(cotangent).sum() * (0.3 * out.sample_entropy - 0.7 * out.batch_entropy)


def outputs_and_gradients(arrays, cotangent, **arguments):
    def loss(z, keys, values):
        out = soft_lookup(z, keys, values, **arguments)
        return (out.value * cotangent).sum() + entropies_share(out, cotangent), out

    gradients, out = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*arrays)
    return out, gradients


def assert_same(actual, expected, gradients_within=TOLERANCE):
    np.testing.assert_array_equal(actual[0].indices, expected[0].indices)
    for name in actual[0]._fields:
        assert_close(getattr(actual[0], name), getattr(expected[0], name))
    for gradient, expected_gradient in zip(actual[1], expected[1], strict=True):
        assert gradient.dtype == expected_gradient.dtype
        assert_close(gradient, expected_gradient, gradients_within)


def in_pytorch(z, keys, values, cotangent, temperature, l2_normalize):
    """The lookup and its three gradients as one would write them down in PyTorch, in float64."""
    z, keys, values = (torch.tensor(np.asarray(array, np.float64), requires_grad=True) for array in (z, keys, values))
    unit = functools.partial(torch.nn.functional.normalize, dim=1) if l2_normalize else lambda vectors: vectors
    p = torch.softmax(unit(z) @ unit(keys).T / temperature, dim=1)
    indices = p.argmax(dim=1)
    hard = torch.nn.functional.one_hot(indices, len(keys)).to(p.dtype)
    value = (hard + p - p.detach()) @ values
    (value * torch.tensor(np.asarray(cotangent, np.float64))).sum().backward()
    return indices.numpy(), value.detach().numpy(), [array.grad.numpy() for array in (z, keys, values)]


@pytest.mark.parametrize("implementation", ["dense", "streamed"])
@pytest.mark.parametrize(("temperature", "l2_normalize"), [(1.0, False), (0.1, True)])
def test_pytorch(temperature, l2_normalize, implementation):
    *arrays, cotangent = inputs()
    indices, value, expected = in_pytorch(*arrays, cotangent, temperature, l2_normalize)
    arguments = {"temperature": temperature, "l2_normalize": l2_normalize, "implementation": implementation}

    def loss(*arrays):
        out = soft_lookup(*arrays, block_size=12, **arguments)
        return (out.value * cotangent).sum(), out

    gradients, out = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(*arrays)
    np.testing.assert_array_equal(out.indices, indices)
    np.testing.assert_array_equal(out.value, arrays[2][indices])
    assert_close(out.value, value)
    for gradient, array in zip(gradients, expected, strict=True):
        assert_close(gradient, array)
    assert len(np.unique(indices)) < CODES and np.abs(gradients[1]).max(axis=1).min() > 0  # every key learns
    assert set(np.flatnonzero(np.abs(gradients[2]).max(axis=1))) == set(indices)  # values: the chosen ones


@functools.cache
def dense(group, dtype=jnp.float32):
    *arrays, cotangent = inputs(dtype)
    arguments = {"entropy_temperature": 0.2, "entropy_group_tokens": group}
    return outputs_and_gradients(arrays, cotangent, implementation="dense", **arguments)


@pytest.mark.parametrize("group", [0, 8])
@pytest.mark.parametrize("block_size", [0, 1, 24])
def test_streamed_equals_dense(block_size, group):
    *arrays, cotangent = inputs()
    arguments = {"entropy_temperature": 0.2, "entropy_group_tokens": group}
    assert_same(outputs_and_gradients(arrays, cotangent, block_size=block_size, **arguments), dense(group))


@pytest.mark.parametrize("sizes", MESHES)
def test_mesh_equals_one_device(sizes):
    mesh = make_mesh(dict(zip(AXES, sizes, strict=True)))
    *arrays, cotangent = inputs()
    specs = P(AXES), P(CODEBOOK), P(CODEBOOK)
    arrays = [jax.device_put(array, NamedSharding(mesh, spec)) for array, spec in zip(arrays, specs, strict=True)]
    arguments = {"entropy_temperature": 0.2, "entropy_group_tokens": 64, "block_size": 6, "mesh": mesh}
    assert_same(outputs_and_gradients(arrays, cotangent, **arguments), dense(64))


def test_bfloat16():
    """Values of their own type: bfloat16 products are exact in float32, and gradients have the inputs' types."""
    *arrays, cotangent = inputs(jnp.bfloat16)
    streamed = outputs_and_gradients(arrays, cotangent, entropy_temperature=0.2, block_size=24)
    assert_same(streamed, dense(0, jnp.bfloat16), BFLOAT16)
    z, keys, values, _ = inputs()
    mixed = z, keys, values.astype(jnp.bfloat16)
    expected = outputs_and_gradients(mixed, cotangent, entropy_temperature=0.2, implementation="dense")
    assert_same(outputs_and_gradients(mixed, cotangent, entropy_temperature=0.2), expected, BFLOAT16)


def test_values_that_are_the_keys_give_index_backprop():
    z, keys, _, _ = inputs()
    cotangent = jax.random.normal(jax.random.key(4), z.shape)
    out, (dz, dkeys, dvalues) = outputs_and_gradients((z, keys, keys), cotangent, block_size=24)

    def loss(z, codebook):
        out = index_backprop(z, codebook, block_size=24)
        return (out.z_q * cotangent).sum() + entropies_share(out, cotangent), out

    expected, quantized = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(z, keys)
    for actual, wanted in zip((*out, dz, dkeys + dvalues), (*quantized, *expected), strict=True):
        assert_close(actual, wanted)


def test_ties_take_the_smallest_code():
    """Integers make logits exact, and the keys hold the same 8 rows twelve times."""
    z = jax.random.randint(jax.random.key(0), (64, 8), -3, 4).astype(jnp.float32)
    keys = jnp.tile(jax.random.randint(jax.random.key(1), (8, 8), -3, 4).astype(jnp.float32), (12, 1))
    expected = np.argmax(np.asarray(z) @ np.asarray(keys).T, axis=1)
    out = soft_lookup(z, keys, jnp.arange(96.0)[:, None], mesh=make_mesh({CODEBOOK: 8}))
    np.testing.assert_array_equal(out.indices, expected)
    np.testing.assert_array_equal(out.value[:, 0], expected)


def step_of_shapes(tokens, codes, width, value_width, **arguments):
    shapes = (tokens, width), (codes, width), (codes, value_width)
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]

    def loss(cotangent, z, keys, values):
        out = soft_lookup(z, keys, values, **arguments)
        return (out.value * cotangent).sum() + out.sample_entropy - out.batch_entropy

    cotangent = jax.ShapeDtypeStruct((tokens, value_width), jnp.float32)
    return jax.jit(jax.grad(loss, argnums=(1, 2, 3))).lower(cotangent, *arrays).compile()


def test_temporaries_at_full_size():
    """Compiled only: 1,024 tokens and 131,072 codes, 256 and 1,024 wide, take at most 64 MiB; plain, over 2 GiB."""
    sizes = 1024, 131072, 256, 1024
    streamed, plain = step_of_shapes(*sizes), step_of_shapes(*sizes, implementation="dense")
    assert streamed.memory_analysis().temp_size_in_bytes <= 64 * 2**20
    assert plain.memory_analysis().temp_size_in_bytes > 2 * 2**30
    assert largest_array(streamed.as_text()) == 131072 * 1024  # the values


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            jnp.ones((CODES + 1, 4)),
            r"expected values \[K, W\] for keys \[K, D\].*float32 \(97, 4\) for keys \(96, 16\)",
        ),
        (jnp.ones((CODES, 4), jnp.int32), "expected values .* float32 or bfloat16; got int32"),
        (jnp.ones((CODES, 0)), "expected values"),
    ],
)
def test_bad_values(values, message):
    z, keys, _, _ = inputs()
    with pytest.raises(ValueError, match=message):
        soft_lookup(z, keys, values)


def test_bad_temperature():
    *arrays, _ = inputs()
    with pytest.raises(UsageError, match=r"^temperature=0.0 must be positive"):
        soft_lookup(*arrays, temperature=0.0)
