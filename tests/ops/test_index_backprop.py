"""The quantizer against the released code's numbers, and its streamed form against the dense one.

`golden/quantizer*.npz` were printed by the released PyTorch code (arXiv 2412.02692); arrays there are NCHW.
"""

import functools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from support.compiled_text import largest_array
from support.meshes import MESHES

from ibq_jax.base.errors import UsageError
from ibq_jax.base.sharding import AXES, CODEBOOK, make_mesh
from ibq_jax.ops import block_scan, index_backprop, nearest_codes, streamed
from ibq_jax.ops.block_scan import chunk_tokens

GOLDEN = Path(__file__).parents[1] / "golden"
TOLERANCE = 1e-4  # relative to the largest magnitude of the released code's array
EXACT = 1e-5  # likewise, between two forms of the same float32 formula


def assert_close(actual, expected, tolerance=EXACT):
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def random_inputs(tokens, width, codes, scale=1.0):
    """Returns z, a codebook, and a cotangent for z_q."""
    keys = jax.random.split(jax.random.key(0), 3)
    z, cotangent = jax.random.normal(keys[0], (tokens, width)), jax.random.normal(keys[1], (tokens, width))
    return z * scale, jax.random.normal(keys[2], (codes, width)), cotangent


def value_and_gradients(cotangent, **arguments):
    """Returns a function (z, codebook) -> (outputs, gradients) that uses every differentiable output."""

    def loss(z, codebook):
        out = index_backprop(z, codebook, **arguments)
        scale = jnp.abs(cotangent).sum()  # so that the entropies' share of the gradients is as large as that of z_q
        return (out.z_q * cotangent).sum() + scale * (0.3 * out.sample_entropy - 0.7 * out.batch_entropy), out

    def run(z, codebook):
        gradients, out = jax.grad(loss, argnums=(0, 1), has_aux=True)(z, codebook)
        return out, gradients

    return jax.jit(run)


def assert_same(actual, expected, tolerance=EXACT):
    (out, gradients), (expected_out, expected_gradients) = actual, expected
    np.testing.assert_array_equal(out.indices, expected_out.indices)
    for name in out._fields:
        assert_close(getattr(out, name), getattr(expected_out, name), tolerance)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        assert_close(gradient, expected_gradient, tolerance)


@pytest.mark.parametrize("implementation", ["dense", "streamed"])
@pytest.mark.parametrize("name", ["quantizer", "quantizer_flat"])
def test_released_code(name, implementation):
    golden = np.load(GOLDEN / f"{name}.npz")
    codebook = jnp.asarray(golden["codebook"])
    z, upstream = (
        jnp.asarray(golden[key].transpose(0, 2, 3, 1).reshape(-1, codebook.shape[1])) for key in ("z", "upstream")
    )

    def loss(z, codebook):
        out = index_backprop(
            z,
            codebook,
            entropy_temperature=float(golden["entropy_temperature"]),
            block_size=16,
            implementation=implementation,
        )
        code, stop = codebook[out.indices], jax.lax.stop_gradient
        quant_loss = ((out.z_q - z) ** 2 + (stop(code) - z) ** 2 + golden["beta"] * (code - stop(z)) ** 2).mean()
        entropy_loss = out.sample_entropy - out.batch_entropy
        total = (out.z_q * upstream).sum() + quant_loss + golden["entropy_weight"] * entropy_loss
        return total, (out, {"quant_loss": quant_loss, "entropy_loss": entropy_loss})

    (total, (out, losses)), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(z, codebook)
    np.testing.assert_array_equal(out.indices, golden["indices"])
    losses |= {"loss": total, "sample_entropy": out.sample_entropy, "avg_entropy": out.avg_entropy}
    for key, value in losses.items():
        assert_close(value, golden[key], TOLERANCE)
    for key, value in {"z_q": out.z_q, "grad_z": gradients[0]}.items():
        assert_close(value, golden[key].transpose(0, 2, 3, 1).reshape(z.shape), TOLERANCE)
    assert_close(gradients[1], golden["grad_codebook"], TOLERANCE)


