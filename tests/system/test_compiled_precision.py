"""Compiled for TPUs and GPUs, the tokenizer has no product of fewer bits than asked for on the way to a code.

The TPU's part needs requirements-tpu.txt, the GPU's requirements-cuda.txt; neither needs a TPU or a GPU.

The bfloat16 pass of the exact search is left out: it decides nothing by itself (`ibq_jax.ops.exact_search`).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from support.compilers import NEEDED, installed
from support.small_nets import SMALL_TRUNK
from support.small_runs import ROOT, SMALL

from ibq_jax.base.config import load_config
from ibq_jax.base.sharding import batch_sharding, make_mesh, replicated
from ibq_jax.ops import index_backprop, nearest_codes
from ibq_jax.ops.exact_search import FAST_PASS, FOR_FEW
from ibq_jax.plan.chips import topology_devices
from ibq_jax.plan.gpus import gpu_devices
from ibq_jax.plan.hlo import Module
from ibq_jax.plan.products import Product, products
from ibq_jax.pretrained.lpips import TRUNKS
from ibq_jax.tokenizer.step import TokenizerTrainer, abstract_arguments, jit_train_step

BITS = {"float32": 24, "bfloat16_3x": 16, "tf32": 11, "bfloat16": 8}
pytestmark = pytest.mark.compiler


@pytest.fixture(params=NEEDED)
def platform(request) -> str:
    if not installed(request.param):
        pytest.skip(f"the compiler for a {request.param} is not installed")
    return request.param


def mesh_on(platform: str, sizes: dict[str, int]) -> jax.sharding.Mesh:
    devices = topology_devices("v5e:2x2")[1] if platform == "tpu" else gpu_devices("h100:4")[1]
    return make_mesh(sizes, devices[: sizes.get("data", 1) * sizes.get("codebook", 1)])


def compiled_products(platform: str, jitted, *arguments) -> list[Product]:
    found = list(products(Module(jitted.lower(*arguments).compile().as_text()), platform))
    return [product for product in found if FAST_PASS not in product.op_name or "float32_" in product.op_name]


def trainer_on(mesh: jax.sharding.Mesh, *fields: str) -> TokenizerTrainer:
    overrides = [f"--config.{field}" for field in (*SMALL, "loss.perceptual_weight=1.0", *fields)]
    return TokenizerTrainer(load_config(f"{ROOT}/configs/tokenizer.py:openmoji32", overrides), mesh, steps_per_epoch=1)


def encode_products(platform: str, precision: str) -> list[Product]:
    mesh = mesh_on(platform, {"data": 1})
    model = trainer_on(mesh, "model.num_res_blocks=1").model.for_encoding(precision)
    images = jax.ShapeDtypeStruct((8, 16, 16, 3), jnp.float32, sharding=batch_sharding(mesh))
    shapes = jax.eval_shape(
        lambda: model.clone(mesh=None).init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)), method="initialize")
    )
    params = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated(mesh)), nn.meta.unbox(shapes)
    )
    encode = jax.jit(
        lambda params, images: model.apply(params, images, method="encode"), out_shardings=replicated(mesh)
    )
    return compiled_products(platform, encode, params, images)


@pytest.mark.parametrize("precision", ["float32", "tf32"])
def test_encoding_keeps_the_bits_that_were_asked_for(platform, precision):
    found = encode_products(platform, precision)
    assert len(found) >= 15  # the encoder's convolutions, its attention, the search
    assert min(product.bits for product in found) >= BITS[precision]


def test_bfloat16_is_seen_where_it_was_asked_for(platform):
    found = encode_products(platform, "bfloat16")
    low = [product for product in found if product.bits == BITS["bfloat16"]]
    assert len(low) >= 15
    assert platform == "gpu" or any("nearest" in product.op_name for product in low)
    assert any("attention" in product.op_name for product in low)


def test_jax_default_precision_would_be_seen(platform):
    """A new product that states no precision fails the tests above."""
    mesh = mesh_on(platform, {"data": 1})
    a = jax.ShapeDtypeStruct((512, 512), jnp.float32, sharding=replicated(mesh))
    found = compiled_products(platform, jax.jit(jnp.dot, out_shardings=replicated(mesh)), a, a)
    assert [product.bits for product in found] == [8 if platform == "tpu" else 11]


@pytest.mark.parametrize("precision", ["float32", "bfloat16_3x", "bfloat16"])
def test_the_quantizer_trains_at_its_precision(platform, precision):
    mesh = mesh_on(platform, {"codebook": 2})
    z = jax.ShapeDtypeStruct((1024, 64), jnp.float32, sharding=replicated(mesh))
    codebook = jax.ShapeDtypeStruct((2048, 64), jnp.float32, sharding=replicated(mesh))
    others = "float32" if precision == "float32" else "bfloat16"

    def loss(z, codebook):
        settings = dict(precision=precision, gradient_precision=others, block_size=256, mesh=mesh)
        out = index_backprop(z, codebook, **settings)
        return (out.z_q**2).sum() + out.sample_entropy - out.batch_entropy

    gradients = jax.jit(jax.grad(loss, argnums=(0, 1)), out_shardings=replicated(mesh))
    bits = sorted(product.bits for product in compiled_products(platform, gradients, z, codebook))
    least = {"float32": 24, "bfloat16_3x": 16, "bfloat16": 11 if platform == "gpu" else 8}
    narrow = 2 if platform == "gpu" and others == "bfloat16" else 0  # dz and dE, of logits' gradients in bfloat16
    assert bits[:narrow] == [8] * narrow
    assert len(bits) >= 6 and set(bits[narrow:-3]) == {least[others]}  # mu, p's gradient, dz, dE; some are merged
    assert bits[-3:] == [least[precision]] * 3  # the logits of three passes


def test_a_search_at_float32_has_no_other_product_below_it(platform):
    mesh = mesh_on(platform, {"codebook": 2})
    z = jax.ShapeDtypeStruct((512, 64), jnp.float32, sharding=replicated(mesh))
    codebook = jax.ShapeDtypeStruct((4096, 64), jnp.float32, sharding=replicated(mesh))
    search = jax.jit(lambda z, codebook: nearest_codes(z, codebook, mesh=mesh), out_shardings=replicated(mesh))
    text = search.lower(z, codebook).compile().as_text()
    found = list(products(Module(text), platform))
    fast = [product.bits for product in found if FAST_PASS in product.op_name]
    others = [product for product in found if FAST_PASS not in product.op_name]
    assert sorted(fast) == [8, 24]  # the first search, and the second
    assert all(product.bits == 24 and FOR_FEW in product.op_name for product in others)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_training_step_keeps_the_bits_that_were_asked_for(platform, dtype, monkeypatch):
    monkeypatch.setitem(TRUNKS, "vgg16", SMALL_TRUNK)  # the whole network takes most of the compiler's time
    trainer = trainer_on(mesh_on(platform, {"data": 2}), f"dtype={dtype}")
    found = compiled_products(platform, jit_train_step(trainer), *abstract_arguments(trainer))
    assert len(found) >= 60  # both networks and LPIPS, forward and backward
    quantizer = [product for product in found if "quantize" in product.op_name]
    latents = [product for product in found if "quant_conv" in product.op_name]
    networks = [product for product in found if product not in quantizer + latents]
    assert sum("lpips" in product.op_name for product in networks) >= 9  # three convolutions of three passes
    assert len(quantizer) >= 5 and len(latents) >= 4
    logits = [product for product in quantizer if product.bits >= BITS["bfloat16_3x"]]
    assert len(logits) >= 1 and len(quantizer) - len(logits) <= 4  # of one block; mu, p's gradient, dz and dE
    assert min(product.bits for product in latents) == BITS["float32"]
    assert min(product.bits for product in networks) == BITS[dtype]
