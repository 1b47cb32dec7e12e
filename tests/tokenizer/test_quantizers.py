"""Properties that all quantizers share, on one device and on a mesh."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta
from jax.sharding import NamedSharding, PartitionSpec
from support.compiled_text import largest_array
from support.quantizers import BETA, SHAPE, assert_close, normal

from ibq_jax.base.sharding import AXES, CODEBOOK, make_mesh
from ibq_jax.ops.exact_search import TOKENS_AT_ONCE
from ibq_jax.tokenizer.quantizer import IndexBackpropQuantizer
from ibq_jax.tokenizer.quantizers import QUANTIZERS, build_quantizer, fingerprint_fields

OTHERS = tuple(name for name in QUANTIZERS if name != "ibq")


def test_ibq_with_a_single_loss_has_vq_s():
    z, rows = normal(0, *SHAPE, 8), normal(1, 16, 8)
    single = IndexBackpropQuantizer(16, 8, beta=BETA, beta_on="commitment", double_loss=False)
    out = single.apply({"params": {"codebook": rows}}, z)
    assert_close(out.quant_loss, (1 + BETA) * np.mean((z - rows[out.indices]) ** 2))
    both = IndexBackpropQuantizer(16, 8, beta=BETA, beta_on="commitment").apply({"params": {"codebook": rows}}, z)
    assert_close(both.quant_loss - out.quant_loss, np.mean((z - rows[out.indices]) ** 2))


@pytest.mark.parametrize("name", QUANTIZERS)
def test_what_a_latent_becomes_is_looked_up_by_its_code(name):
    module = build_quantizer(name, {}, codebook_size=64, dim=8)
    z = jnp.asarray(normal(0, *SHAPE, module.latent_dim))
    bound = module.bind(meta.unbox(module.init(jax.random.key(0), z)))
    codes, out = bound.nearest(z), bound(z)
    assert codes.dtype == out.indices.dtype == jnp.int32 and codes.shape == SHAPE
    np.testing.assert_array_equal(codes, out.indices)
    np.testing.assert_array_equal(bound.lookup(codes), out.z_q)
    every = jnp.arange(64).reshape(1, 8, 8)
    if name != "ibq":  # its largest dot product with a row need not be that row's own
        np.testing.assert_array_equal(bound.nearest(_inverse(name, bound.lookup(every))), every)


def _inverse(name: str, rows: jax.Array) -> jax.Array:
    """Returns latents that coincide with the code vectors; FSQ bounds latents by a tanh first."""
    if name != "fsq":
        return rows
    half, shift = 7 * 1.001 / 2, math.atanh(1 / 7.007)
    return jnp.arctanh((4 * rows + 0.5) / half) - shift


@pytest.mark.parametrize(
    ("name", "entropy_logits"),
    [*((name, "own") for name in OTHERS), ("vq", "distance"), ("simvq", "distance")],
)
def test_codes_split_over_devices_give_the_same_losses_and_gradients(name, entropy_logits):
    z, mesh = normal(0, 16, 4, 4, 8 if name in ("vq", "simvq") else 6), make_mesh({"data": 2, "codebook": 4})
    settings = {
        "levels": (2,) * 6,
        "entropy_group_tokens": 64,
        "entropy_temperature": 0.5,
        "entropy_logits": entropy_logits,
    }
    params = meta.unbox(build_quantizer(name, settings, codebook_size=64, dim=8).init(jax.random.key(0), z))

    def gradients(mesh, params, z):
        module = build_quantizer(name, settings, codebook_size=64, dim=8, mesh=mesh)

        def loss(params, z):
            out = module.apply(params, z)
            return out.quant_loss + out.entropy_loss + jnp.sum(out.z_q * jnp.cos(z)), out.indices

        return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(params, z)

    def placed(path, leaf):
        spec = PartitionSpec(CODEBOOK) if path[-1].key == "codebook" else PartitionSpec()
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    split = gradients(
        mesh,
        jax.tree_util.tree_map_with_path(placed, params),
        jax.device_put(z, NamedSharding(mesh, PartitionSpec(AXES))),
    )
    jax.tree.map(lambda a, b: assert_close(a, b, 1e-5), split, gradients(None, params, z))


@pytest.mark.parametrize(("name", "entropy_logits"), [("vq", "own"), ("simvq", "own"), ("vq", "distance")])
def test_no_array_of_tokens_by_codes(name, entropy_logits):
    tokens, width, codes = 4096, 16, 8192
    settings = {"block_size": 256, "entropy_logits": entropy_logits}
    module = build_quantizer(name, settings, codebook_size=codes, dim=width)
    z = jax.ShapeDtypeStruct((16, 16, 16, width), jnp.float32)
    params = meta.unbox(jax.eval_shape(module.init, jax.random.key(0), z))

    def loss(params, z):
        out = module.apply(params, z)
        return out.quant_loss + out.entropy_loss + out.z_q.sum()

    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(params, z).compile()
    largest_of_a_group = codes // 4 * TOKENS_AT_ONCE  # 4 codes of each group, see ops/exact_search.py
    assert largest_array(compiled.as_text()) == largest_of_a_group == tokens * codes // 16


def test_only_settings_that_decide_codes_are_part_of_a_fingerprint():
    """Fingerprints of earlier token caches stay valid: fields that came later count where they are set."""
    assert fingerprint_fields("ibq", {}) == {}
    assert fingerprint_fields("ibq", {"l2_normalize": False, "levels": (), "logit_temperature": 0.1}) == {}
    assert fingerprint_fields("ibq", {"l2_normalize": True, "logit_temperature": 0.1}) == {"l2_normalize": True}
    settings = {"l2_normalize": True, "levels": (), "logit_temperature": 1.0}
    assert fingerprint_fields("vq", settings) == {"quantizer": "vq", "l2_normalize": True, "levels": ()}