@pytest.mark.parametrize("temperature", [0.01, 1.0])
@pytest.mark.parametrize("group", [0, 1, 12])
def test_streamed_equals_dense(temperature, group):
    z, codebook, cotangent = random_inputs(48, 16, 96, scale=0.1)
    arguments = {"entropy_temperature": temperature, "entropy_group_tokens": group}
    dense = value_and_gradients(cotangent, implementation="dense", **arguments)(z, codebook)
    for block_size in (0, 1, 24):
        assert_same(value_and_gradients(cotangent, block_size=block_size, **arguments)(z, codebook), dense)


@pytest.mark.parametrize("implementation", ["dense", "streamed"])
def test_a_logit_temperature_divides_every_logit(implementation):
    z, codebook, cotangent = random_inputs(48, 16, 96, scale=0.1)
    run = functools.partial(value_and_gradients, cotangent, entropy_temperature=0.2, implementation=implementation)
    out, (of_z, of_codebook) = run(logit_temperature=0.25)(z, codebook)
    expected, (of_larger, expected_of_codebook) = run()(4 * z, codebook)
    assert_same((out, (of_z / 4, of_codebook)), (expected, (of_larger, expected_of_codebook)))
    with pytest.raises(UsageError, match=r"logit_temperature=0 must be positive"):
        index_backprop(z, codebook, logit_temperature=0)


def test_one_token():
    z, codebook, cotangent = random_inputs(1, 8, 32)
    dense = value_and_gradients(cotangent, entropy_temperature=0.5, implementation="dense")
    streamed = value_and_gradients(cotangent, entropy_temperature=0.5, block_size=8)
    assert_same(streamed(z, codebook), dense(z, codebook))


@pytest.mark.parametrize("implementation", ["dense", "streamed"])
def test_groups_are_consecutive_tokens(implementation):
    z, codebook, _ = random_inputs(48, 16, 96, scale=0.1)
    quantize = jax.jit(functools.partial(index_backprop, implementation=implementation))
    grouped = functools.partial(index_backprop, entropy_group_tokens=12, implementation=implementation)
    groups = [quantize(part, codebook).batch_entropy for part in jnp.split(z, 4)]
    assert_close(jax.jit(grouped)(z, codebook).batch_entropy, np.mean(groups))


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 1, 4)])
@pytest.mark.parametrize("group", [1024, 512, 2048])
def test_groups_taken_in_chunks(sizes, group):
    """8,192 tokens: a device holds 8 or 4 chunks of 1,024, in one group or two, or half as many of 2,048."""
    assert chunk_tokens(8192, group, None) == max(1024, group)
    z, codebook, cotangent = random_inputs(8192, 8, 48, scale=0.3)
    arguments = {"entropy_temperature": 0.2, "entropy_group_tokens": group}
    dense = value_and_gradients(cotangent, implementation="dense", **arguments)
    mesh = make_mesh(dict(zip(AXES, sizes, strict=True)), jax.devices()[: math.prod(sizes)])
    assert_same(value_and_gradients(cotangent, mesh=mesh, **arguments)(z, codebook), dense(z, codebook))


def test_chunks_are_whole_groups_or_everything():
    assert chunk_tokens(6144, 96, None) == 1536  # 64 groups of 96: 16 are the first divisor that makes 1,024
    assert chunk_tokens(96, 24, None) == 96
    assert chunk_tokens(96, 64, None) == 96


@pytest.mark.parametrize("implementation", ["dense", "streamed"])
def test_value_is_the_code_and_every_code_learns(implementation):
    z, codebook, cotangent = random_inputs(48, 16, 96, scale=0.1)
    out, (_, gradient) = value_and_gradients(cotangent, implementation=implementation)(z, codebook)
    np.testing.assert_array_equal(out.z_q, codebook[out.indices])
    assert len(np.unique(out.indices)) < 96
    assert np.all(np.abs(gradient).max(axis=1) > 0)


@pytest.mark.parametrize("implementation", ["dense", "streamed"])
def test_diagnostics(implementation):
    z, codebook, _ = random_inputs(48, 16, 96)
    logits = np.asarray(z, np.float64) @ np.asarray(codebook, np.float64).T
    logits = np.where(np.arange(96) < 48, logits, -np.abs(logits) * 3)  # the largest magnitude is negative
    z, codebook = jnp.asarray(logits, jnp.float32), jnp.eye(96)  # ... as these give just these logits
    out = index_backprop(z, codebook, block_size=24, implementation=implementation)
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    assert_close(out.max_probability, (1 / p.sum(axis=1)).mean())
    assert_close(out.max_logit, -logits.min())

    def diagnostics(z, codebook):
        out = index_backprop(z, codebook, implementation=implementation)
        return out.max_probability + out.max_logit

    for gradient in jax.grad(diagnostics, argnums=(0, 1))(z, codebook):
        assert not gradient.any()


