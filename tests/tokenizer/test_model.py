"""The whole tokenizer against the released code, with its raw and its averaged weights."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import released

from ibq_jax.base.config import load_config
from ibq_jax.base.errors import UsageError
from ibq_jax.interop.tokenizer_names import model_fields, tokenizer_from_torch
from ibq_jax.tokenizer.model import TokenizerModel, build_model, downsampling

CONFIG = Path(__file__).parents[2] / "configs" / "tokenizer.py"


@pytest.fixture(scope="module")
def golden():
    state_dict, published, arrays = released.tokenizer()
    return TokenizerModel(**model_fields(published)), tokenizer_from_torch(state_dict, published, False), arrays


def apply(model: TokenizerModel, params: dict, x, method: str = "__call__"):
    return jax.jit(lambda params, x: model.apply({"params": params}, x, method=method))(params, x)


def test_forward_agrees_with_the_released_code(golden):
    model, params, arrays = golden
    images = released.nhwc(arrays["image"])
    reconstruction, quantized = apply(model, params, images)
    latent = apply(model, params, images, "latent")
    np.testing.assert_array_equal(quantized.indices.reshape(-1), arrays["indices"])
    released.assert_close(latent, released.nhwc(arrays["latent"]))
    released.assert_close(quantized.z_q, released.nhwc(arrays["z_q"]))
    released.assert_close(reconstruction, released.nhwc(arrays["reconstruction"]))


def test_forward_with_averaged_weights_agrees_with_the_released_code():
    state_dict, published, arrays = released.tokenizer()
    params = tokenizer_from_torch(state_dict, published, use_ema=True)
    reconstruction, quantized = apply(TokenizerModel(**model_fields(published)), params, released.nhwc(arrays["image"]))
    np.testing.assert_array_equal(quantized.indices.reshape(-1), arrays["ema_indices"])
    released.assert_close(reconstruction, released.nhwc(arrays["ema_reconstruction"]))


def test_encode_then_decode_is_the_forward_pass(golden):
    model, params, arrays = golden
    images = released.nhwc(arrays["image"])
    codes = apply(model, params, images, "encode")
    assert codes.dtype == jnp.int32
    assert codes.shape == (2, 16, 16)
    np.testing.assert_array_equal(codes.reshape(-1), arrays["indices"])
    released.assert_close(apply(model, params, codes, "decode"), released.nhwc(arrays["reconstruction"]))


def test_bfloat16_stays_close_to_float32(golden):
    model, params, arrays = golden
    images = released.nhwc(arrays["image"])
    rounded = model.clone(dtype=jnp.bfloat16)
    latent = apply(rounded, params, images, "latent")
    reconstruction = apply(rounded, params, arrays["indices"].reshape(2, 16, 16), "decode")
    assert latent.dtype == reconstruction.dtype == jnp.float32
    released.assert_close(latent, released.nhwc(arrays["latent"]), tolerance=0.05)
    released.assert_close(reconstruction, released.nhwc(arrays["reconstruction"]), tolerance=0.05)


def test_other_image_sizes(golden):
    model, params, _ = golden
    images = jax.random.uniform(jax.random.key(0), (1, 48, 64, 3), minval=-1.0)
    reconstruction, quantized = apply(model, params, images)
    assert reconstruction.shape == images.shape
    assert quantized.indices.shape == (1, 24, 32)


def test_sides_that_do_not_divide_are_refused(golden):
    model, params, _ = golden
    with pytest.raises(UsageError, match=r"33x32 pixels.*multiples of 2"):
        apply(model, params, jnp.zeros((1, 33, 32, 3)), "encode")


@pytest.mark.parametrize(
    ("size", "parameters"), [(1024, 107_049_859), (8192, 108_884_867), (16384, 110_982_019), (262144, 173_896_579)]
)
def test_presets_have_the_published_number_of_parameters(size, parameters):
    config = load_config(f"{CONFIG}:imagenet256_{size}")
    assert downsampling(config) == 16
    model = build_model(config)
    assert model.dtype == jnp.bfloat16
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 256, 256, 3)), method="initialize"))
    assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == parameters


def test_initialize_makes_the_parameters_of_a_forward_pass():
    model = build_model(load_config(f"{CONFIG}:openmoji32", ["--config.quantizer.entropy_group_tokens=0"]))
    image = jnp.zeros((1, 32, 32, 3))
    shapes = [
        jax.eval_shape(lambda method=method: model.init(jax.random.key(0), image, method=method))
        for method in ("initialize", "__call__")
    ]
    assert jax.tree.structure(shapes[0]) == jax.tree.structure(shapes[1])
    assert jax.tree.leaves(shapes[0]) == jax.tree.leaves(shapes[1])


def test_build_model_reads_every_quantizer_field():
    overrides = ["beta=0.5", "beta_on=commitment", "entropy_temperature=0.02", "entropy_group_tokens=64"]
    overrides += ["sample_entropy_weight=0.5", "batch_entropy_weight=2.0", "double_loss=False"]
    model = build_model(load_config(f"{CONFIG}:openmoji32", [f"--config.quantizer.{field}" for field in overrides]))
    quantizer = model.bind({}).quantize
    assert (quantizer.beta, quantizer.beta_on, quantizer.entropy_temperature) == (0.5, "commitment", 0.02)
    assert quantizer.entropy_group_tokens == 64 and not quantizer.double_loss
    assert (quantizer.sample_entropy_weight, quantizer.batch_entropy_weight) == (0.5, 2.0)
