"""VQ and SimVQ against plain formulas in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax.core import meta
from support.quantizers import BETA, SHAPE, assert_close, distances, loss_of, normal

from ibq_jax.tokenizer.quantizer import IndexBackpropQuantizer
from ibq_jax.tokenizer.vector_quantizers import SimVectorQuantizer, VectorQuantizer, nearest_rows


def test_vq_takes_the_nearest_row_and_trains_it_and_the_latent_towards_each_other():
    z, rows, upstream = normal(0, *SHAPE, 8), normal(1, 16, 8), normal(2, *SHAPE, 8)
    module = VectorQuantizer(16, 8, beta=BETA)
    gradients, out = jax.grad(lambda rows, z: loss_of(module, {"codebook": rows}, z, upstream), (0, 1), has_aux=True)(
        rows, z
    )
    indices = distances(z, rows).argmin(axis=1)
    np.testing.assert_array_equal(out.indices.reshape(-1), indices)
    chosen = rows[indices].reshape(z.shape)
    np.testing.assert_array_equal(out.z_q, chosen)
    assert_close(out.quant_loss, (1 + BETA) * np.mean((z - chosen) ** 2))
    assert out.entropy_loss == 0 and out.sample_entropy is out.batch_entropy is out.max_logit is None
    of_rows = np.zeros_like(rows)
    np.add.at(of_rows, indices, (2 * (chosen - z) / z.size).reshape(-1, 8))
    assert_close(gradients[0], of_rows)
    assert_close(gradients[1], upstream + BETA * 2 * (z - chosen) / z.size)


def test_vq_on_the_unit_sphere_compares_directions():
    z, rows, upstream = normal(0, *SHAPE, 8), normal(1, 16, 8), normal(2, *SHAPE, 8)
    module = VectorQuantizer(16, 8, beta=BETA, l2_normalize=True)
    (gradient, out) = jax.grad(lambda z: loss_of(module, {"codebook": rows}, z, upstream), has_aux=True)(z)
    lengths = np.linalg.norm(z, axis=-1, keepdims=True)
    unit, unit_rows = z / lengths, rows / np.linalg.norm(rows, axis=1, keepdims=True)
    indices = (unit.reshape(-1, 8) @ unit_rows.T).argmax(axis=1)
    np.testing.assert_array_equal(out.indices.reshape(-1), indices)
    chosen = unit_rows[indices].reshape(z.shape)
    assert_close(out.z_q, chosen)
    assert_close(out.quant_loss, (1 + BETA) * np.mean((unit - chosen) ** 2))
    of_unit = upstream + BETA * 2 * (unit - chosen) / z.size
    assert_close(gradient, (of_unit - unit * (unit * of_unit).sum(axis=-1, keepdims=True)) / lengths)
    bound = module.bind({"params": {"codebook": rows}})
    np.testing.assert_array_equal(bound.lookup(out.indices), out.z_q)


@pytest.mark.parametrize("size", [1.0, 1e-3, 1 / 16384])
def test_the_nearest_of_small_rows_is_found_where_plain_distances_in_float32_would_not_do(size):
    """A codebook of 16,384 codes starts within 1/16384; z . e is then 1e-4 of |z|^2."""
    z, rows = normal(0, 512, 64), np.random.default_rng(1).uniform(-size, size, (1024, 64)).astype(np.float32)
    exact = distances(z, rows)
    found = np.asarray(nearest_rows(jnp.asarray(z), jnp.asarray(rows)))
    missed = exact[np.arange(512), found] - exact.min(axis=1)
    rounding = 64 * np.finfo(np.float32).eps * size
    assert missed.max() <= rounding
    assert (found == exact.argmin(axis=1)).mean() > 0.99


def test_the_nearest_of_equals_is_the_first():
    rows = jnp.stack([jnp.zeros(2), jnp.ones(2), jnp.ones(2)])
    bound = VectorQuantizer(3, 2, block_size=1).bind({"params": {"codebook": rows}})
    assert bound.nearest(jnp.full((1, 1, 1, 2), 0.9)).item() == 1
    assert bound.nearest(jnp.full((1, 1, 1, 2), 0.5)).item() == 0


def test_a_vq_codebook_starts_uniform_within_one_over_k():
    box = VectorQuantizer(1024, 16).init(jax.random.key(0), jnp.zeros((1, 1, 1, 16)))["params"]["codebook"]
    assert box.names == ("codes", "code_dim")
    assert 0.99 / 1024 < np.abs(box.value).max() <= 1 / 1024
    assert abs(box.value.std() * 1024 - 3**-0.5) < 0.01


def test_a_vq_codebook_may_start_normal():
    module = VectorQuantizer(1024, 16, init_scale=0.5)
    box = module.init(jax.random.key(0), jnp.zeros((1, 1, 1, 16)))["params"]["codebook"]
    assert box.names == ("codes", "code_dim")
    assert abs(box.value.mean()) < 0.02 and abs(box.value.std() - 0.5) < 0.01
    assert 1.5 < np.abs(box.value).max() < 3.5  # not uniform, which would end at 0.5 * 3**0.5


def test_simvq_trains_the_layer_and_not_the_codebook():
    z, upstream, module = normal(0, *SHAPE, 8), normal(2, *SHAPE, 8), SimVectorQuantizer(16, 8, beta=BETA)
    params = meta.unbox(module.init(jax.random.key(0), z)["params"])
    gradients, out = jax.grad(lambda params, z: loss_of(module, params, z, upstream), (0, 1), has_aux=True)(params, z)
    fixed, layer = np.asarray(params["codebook"]), jax.device_get(params["projection"])
    rows = fixed @ layer["kernel"] + layer["bias"]
    indices = distances(z, rows).argmin(axis=1)
    np.testing.assert_array_equal(out.indices.reshape(-1), indices)
    chosen = rows[indices].reshape(z.shape)
    assert_close(out.z_q, chosen)
    assert_close(out.quant_loss, (1 + BETA) * np.mean((z - chosen) ** 2))
    of_chosen = (2 * (chosen - z) / z.size).reshape(-1, 8)
    assert_close(gradients[0]["projection"]["kernel"], fixed[indices].T @ of_chosen)
    assert_close(gradients[0]["projection"]["bias"], of_chosen.sum(axis=0))
    assert not np.any(gradients[0]["codebook"])
    assert_close(gradients[1], upstream + BETA * 2 * (z - chosen) / z.size)


ENTROPY = {"entropy_temperature": 0.2, "sample_entropy_weight": 0.7, "batch_entropy_weight": 1.3}
GROUP = 12  # of the 24 tokens


def entropies_in_pytorch(z: torch.Tensor, rows: torch.Tensor, entropy_logits: str) -> tuple[torch.Tensor, ...]:
    """Returns (entropy loss, sample entropy, batch entropy) as one would write them down."""
    logits = z @ rows.T if entropy_logits == "dot" else -0.5 * torch.cdist(z, rows) ** 2
    log_q = torch.log_softmax(logits / ENTROPY["entropy_temperature"], dim=1)
    means = log_q.exp().reshape(-1, GROUP, len(rows)).mean(dim=1)
    sample = -(log_q.exp() * log_q).sum(dim=1).mean()
    batch = -(means * torch.log(means + 1e-5)).sum(dim=1).mean()
    return 0.7 * sample - 1.3 * batch, sample, batch


@pytest.mark.parametrize("implementation", ["dense", "streamed"])
@pytest.mark.parametrize("entropy_logits", ["dot", "distance"])
def test_the_entropy_term_of_vq_is_the_plain_formula_s(entropy_logits, implementation):
    z, rows = normal(0, *SHAPE, 8), normal(1, 16, 8)
    settings = dict(entropy_logits=entropy_logits, entropy_group_tokens=GROUP, implementation=implementation)
    module = VectorQuantizer(16, 8, **settings, **ENTROPY)

    def loss(rows, z):
        out = module.apply({"params": {"codebook": rows}}, z)
        return out.entropy_loss, out

    gradients, out = jax.grad(loss, (0, 1), has_aux=True)(rows, z)
    latents, codebook = (torch.tensor(array, dtype=torch.float64, requires_grad=True) for array in (z, rows))
    expected = entropies_in_pytorch(latents.reshape(-1, 8), codebook, entropy_logits)
    expected[0].backward()
    for ours, theirs in zip((out.entropy_loss, out.sample_entropy, out.batch_entropy), expected, strict=True):
        assert_close(ours, theirs.detach())
    assert_close(gradients[0], codebook.grad)
    assert_close(gradients[1], latents.grad)
    assert np.abs(gradients[0]).max(axis=1).min() > 0 and len(np.unique(out.indices)) < 16  # unchosen codes learn too
    assert out.max_probability is out.max_logit is None


def test_the_entropy_term_of_simvq_trains_the_layer():
    z = normal(0, *SHAPE, 8)
    module = SimVectorQuantizer(16, 8, entropy_logits="distance", entropy_group_tokens=GROUP, **ENTROPY)
    params = meta.unbox(module.init(jax.random.key(0), z)["params"])
    gradients = jax.grad(lambda params: module.apply({"params": params}, z).entropy_loss)(params)
    fixed, kernel, bias = (
        torch.tensor(np.asarray(array), dtype=torch.float64)
        for array in (params["codebook"], params["projection"]["kernel"], params["projection"]["bias"])
    )
    kernel, bias = kernel.requires_grad_(), bias.requires_grad_()
    latents = torch.tensor(z, dtype=torch.float64).reshape(-1, 8)
    entropies_in_pytorch(latents, fixed @ kernel + bias, "distance")[0].backward()
    assert_close(gradients["projection"]["kernel"], kernel.grad, 1e-5)
    assert_close(gradients["projection"]["bias"], bias.grad, 1e-5)  # 2.6e-6 measured: what codes gain others lose
    assert not np.any(gradients["codebook"])


def test_the_term_on_dot_products_is_ibq_s():
    z, rows = normal(0, *SHAPE, 8), normal(1, 16, 8)
    settings = dict(entropy_group_tokens=GROUP, **ENTROPY)
    ours, ibqs = (
        jax.value_and_grad(lambda rows, module=module: module.apply({"params": {"codebook": rows}}, z).entropy_loss)(
            rows
        )
        for module in (
            VectorQuantizer(16, 8, entropy_logits="dot", **settings),
            IndexBackpropQuantizer(16, 8, **settings),
        )
    )
    assert_close(ours[0], ibqs[0])
    assert_close(ours[1], ibqs[1])


@pytest.mark.parametrize("entropy_logits", ["dot", "distance"])
def test_the_term_leaves_codes_and_the_other_losses_as_they_are(entropy_logits):
    z, params = normal(0, *SHAPE, 8), {"codebook": normal(1, 16, 8)}
    plain, with_term = (
        VectorQuantizer(16, 8, entropy_logits=logits).apply({"params": params}, z) for logits in ("own", entropy_logits)
    )
    np.testing.assert_array_equal(plain.indices, with_term.indices)
    np.testing.assert_array_equal(plain.z_q, with_term.z_q)
    assert plain.quant_loss == with_term.quant_loss and plain.entropy_loss == 0 != with_term.entropy_loss


def test_a_simvq_codebook_starts_with_rows_of_length_one():
    params = SimVectorQuantizer(4096, 16).init(jax.random.key(0), jnp.zeros((1, 1, 1, 16)))["params"]
    assert abs(params["codebook"].value.std() - 0.25) < 0.005
    assert 0.9 * 0.25 < np.abs(params["projection"]["kernel"]).max() <= 0.25
