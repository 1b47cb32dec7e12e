"""Every product of float32 states that it keeps all bits. Programs are only traced: CPU results would not show it."""

import functools
import math
from collections.abc import Callable
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from support.small_generators import SMALL
from support.stated_precision import Product, below_float32, products

from ibq_jax.autoregressive.generate import LogitFilter, generate, step_weights
from ibq_jax.autoregressive.model import GeneratorModel
from ibq_jax.autoregressive.step import GeneratorTrainer, abstract_arguments
from ibq_jax.autoregressive.token_sizes import load_preset
from ibq_jax.base.sharding import AXES, make_mesh
from ibq_jax.evaluate.image_metrics import psnr, ssim
from ibq_jax.evaluate.protocols import PROTOCOLS, for_inception
from ibq_jax.interop.generator_names import abstract_params
from ibq_jax.ops import cross_entropy, weighted_cross_entropy
from ibq_jax.pretrained import efficientnet, inception, lpips
from ibq_jax.pretrained.frozen_nets import NETS
from ibq_jax.tokenizer.diff_augment import DRAWS, augment
from ibq_jax.tokenizer.discriminator import PatchDiscriminator
from ibq_jax.tokenizer.feature_discriminator import FeatureDiscriminator
from ibq_jax.tokenizer.losses import input_gradients
from ibq_jax.tokenizer.net_losses import alignment_losses
from ibq_jax.tokenizer.style_discriminator import StyleDiscriminator

CONFIG = Path(__file__).parents[2] / "configs" / "autoregressive.py"
FULL = (jax.lax.Precision.HIGHEST,) * 2


def array(*shape: int, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def assert_full(found: list[Product], at_least: int) -> None:
    """Checks that a program has products, and that all of them keep every bit."""
    assert len(found) >= at_least
    assert not below_float32(found)


# ---- what the list contains --------------------------------------------------------------------------------------


def plain(x: jax.Array) -> jax.Array:
    return jnp.dot(x, x)


def full(x: jax.Array) -> jax.Array:
    return jnp.dot(x, x, precision="highest")


@jax.custom_vjp
def plain_backward(x: jax.Array) -> jax.Array:
    return full(x)


plain_backward.defvjp(lambda x: (full(x), x), lambda x, g: (plain(x) * g,))


def mapped(function: Callable) -> Callable:
    mesh = make_mesh({"data": 8})
    everywhere = jax.sharding.PartitionSpec()
    return jax.shard_map(function, mesh=mesh, in_specs=everywhere, out_specs=everywhere)


HIDING_PLACES = {
    "in the open": lambda function: function,
    "jit": jax.jit,
    "scan": lambda function: lambda x: jax.lax.scan(lambda carry, _: (function(carry), None), x, length=3)[0],
    "while": lambda function: lambda x: jax.lax.while_loop(lambda carry: carry.sum() < 1, function, x),
    "cond": lambda function: lambda x: jax.lax.cond(x.sum() < 1, function, lambda x: x, x),
    "remat": lambda function: jax.grad(lambda x: jax.checkpoint(function)(x).sum()),
    "shard_map": mapped,
}


@pytest.mark.parametrize("place", HIDING_PLACES)
def test_a_plain_product_is_found_wherever_it_is(place):
    hide, x = HIDING_PLACES[place], array(4, 4)
    bad = below_float32(products(hide(plain), x))
    assert bad
    assert bad[0][:3] == ("dot_general", ("float32", "float32"), None)
    assert "tests/system/test_stated_precision.py:" in bad[0].source
    assert_full(products(hide(full), x), at_least=1)


def test_a_plain_product_is_found_in_a_gradient_written_by_hand():
    assert_full(products(plain_backward, array(4, 4)), at_least=1)
    assert below_float32(products(jax.grad(lambda x: plain_backward(x).sum()), array(4, 4)))


def test_a_plain_convolution_is_found_and_bfloat16_may_be_plain():
    def convolution(x, kernel):
        return jax.lax.conv(x, kernel, (1, 1), "SAME")

    [found] = products(convolution, array(1, 3, 8, 8), array(4, 3, 3, 3))
    assert below_float32([found]) == [found]
    assert found.primitive == "conv_general_dilated"
    bfloat16 = functools.partial(array, dtype=jnp.bfloat16)
    [found] = products(convolution, bfloat16(1, 3, 8, 8), bfloat16(4, 3, 3, 3))
    assert found.operands == ("bfloat16", "bfloat16")
    assert not below_float32([found])


def test_less_than_float32_is_not_enough():
    for stated in (jax.lax.Precision.HIGH, jax.lax.DotAlgorithmPreset.BF16_BF16_F32_X3, (FULL[0], None)):
        found = Product("dot_general", ("float32", "bfloat16"), stated, "")
        assert below_float32([found]) == [found]
    for stated in (FULL, jax.lax.DotAlgorithmPreset.F32_F32_F32):
        assert not below_float32([Product("dot_general", ("float32", "float32"), stated, "")])


# ---- the generator -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "fields"),
    [
        ((1, 1, 1), ("loss.implementation=streamed", "model.remat=dots")),
        ((1, 1, 1), ("loss.implementation=dense", "model.remat=blocks", "train.grad_accum_steps=2")),
        ((2, 2, 2), ("loss.implementation=streamed", "model.use_pretrained_codebook=True")),
    ],
)
def test_the_generators_training_step_is_float32(sizes, fields):
    small = ("vocab_size=64", "grid=(3, 4)", "num_layers=2", "num_heads=4", "num_kv_heads=2", "embed_dim=64")
    overrides = [f"--config.model.{field}" for field in small]
    overrides += [f"--config.{field}" for field in ("dtype=float32", "data.batch_size=16", *fields)]
    mesh = make_mesh(dict(zip(AXES, sizes, strict=True)), jax.devices()[: math.prod(sizes)])
    trainer = GeneratorTrainer(load_preset(f"{CONFIG}:openmoji32", overrides), mesh, steps_per_epoch=1)
    state, codes, labels = abstract_arguments(trainer)
    assert_full(products(trainer.train_step, state, codes, labels), at_least=30)
    assert_full(products(trainer.code_losses, state.params, codes, labels), at_least=10)


