"""IBQ's quantizer: losses and gradients against the released code, both meanings of beta, codes and back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from support import released

from ibq_jax.base.errors import UsageError
from ibq_jax.base.sharding import CODEBOOK, batch_sharding, make_mesh
from ibq_jax.tokenizer.quantizer import IndexBackpropQuantizer


def quantizer(arrays: dict, **fields) -> IndexBackpropQuantizer:
    codebook_size, dim = arrays["codebook"].shape
    settings = {"beta": float(arrays["beta"]), "entropy_temperature": float(arrays["entropy_temperature"])}
    return IndexBackpropQuantizer(codebook_size, dim, **settings | fields)


def objective(module: IndexBackpropQuantizer, arrays: dict, codebook, z):
    out = module.apply({"params": {"codebook": codebook}}, z)
    upstream = released.nhwc(arrays["upstream"])
    loss = jnp.sum(out.z_q * upstream) + out.quant_loss + float(arrays["entropy_weight"]) * out.entropy_loss
    return loss, out


@pytest.mark.parametrize("implementation", ["streamed", "dense"])
@pytest.mark.parametrize("name", ["quantizer", "quantizer_flat"])
def test_losses_and_gradients_agree_with_the_released_code(name, implementation):
    arrays = released.load(name)
    module = quantizer(arrays, implementation=implementation, block_size=16)
    gradient = jax.value_and_grad(lambda codebook, z: objective(module, arrays, codebook, z), (0, 1), has_aux=True)
    (loss, out), (grad_codebook, grad_z) = gradient(arrays["codebook"], released.nhwc(arrays["z"]))
    np.testing.assert_array_equal(out.indices.reshape(-1), arrays["indices"])
    released.assert_close(out.batch_entropy, arrays["avg_entropy"])
    for field in ("quant_loss", "sample_entropy", "entropy_loss"):
        released.assert_close(getattr(out, field), arrays[field])
    released.assert_close(loss, arrays["loss"])
    released.assert_close(out.z_q, released.nhwc(arrays["z_q"]))
    released.assert_close(grad_z, released.nhwc(arrays["grad_z"]))
    released.assert_close(grad_codebook, arrays["grad_codebook"])


def test_beta_on_commitment_moves_beta_from_the_rows_to_the_latents():
    """The two losses have equal values; their gradients differ by (1 - beta) times that of one mean square."""
    arrays = released.load("quantizer")
    z, codebook = released.nhwc(arrays["z"]), arrays["codebook"]

    def quant_loss(beta_on):
        module = quantizer(arrays, beta_on=beta_on)
        return jax.value_and_grad(
            lambda codebook, z: module.apply({"params": {"codebook": codebook}}, z).quant_loss, (0, 1)
        )(codebook, z)

    as_released, (rows_released, latents_released) = quant_loss("codebook")
    as_written, (rows_written, latents_written) = quant_loss("commitment")
    residual = 2 * (z - released.nhwc(arrays["z_q"])) / z.size
    rows = np.zeros_like(codebook)
    np.add.at(rows, arrays["indices"], -residual.reshape(-1, z.shape[-1]))
    released.assert_close(as_written, as_released)
    released.assert_close(latents_released - latents_written, 0.75 * residual)
    released.assert_close(rows_written - rows_released, 0.75 * rows)


def test_entropy_weights_scale_their_terms():
    arrays = released.load("quantizer_flat")
    module = quantizer(arrays, sample_entropy_weight=0.5, batch_entropy_weight=3.0)
    out = module.apply({"params": {"codebook": arrays["codebook"]}}, released.nhwc(arrays["z"]))
    released.assert_close(out.entropy_loss, 0.5 * arrays["sample_entropy"] - 3.0 * arrays["avg_entropy"])


def test_diagnostics_measure_saturation_and_carry_no_gradient():
    arrays = released.load("quantizer")
    module = quantizer(arrays)
    logits = released.nhwc(arrays["z"]).reshape(-1, 8).astype(np.float64) @ arrays["codebook"].T
    probabilities = np.exp(logits - logits.max(1, keepdims=True))
    probabilities /= probabilities.sum(1, keepdims=True)

    def diagnostics(codebook, z):
        out = module.apply({"params": {"codebook": codebook}}, z)
        return out.max_probability + out.max_logit, (out.max_probability, out.max_logit)

    gradients, (probability, logit) = jax.grad(diagnostics, (0, 1), has_aux=True)(
        arrays["codebook"], released.nhwc(arrays["z"])
    )
    released.assert_close(probability, probabilities.max(1).mean())
    released.assert_close(logit, np.abs(logits).max())
    assert not any(np.any(gradient) for gradient in gradients)


def test_nearest_and_lookup():
    arrays = released.load("quantizer")
    bound = quantizer(arrays).bind({"params": {"codebook": arrays["codebook"]}})
    codes = bound.nearest(released.nhwc(arrays["z"]))
    assert codes.dtype == jnp.int32
    np.testing.assert_array_equal(codes.reshape(-1), arrays["indices"])
    np.testing.assert_array_equal(bound.lookup(codes), arrays["codebook"][codes])


def test_a_tie_goes_to_the_smallest_index():
    codebook = jnp.stack([jnp.zeros(2), jnp.ones(2), jnp.ones(2)])
    bound = IndexBackpropQuantizer(3, 2, block_size=1).bind({"params": {"codebook": codebook}})
    assert bound.nearest(jnp.ones((1, 1, 1, 2))).item() == 1
    assert bound(jnp.ones((1, 1, 1, 2))).indices.item() == 1


def test_a_codebook_split_over_devices_gives_the_same_loss_and_gradients():
    arrays = released.load("quantizer_flat")
    z, codebook = np.repeat(released.nhwc(arrays["z"]), 4, axis=0), arrays["codebook"]

    def gradients(mesh, codebook, z):
        module = quantizer(arrays, mesh=mesh)

        def loss(codebook, z):
            out = module.apply({"params": {"codebook": codebook}}, z)
            return out.quant_loss + out.sample_entropy + out.batch_entropy

        return jax.jit(jax.value_and_grad(loss, (0, 1)))(codebook, z)

    mesh = make_mesh({"data": 2, "codebook": 4})
    rows = jax.device_put(codebook, NamedSharding(mesh, PartitionSpec(CODEBOOK)))
    split = gradients(mesh, rows, jax.device_put(z, batch_sharding(mesh)))
    jax.tree.map(released.assert_close, split, gradients(None, codebook, z))


def test_latents_in_bfloat16_are_quantized_in_float32():
    arrays = released.load("quantizer")
    module, variables = quantizer(arrays), {"params": {"codebook": arrays["codebook"]}}
    z = jnp.asarray(released.nhwc(arrays["z"]), jnp.bfloat16)
    narrow, wide = module.apply(variables, z), module.apply(variables, z.astype(jnp.float32))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(narrow.replace(indices=None)))
    np.testing.assert_array_equal(narrow.quant_loss, wide.quant_loss)


@pytest.mark.parametrize(("init_scale", "scale"), [(0.0, 1.0), (1.0, 1.0), (0.05, 0.05)])
def test_the_codebook_starts_normal(init_scale, scale):
    module = IndexBackpropQuantizer(4096, 16, init_scale=init_scale)
    variables = module.init(jax.random.key(0), jnp.zeros((1, 1, 1, 16)))
    box = variables["params"]["codebook"]
    assert box.names == ("codes", "code_dim")
    assert abs(box.value.mean()) < 0.01 * scale
    assert abs(box.value.std() - scale) < 0.01 * scale


def torch_directions(torch, z, codebook, upstream, temperature, entropy_temperature):
    """The quantizer on unit vectors in PyTorch, dense: (loss, z_q, codes, quant_loss, both entropies)."""
    z, rows = torch.nn.functional.normalize(z, dim=-1), torch.nn.functional.normalize(codebook, dim=-1)
    logits = z.flatten(0, 2) @ rows.T / temperature
    p, codes = logits.softmax(-1), logits.argmax(-1)
    hard = torch.nn.functional.one_hot(codes, len(rows)).to(z.dtype)
    z_q = ((hard - p.detach() + p) @ rows).reshape(z.shape)
    chosen = (hard @ rows).reshape(z.shape)
    quant_loss = (
        ((z_q - z) ** 2).mean() + ((chosen.detach() - z) ** 2).mean() + 0.25 * ((chosen - z.detach()) ** 2).mean()
    )
    log_q = (logits / entropy_temperature).log_softmax(-1)
    sample = -(log_q.exp() * log_q).sum(-1).mean()
    mean = log_q.exp().mean(0)
    batch = -(mean * (mean + 1e-5).log()).sum()
    loss = (z_q * upstream).sum() + quant_loss + sample - batch
    return loss, z_q, codes, quant_loss, sample, batch


@pytest.mark.parametrize("implementation", ["streamed", "dense"])
@pytest.mark.parametrize("temperature", [1.0, 0.07])
def test_directions_and_a_logit_temperature_agree_with_pytorch(temperature, implementation):
    """In float32 here and float64 there; the largest difference seen is 1e-6 of a tensor's largest magnitude."""
    torch = pytest.importorskip("torch")
    random = np.random.default_rng(0)
    z, codebook, upstream = (random.standard_normal(shape) * 3 for shape in ((2, 3, 4, 8), (64, 8), (2, 3, 4, 8)))
    z, codebook, upstream = (array.astype(np.float32) for array in (z, codebook, upstream))
    settings = dict(l2_normalize=True, logit_temperature=temperature, entropy_temperature=0.1)
    module = IndexBackpropQuantizer(64, 8, implementation=implementation, block_size=16, **settings)

    def ours(codebook, z):
        out = module.apply({"params": {"codebook": codebook}}, z)
        return jnp.sum(out.z_q * upstream) + out.quant_loss + out.entropy_loss, out

    (loss, out), gradients = jax.value_and_grad(ours, (0, 1), has_aux=True)(codebook, z)
    leaves = [torch.from_numpy(array).double().requires_grad_() for array in (z, codebook)]
    theirs = torch_directions(torch, *leaves, torch.from_numpy(upstream).double(), temperature, 0.1)
    theirs[0].backward()
    np.testing.assert_array_equal(out.indices.reshape(-1), theirs[2])
    found = (loss, out.z_q, out.quant_loss, out.sample_entropy, out.batch_entropy, gradients[1], gradients[0])
    expected = (*(theirs[i].detach() for i in (0, 1, 3, 4, 5)), *(leaf.grad for leaf in leaves))
    for mine, other in zip(found, expected, strict=True):
        released.assert_close(mine, other.numpy(), 1e-5)
    assert out.max_logit <= 1 / temperature * (1 + 1e-6)
    bound = module.bind({"params": {"codebook": codebook}})
    np.testing.assert_array_equal(bound.nearest(z), out.indices)
    released.assert_close(bound.lookup(out.indices), np.asarray(out.z_q), 1e-6)
    np.testing.assert_array_equal(bound.nearest(1000 * z), out.indices)


