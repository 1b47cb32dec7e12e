"""The streamed cross entropy, per token and weighted, against the dense form differentiated by JAX and PyTorch's."""

import functools
import math
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from support.meshes import MESHES

from ibq_jax.base.errors import UsageError
from ibq_jax.base.sharding import AXES, CODEBOOK, make_mesh
from ibq_jax.ops import cross_entropy, weighted_cross_entropy
from ibq_jax.plan.hlo import Module

EXACT = 1e-5  # relative to the largest magnitude, between two forms of the same float32 formula
MANY = 1224  # tokens: 3 chunks of 408 on one device


def assert_close(actual, expected, tolerance=EXACT):
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def assert_same(actual, expected, tolerance=EXACT):
    for left, right in zip(actual, expected, strict=True):
        assert_close(left, right, tolerance)


def random_inputs(tokens, width, vocabulary, scale=1.0):
    """Returns x, head, targets, and the cotangents of the losses."""
    keys = jax.random.split(jax.random.key(0), 4)
    x, head = jax.random.normal(keys[0], (tokens, width)), jax.random.normal(keys[1], (vocabulary, width))
    targets = jax.random.randint(keys[2], (tokens,), 0, vocabulary)
    return x * scale, head, targets, jax.random.normal(keys[3], (tokens,))


def per_token(x, head, targets, g, **arguments):
    """Returns the losses and the gradients of x and head."""
    losses, pull = jax.vjp(lambda x, head: cross_entropy(x, head, targets, **arguments), x, head)
    return losses, *pull(g)


def weighted(x, head, targets, g, **arguments):
    """Returns the same as `per_token`, computed as derivatives of the weighted sum."""
    total = functools.partial(weighted_cross_entropy, **arguments)
    dx, dhead, losses = jax.grad(total, argnums=(0, 1, 3))(x, head, targets, g)
    return losses, dx, dhead


def compiled(form, **arguments):
    return jax.jit(functools.partial(form, **arguments))


@functools.cache
def dense(tokens, width, vocabulary, scale=1.0):
    return compiled(per_token, implementation="dense")(*random_inputs(tokens, width, vocabulary, scale))


@pytest.mark.parametrize("form", [per_token, weighted])
@pytest.mark.parametrize(("vocabulary", "block_size"), [(96, 0), (96, 1), (96, 24), (97, 0), (97, 40)])
def test_streamed_equals_dense(form, vocabulary, block_size):
    """97 is prime; blocks of 40 leave a smaller one at the end."""
    inputs = random_inputs(48, 16, vocabulary)
    assert_same(compiled(form, block_size=block_size)(*inputs), dense(48, 16, vocabulary))


@pytest.mark.parametrize("form", [per_token, weighted])
@pytest.mark.parametrize("tokens", [1, 513])
def test_tokens_taken_in_chunks(form, tokens):
    """513 tokens are two chunks of 257, and the second one is padded."""
    assert_same(compiled(form, block_size=40)(*random_inputs(tokens, 16, 96)), dense(tokens, 16, 96))


@pytest.mark.parametrize("form", [per_token, weighted])
def test_larger_chunks_and_blocks_of_gpus(form, monkeypatch):
    inputs = random_inputs(MANY, 16, 600)  # 3 chunks and 2 blocks on a CPU, one of each on a GPU
    expected = compiled(form)(*inputs)
    monkeypatch.setattr(sys.modules["ibq_jax.ops.cross_entropy"], "platform", lambda mesh: "gpu")
    program = compiled(form).lower(*inputs).compile()
    trips = re.findall(r'"known_trip_count":{"n":"(\d+)"', program.as_text())
    assert set(trips) <= {str(MANY)}  # no loop but that over the rows of dhead that targets are subtracted from
    assert_same(program(*inputs), expected)


def test_the_sum_is_that_of_the_losses():
    x, head, targets, g = random_inputs(48, 16, 96)
    expected = (cross_entropy(x, head, targets, implementation="dense") * g).sum()
    for implementation in ("dense", "streamed"):
        assert_close(weighted_cross_entropy(x, head, targets, g, implementation=implementation), expected)


def test_the_sum_may_be_scaled():
    x, head, targets, g = random_inputs(48, 16, 96)

    def loss(x, head, weights):
        return weighted_cross_entropy(x, head, targets, weights) ** 2

    total, expected = weighted_cross_entropy(x, head, targets, g), weighted(x, head, targets, g)
    dx, dhead, dweights = jax.grad(loss, argnums=(0, 1, 2))(x, head, g)
    assert_same((dweights, dx, dhead), [2 * total * array for array in expected])