def test_ties_take_the_smallest_code():
    """Integers make logits exact, and the codebook holds the same 8 codes twelve times."""
    z = jax.random.randint(jax.random.key(0), (64, 8), -3, 4).astype(jnp.float32)
    codebook = jnp.tile(jax.random.randint(jax.random.key(1), (8, 8), -3, 4).astype(jnp.float32), (12, 1))
    expected = np.argmax(np.asarray(z) @ np.asarray(codebook).T, axis=1)
    assert expected.max() < 8
    for arguments in ({"block_size": 1}, {"block_size": 16}, {"mesh": make_mesh({CODEBOOK: 8})}):
        out = jax.jit(functools.partial(index_backprop, **arguments))(z, codebook)
        np.testing.assert_array_equal(out.indices, expected)
        nearest = jax.jit(functools.partial(nearest_codes, **arguments))(z, codebook)
        np.testing.assert_array_equal(nearest, expected)


@pytest.mark.parametrize("reach", [11, 35])
def test_large_logits(reach):
    """Logits up to 968 and 9,800: far past float16 once divided by the temperature.

    Whole numbers make them exact. Codes come in pairs that differ only where z is zero: two winners with p = 1/2.
    """
    keys = jax.random.split(jax.random.key(0), 3)
    z = jax.random.randint(keys[0], (48, 16), -reach, reach + 1).at[0].set(reach).at[:, 8:].set(0)
    codebook = jax.random.randint(keys[1], (96, 16), -reach, reach + 1).at[0].set(reach)
    codebook = codebook.at[48:, :8].set(codebook[:48, :8])
    z, codebook, cotangent = z.astype(jnp.float32), codebook.astype(jnp.float32), jax.random.normal(keys[2], z.shape)
    dense = value_and_gradients(cotangent, implementation="dense")(z, codebook)
    streamed = value_and_gradients(cotangent, block_size=12)(z, codebook)
    assert streamed[0].max_logit == 8 * reach**2
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(streamed))
    assert_same(streamed, dense)


def test_saturated_tokens_keep_their_precision():
    """If p is 1 for one code and 0 for all others, dE consists of the winners' g alone."""
    z, codebook, cotangent = random_inputs(48, 16, 96, scale=1e4)
    gradient = jax.grad(lambda codebook: (index_backprop(z, codebook, block_size=12).z_q * cotangent).sum())(codebook)
    winners = nearest_codes(z, codebook)
    assert_close(gradient, jnp.zeros_like(codebook).at[winners].add(cotangent), 1e-6)


def test_bfloat16_inputs():
    z, codebook, cotangent = random_inputs(48, 16, 96, scale=0.1)
    z, codebook = z.astype(jnp.bfloat16), codebook.astype(jnp.bfloat16)
    dense, dense_gradients = value_and_gradients(cotangent, implementation="dense")(z, codebook)
    streamed, gradients = value_and_gradients(cotangent, block_size=24)(z, codebook)
    assert_same((streamed, ()), (dense, ()))  # products of bfloat16 numbers are exact in float32
    assert streamed.z_q.dtype == jnp.float32
    for gradient, expected in zip(gradients, dense_gradients, strict=True):
        assert gradient.dtype == jnp.bfloat16
        assert_close(gradient, expected, 2**-7)  # two roundings to 8 bits: dl before its products, and the result


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Traces what a GPU computes: more tokens at a time, and dl rounded to bfloat16 if its products may be."""
    for module in (block_scan, streamed):
        monkeypatch.setattr(module, "platform", lambda mesh: "gpu")


@pytest.mark.usefixtures("as_on_a_gpu")
def test_gradients_on_gpus_lose_no_more_than_bfloat16s_digits():
    z, codebook, cotangent = random_inputs(8192, 8, 48, scale=0.3)
    arguments = {"entropy_temperature": 0.2, "entropy_group_tokens": 1024}
    dense, dense_gradients = value_and_gradients(cotangent, implementation="dense", **arguments)(z, codebook)
    run = value_and_gradients(cotangent, gradient_precision="bfloat16", block_size=12, **arguments)
    streamed, gradients = run(z, codebook)
    assert_same((streamed, ()), (dense, ()))
    for gradient, expected in zip(gradients, dense_gradients, strict=True):
        assert np.abs(gradient - expected).max() > 0
        assert_close(gradient, expected, 2**-7)  # two roundings to 8 bits, of a product's operands, whose sums cancel


@pytest.mark.usefixtures("as_on_a_gpu")
def test_saturated_tokens_keep_their_precision_on_gpus():
    """Whatever dl was rounded to is what the winner's entry gives back."""
    z, codebook, cotangent = random_inputs(48, 16, 96, scale=1e4)

    def loss(codebook):
        return (index_backprop(z, codebook, block_size=12, gradient_precision="bfloat16").z_q * cotangent).sum()

    expected = jnp.zeros_like(codebook).at[nearest_codes(z, codebook)].add(cotangent)
    assert_close(jax.grad(loss)(codebook), expected, 1e-6)