def test_directions_split_over_devices_are_those_of_the_plain_form():
    random = np.random.default_rng(1)
    z, codebook = random.standard_normal((16, 4, 4, 8)).astype(np.float32), random.standard_normal((64, 8))
    codebook, mesh = codebook.astype(np.float32), make_mesh({"data": 2, "codebook": 4})

    def gradients(codebook, z, **fields):
        settings = dict(l2_normalize=True, logit_temperature=0.1, entropy_temperature=0.5)
        module = IndexBackpropQuantizer(64, 8, **settings, **fields)

        def loss(codebook, z):
            out = module.apply({"params": {"codebook": codebook}}, z)
            return out.quant_loss + out.entropy_loss + jnp.sum(out.z_q * jnp.cos(z)), out.indices

        return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(codebook, z)

    rows = jax.device_put(codebook, NamedSharding(mesh, PartitionSpec(CODEBOOK)))
    split = gradients(rows, jax.device_put(z, batch_sharding(mesh)), mesh=mesh, block_size=4)
    plain = gradients(codebook, z, implementation="dense")
    jax.tree.map(lambda a, b: released.assert_close(a, b, 1e-5), split, plain)


def test_rows_of_a_codebook_of_directions_start_at_length_one():
    module = IndexBackpropQuantizer(512, 16, init_scale=0.3, l2_normalize=True)
    rows = module.init(jax.random.key(0), jnp.zeros((1, 1, 1, 16)))["params"]["codebook"].value
    np.testing.assert_allclose(jnp.linalg.norm(rows, axis=1), 1, rtol=1e-6)


def test_an_unknown_beta_on_is_refused():
    with pytest.raises(UsageError, match=r"beta_on is 'both'.*codebook, commitment"):
        IndexBackpropQuantizer(4, 2, beta_on="both").init(jax.random.key(0), jnp.zeros((1, 1, 1, 2)))