@pytest.mark.parametrize("form", [per_token, weighted])
def test_targets_at_the_borders_of_blocks(form):
    x, head, _, g = random_inputs(48, 16, 96)
    targets = jnp.tile(jnp.array([0, 23, 24, 47, 48, 95]), 8)
    expected = per_token(x, head, targets, g, implementation="dense")
    assert_same(compiled(form, block_size=24)(x, head, targets, g), expected)
    assert_same(compiled(form, block_size=10, mesh=make_mesh({CODEBOOK: 4, "data": 2}))(x, head, targets, g), expected)


@pytest.mark.parametrize("form", [per_token, weighted])
@pytest.mark.parametrize("scale", [30.0, 1e4])
def test_large_logits(form, scale):
    """Logits of hundreds and of 100,000, far past the range of exp."""
    inputs = random_inputs(48, 16, 96, scale)
    actual = compiled(form, block_size=12)(*inputs)
    assert all(jnp.isfinite(array).all() for array in actual)
    assert_same(actual, dense(48, 16, 96, scale))


@pytest.mark.parametrize("form", [per_token, weighted])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_confident_tokens_have_no_gradient_left(form, dtype):
    """If the target has p = 1, rounding must not leave a gradient either."""
    x, head, _, g = random_inputs(48, 16, 96, scale=1e4)
    x, head = x.astype(dtype), head.astype(dtype)
    most_likely = jnp.argmax(x.astype(jnp.float32) @ head.astype(jnp.float32).T, axis=1)
    losses, dx, dhead = compiled(form, block_size=12)(x, head, most_likely, g)
    assert np.abs(losses).max() < 1e-6 * 1e5  # of the logits, two products of the same numbers
    assert not dx.any()
    assert np.abs(dhead).max() < 1e-6 * np.abs(g[:, None] * x).max()  # where tokens share a target


@pytest.mark.parametrize("form", [per_token, weighted])
def test_bfloat16_inputs(form):
    x, head, targets, g = random_inputs(48, 16, 96, scale=0.3)
    x, head = x.astype(jnp.bfloat16), head.astype(jnp.bfloat16)
    losses, *gradients = compiled(form, block_size=24)(x, head, targets, g)
    expected, *expected_gradients = per_token(
        x.astype(jnp.float32), head.astype(jnp.float32), targets, g, implementation="dense"
    )
    assert losses.dtype == jnp.float32
    assert_close(losses, expected)  # products of bfloat16 numbers are exact in float32
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        assert gradient.dtype == jnp.bfloat16
        assert_close(gradient, expected_gradient, 2**-7)  # two roundings to 8 bits: of a product's operands, the result


def test_gradients_have_the_types_of_the_inputs():
    x, head, targets, g = random_inputs(48, 16, 96)
    _, dx, dhead = per_token(x, head.astype(jnp.bfloat16), targets, g)
    assert (dx.dtype, dhead.dtype) == (jnp.float32, jnp.bfloat16)


@pytest.mark.parametrize("form", [per_token, weighted])
@pytest.mark.parametrize("sizes", MESHES)
def test_mesh_equals_one_device(sizes, form):
    """A device holds 12 to 96 of the 96 rows, and up to 3 chunks of tokens."""
    mesh = make_mesh(dict(zip(AXES, sizes, strict=True)))
    x, head, targets, g = random_inputs(MANY, 16, 96)
    x, targets = (jax.device_put(array, NamedSharding(mesh, P(AXES))) for array in (x, targets))
    head = jax.device_put(head, NamedSharding(mesh, P(CODEBOOK)))
    losses, dx, dhead = compiled(form, block_size=12, mesh=mesh)(x, head, targets, g)
    assert_same((losses, dx, dhead), dense(MANY, 16, 96))
    assert dx.sharding.is_equivalent_to(x.sharding, 2) and dhead.sharding.is_equivalent_to(head.sharding, 2)


@pytest.mark.parametrize("form", [per_token, weighted])
def test_bfloat16_on_a_mesh_equals_one_device(form):
    x, head, targets, g = random_inputs(MANY, 16, 96, scale=0.3)
    x, head = x.astype(jnp.bfloat16), head.astype(jnp.bfloat16)
    single, *gradients = compiled(form)(x, head, targets, g)
    split, *split_gradients = compiled(form, mesh=make_mesh({"fsdp": 2, CODEBOOK: 4}))(x, head, targets, g)
    assert_close(split, single)
    assert_same(split_gradients, gradients, 2**-7)


@pytest.mark.parametrize("form", [per_token, weighted])
def test_as_pytorch_has_it(form):
    torch = pytest.importorskip("torch")
    inputs = random_inputs(48, 16, 96)
    x, head, targets, g = (torch.from_numpy(np.array(array)) for array in inputs)
    x.requires_grad_(), head.requires_grad_()
    losses = torch.nn.functional.cross_entropy(x @ head.T, targets.long(), reduction="none")
    (losses * g).sum().backward()
    assert_same(compiled(form)(*inputs), (losses.detach(), x.grad, head.grad))