def test_the_generators_logits_and_samples_are_float32():
    model = GeneratorModel(**SMALL | dict(num_heads=4, num_kv_heads=2, use_pretrained_codebook=True, codebook_dim=8))
    params = abstract_params(model)
    codes, labels = array(3, *model.grid, dtype=jnp.int32), array(3, dtype=jnp.int32)
    logits = products(lambda *arguments: model.apply({"params": arguments[0]}, *arguments[1:]), params, codes, labels)
    assert_full(logits, at_least=10)

    def sample(params, labels, keys, prefix):
        return generate(
            model,
            params,
            step_weights(model, params),
            labels=labels,
            keys=keys,
            prefix=prefix,
            guidance_scales=jnp.ones(model.positions),
            temperature=jnp.float32(1.0),
            guided=True,
            logit_filter=LogitFilter(top_k=8, top_p=0.9),
        )

    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 3))
    found = products(sample, params, labels, keys, array(3, 5, dtype=jnp.int32))
    prefill, step = 10, 1 + 2 + 7 * model.num_layers  # of a step: the head, two for embeddings, and the layers'
    assert_full(found, at_least=prefill + step)


@pytest.mark.parametrize("implementation", ["streamed", "dense"])
def test_cross_entropy_is_float32(implementation):
    options = dict(block_size=16, implementation=implementation)

    def summed(x, head, targets):
        return cross_entropy(x, head, targets, **options).sum()

    def weighted(x, head, targets):
        return weighted_cross_entropy(x, head, targets, jnp.ones(targets.shape), **options)

    for loss in (summed, weighted):
        found = products(jax.value_and_grad(loss, (0, 1)), array(6, 8), array(40, 8), array(6, dtype=jnp.int32))
        assert_full(found, at_least=3)


# ---- the discriminator, and the networks and metrics that judge images --------------------------------------------