@functools.cache
def dense_on_one_device(group):
    z, codebook, cotangent = random_inputs(192, 16, 96, scale=0.3)
    arguments = {"entropy_temperature": 0.2, "entropy_group_tokens": group}
    return value_and_gradients(cotangent, implementation="dense", **arguments)(z, codebook)


@pytest.mark.parametrize("group", [0, 8, 64])
@pytest.mark.parametrize("sizes", MESHES)
def test_mesh_equals_one_device(sizes, group):
    """192 tokens: a device holds 24, 48, 96 or all; groups are smaller, larger, or lie across the devices' borders."""
    mesh = make_mesh(dict(zip(AXES, sizes, strict=True)))
    z, codebook, cotangent = random_inputs(192, 16, 96, scale=0.3)
    z = jax.device_put(z, NamedSharding(mesh, P(AXES)))
    codebook = jax.device_put(codebook, NamedSharding(mesh, P(CODEBOOK)))
    arguments = {"entropy_temperature": 0.2, "entropy_group_tokens": group}
    streamed = value_and_gradients(cotangent, block_size=6, mesh=mesh, **arguments)(z, codebook)
    assert_same(streamed, dense_on_one_device(group))


@pytest.mark.parametrize("sizes", MESHES)
def test_bfloat16_on_a_mesh_equals_one_device(sizes):
    mesh = make_mesh(dict(zip(AXES, sizes, strict=True)))
    z, codebook, cotangent = random_inputs(192, 16, 96, scale=0.1)
    z, codebook = z.astype(jnp.bfloat16), codebook.astype(jnp.bfloat16)
    arguments = {"block_size": 6, "entropy_group_tokens": 64}
    single, gradients = value_and_gradients(cotangent, **arguments)(z, codebook)
    split, split_gradients = value_and_gradients(cotangent, mesh=mesh, **arguments)(z, codebook)
    assert_same((split, ()), (single, ()))
    for gradient, expected in zip(split_gradients, gradients, strict=True):
        assert gradient.dtype == jnp.bfloat16
        assert_close(gradient, expected, 2**-7)  # as in test_bfloat16_inputs


@pytest.mark.parametrize("sizes", MESHES)
def test_nearest_codes_on_a_mesh(sizes):
    mesh = make_mesh(dict(zip(AXES, sizes, strict=True)))
    z, codebook, _ = random_inputs(192, 16, 96)
    indices = jax.jit(functools.partial(nearest_codes, mesh=mesh))(z, codebook)
    np.testing.assert_array_equal(indices, np.argmax(np.asarray(z) @ np.asarray(codebook).T, axis=1))