def arrays_of(form, tokens, width, vocabulary, mesh=None, **arguments):
    """Returns the sizes of all arrays in the compiled program of losses and gradients."""
    specs = [((tokens, width), AXES), ((vocabulary, width), CODEBOOK), ((tokens,), AXES), ((tokens,), AXES)]
    dtypes = jnp.float32, jnp.float32, jnp.int32, jnp.float32
    shapes = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=mesh and NamedSharding(mesh, P(axes)))
        for (shape, axes), dtype in zip(specs, dtypes, strict=True)
    ]
    program = compiled(form, mesh=mesh, **arguments).lower(*shapes).compile().as_text()
    computations = Module(program).computations.values()
    return {math.prod(a.shape) for c in computations for i in c.instructions.values() for a in i.arrays}


def test_no_array_of_tokens_by_vocabulary():
    tokens, width, vocabulary = 1024, 16, 8192
    assert max(arrays_of(per_token, tokens, width, vocabulary, implementation="dense")) == tokens * vocabulary
    assert max(arrays_of(per_token, tokens, width, vocabulary, block_size=256)) == 512 * 256  # = vocabulary * width
    assert max(arrays_of(weighted, tokens, width, vocabulary, block_size=256)) == 512 * vocabulary


@pytest.mark.parametrize("form", [per_token, weighted])
def test_mesh_never_gathers_the_head(form):
    tokens, width, vocabulary = 64, 64, 4096
    mesh = make_mesh({"data": 2, CODEBOOK: 4})
    split = arrays_of(form, tokens, width, vocabulary, mesh, block_size=64)
    assert max(split) == vocabulary // 4 * width
    whole = arrays_of(form, tokens, width, vocabulary, make_mesh({"data": 8}), block_size=64)
    assert max(whole) == vocabulary * width  # the same search, with a head that is not split


@pytest.mark.parametrize(("form", "share"), [(per_token, 50), (weighted, 10)])
def test_temporaries_at_full_size(form, share):
    """Compiled only: at most this share of the two arrays [tokens, vocabulary] of the dense form."""
    tokens, width, vocabulary = 2048, 1024, 2**18
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((tokens, width), (vocabulary, width), (tokens,))]
    step = compiled(form).lower(*shapes[:2], jax.ShapeDtypeStruct((tokens,), jnp.int32), shapes[2]).compile()
    assert step.memory_analysis().temp_size_in_bytes < 2 * 4 * tokens * vocabulary / share


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"block_size": -1}, "block_size=-1 must not be negative"),
        ({"implementation": "sparse"}, "implementation='sparse' does not exist; it is 'streamed' or 'dense'"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    x, head, targets, g = random_inputs(48, 16, 96)
    with pytest.raises(UsageError, match=message):
        cross_entropy(x, head, targets, **arguments)
    with pytest.raises(UsageError, match=message):
        weighted_cross_entropy(x, head, targets, g, **arguments)


@pytest.mark.parametrize(
    ("tokens", "vocabulary", "message"),
    [
        (44, 96, "44 tokens do not divide over the 8 devices"),
        (48, 90, "a vocabulary of 90 rows does not divide over mesh axis codebook=4"),
    ],
)
def test_sizes_that_a_mesh_does_not_divide(tokens, vocabulary, message):
    x, head, targets, _ = random_inputs(tokens, 16, vocabulary)
    with pytest.raises(UsageError, match=message):
        cross_entropy(x, head, targets, mesh=make_mesh({"data": 2, CODEBOOK: 4}))


@pytest.mark.parametrize(
    ("x", "head", "targets"),
    [
        (jnp.ones((2, 4, 8)), jnp.ones((16, 8)), jnp.zeros(2, jnp.int32)),
        (jnp.ones((4, 8)), jnp.ones((16, 9)), jnp.zeros(4, jnp.int32)),
        (jnp.ones((0, 8)), jnp.ones((16, 8)), jnp.zeros(0, jnp.int32)),
        (jnp.ones((4, 8), jnp.float16), jnp.ones((16, 8)), jnp.zeros(4, jnp.int32)),
        (jnp.ones((4, 8)), jnp.ones((16, 8)), jnp.zeros(5, jnp.int32)),
        (jnp.ones((4, 8)), jnp.ones((16, 8)), jnp.zeros(4)),
    ],
)
def test_bad_arrays(x, head, targets):
    with pytest.raises(ValueError, match="expected"):
        cross_entropy(x, head, targets)


def test_weights_are_one_per_token():
    with pytest.raises(ValueError, match="expected weights"):
        weighted_cross_entropy(*random_inputs(48, 16, 96)[:3], jnp.ones(()))