def test_the_discriminator_is_float32():
    model, images = PatchDiscriminator(channels=8, num_layers=2, norm_group=2), array(4, 32, 32, 3)
    variables = nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0), images))

    def loss(params, images, batch_stats):
        variables = {"params": params, "batch_stats": batch_stats}
        return model.apply(variables, images, mutable=["batch_stats"])[0].sum()

    found = products(jax.value_and_grad(loss, (0, 1)), variables["params"], images, variables["batch_stats"])
    assert_full(found, at_least=3 * 4)  # of each layer: forward, and backward to both operands


def test_the_style_discriminator_is_float32_with_its_penalty():
    model, images = StyleDiscriminator(channels=8, norm_group=2), array(4, 8, 8, 3)
    params = nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0), images))["params"]

    def loss(params, images):
        return jnp.sum(input_gradients(lambda images: model.apply({"params": params}, images), images))

    assert_full(products(jax.value_and_grad(loss, (0, 1)), params, images), at_least=4 * 7)


@pytest.mark.parametrize("form", ["maps", "tokens"])
def test_heads_on_hidden_maps_are_float32(form):
    model, maps = FeatureDiscriminator(channels=8, norm_group=2, form=form), [array(4, 4, 4, 8)]
    variables = nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0), maps))

    def loss(params, maps, batch_stats):
        return model.apply({"params": params, "batch_stats": batch_stats}, maps).sum()

    found = products(jax.value_and_grad(loss, (0, 1)), variables["params"], maps, variables["batch_stats"])
    assert_full(found, at_least=3 * 3)


@pytest.mark.parametrize("name", NETS)
def test_frozen_networks_are_float32(name):
    net, images = NETS[name], array(2, NETS[name].multiple * 2, NETS[name].multiple * 2, 3)

    def loss(weights, images):
        logits = 0.0 if net.logits is None else jnp.sum(net.logits(weights, images, jnp.float32))
        return sum((jnp.sum(hidden) for hidden in net.maps(weights, images, jnp.float32)), logits)

    assert_full(products(jax.value_and_grad(loss, 1), net.weight_shapes(), images), at_least=30)


def test_alignment_and_augmentations_are_float32():
    draws = {name: array(2) for names in DRAWS.values() for name in names}
    assert_full(products(jax.grad(lambda x, draws: jnp.sum(augment(x, draws))), array(2, 8, 8, 3), draws), at_least=2)
    both = array(2, 3, 3, 5), array(2, 3, 3, 5)
    assert_full(products(jax.grad(lambda x, y: sum(alignment_losses(x, y, 0.5, 0.25))), *both), at_least=4)


@pytest.mark.parametrize("net", ["vgg16", "alexnet"])
def test_lpips_is_float32(net):
    images = array(2, 32, 32, 3)

    def distance(weights, x, y):
        return lpips.lpips(weights, x, y, net=net).sum()

    taps = len(lpips.TRUNKS[net].stages)
    convolutions = sum(map(len, lpips.TRUNKS[net].stages))
    found = products(jax.value_and_grad(distance, 2), lpips.weight_shapes(net), images, images)
    assert_full(found, at_least=3 * convolutions + 2 * taps)  # two images forward, one backward; the heads


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_inception_is_float32_with_every_resizing(protocol):
    images = array(2, 32, 32, 3)
    weights = jax.eval_shape(inception.Inception().init, jax.random.key(0), array(1, inception.SIDE, inception.SIDE, 3))

    def features(weights, images):
        return inception.features(weights, for_inception(images, PROTOCOLS[protocol].resizing))

    assert_full(products(features, weights, images), at_least=95)


def test_efficientnet_is_float32():
    weights = efficientnet.load_weights(efficientnet.weights_file())
    assert_full(products(efficientnet.logits, weights, array(2, 64, 64, 3)), at_least=35)


def test_psnr_and_ssim_need_no_product():
    images = array(2, 16, 16, 3)
    assert products(lambda a, b: (psnr(a, b), ssim(a, b)), images, images) == []