def test_the_reductions_of_tpus_give_what_those_of_cpus_give(monkeypatch):
    """A TPU finds a block's first largest logit along with its sum, or by an argmax; with many ties."""
    z, codebook, cotangent = random_inputs(64, 8, 256)
    z, codebook = jnp.round(z), jnp.round(codebook)
    run = value_and_gradients(cotangent, entropy_temperature=0.5, block_size=32)
    expected, nearest = run(z, codebook), nearest_codes(z, codebook, block_size=32, precision="bfloat16_3x")
    chosen = []

    def as_on_tpus(*arguments, default, **branches):
        chosen.append(branches.get("tpu", default))
        return chosen[-1](*arguments)

    monkeypatch.setattr(jax.lax, "platform_dependent", as_on_tpus)
    assert_same(value_and_gradients(cotangent, entropy_temperature=0.5, block_size=32)(z, codebook), expected)
    found = nearest_codes(z, codebook, block_size=32, precision="bfloat16_3x")
    np.testing.assert_array_equal(found, nearest)
    assert {branch.__name__ for branch in chosen} == {"together", "by_argmax"}


def abstract_step(tokens, width, codes, **arguments):
    shapes = jax.ShapeDtypeStruct((tokens, width), jnp.float32), jax.ShapeDtypeStruct((codes, width), jnp.float32)
    return value_and_gradients(jnp.ones((tokens, width)), **arguments).lower(*shapes).compile()


def test_no_array_of_tokens_by_codes():
    tokens, width, codes = 256, 16, 8192
    assert largest_array(abstract_step(tokens, width, codes, implementation="dense").as_text()) == tokens * codes
    streamed = abstract_step(tokens, width, codes, block_size=256)
    assert largest_array(streamed.as_text()) == codes * width


@pytest.mark.parametrize("codes", [16384, 262144])
def test_temporaries_at_full_size(codes):
    """Compiled only: 1024 tokens of 256 dimensions keep within 64 MiB, whatever the codebook."""
    step = abstract_step(1024, 256, codes, entropy_group_tokens=256)
    assert step.memory_analysis().temp_size_in_bytes < 64 * 2**20


def test_mesh_never_gathers_the_codebook():
    mesh = make_mesh({"data": 2, CODEBOOK: 4})
    tokens, width, codes = 64, 16, 4096
    shapes = [
        jax.ShapeDtypeStruct((tokens, width), jnp.float32, sharding=NamedSharding(mesh, P(AXES))),
        jax.ShapeDtypeStruct((codes, width), jnp.float32, sharding=NamedSharding(mesh, P(CODEBOOK))),
    ]
    step = value_and_gradients(jnp.ones((tokens, width)), block_size=64, mesh=mesh)
    assert largest_array(step.lower(*shapes).compile().as_text()) == codes // 4 * width


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"entropy_group_tokens": 7}, r"entropy_group_tokens=7 does not divide the 48 tokens .* 6, 8 "),
        ({"block_size": 40}, r"block_size=40 does not divide the 96 codes .* 32, 48 "),
        ({"entropy_temperature": 0.0}, "entropy_temperature=0.0 must be positive"),
        ({"implementation": "sparse"}, "implementation='sparse' does not exist; it is 'streamed' or 'dense'"),
    ],
)
def test_bad_sizes_are_named(arguments, message):
    z, codebook, _ = random_inputs(48, 16, 96)
    with pytest.raises(UsageError, match=message):
        index_backprop(z, codebook, **arguments)


@pytest.mark.parametrize(
    ("tokens", "codes", "message"),
    [
        (44, 96, "44 tokens do not divide over the 8 devices"),
        (48, 90, "90 codes does not divide over mesh axis codebook=4"),
    ],
)
def test_sizes_that_a_mesh_does_not_divide(tokens, codes, message):
    z, codebook, _ = random_inputs(tokens, 16, codes)
    with pytest.raises(UsageError, match=message):
        nearest_codes(z, codebook, mesh=make_mesh({"data": 2, CODEBOOK: 4}))


@pytest.mark.parametrize(
    ("z", "codebook"),
    [
        (jnp.ones((2, 4, 8)), jnp.ones((16, 8))),
        (jnp.ones((4, 8)), jnp.ones((16, 9))),
        (jnp.ones((0, 8)), jnp.ones((16, 8))),
        (jnp.ones((4, 8), jnp.int32), jnp.ones((16, 8))),
        (jnp.ones((4, 8), jnp.float16), jnp.ones((16, 8))),
    ],
)
def test_bad_arrays(z, codebook):
    with pytest.raises(ValueError, match="expected"):
        index_backprop(z, codebook)
