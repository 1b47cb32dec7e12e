"""The tokenizer's tensor names: those of every published checkpoint, round trips, and errors for what does not fit."""

import json
import math
import re

import jax
import numpy as np
import pytest
from support import released
from support.published_names import discriminator_from_torch, discriminator_to_torch, ema_to_torch

from ibq_jax.base.errors import UsageError
from ibq_jax.interop.tokenizer_names import (
    check_tokenizer,
    discriminator_fields,
    model_fields,
    tokenizer_from_torch,
    tokenizer_to_torch,
)

PUBLISHED = json.loads((released.GOLDEN / "published_tokenizers.json").read_text())


@pytest.fixture(scope="module")
def small() -> tuple[dict[str, np.ndarray], dict]:
    state_dict, published, _ = released.tokenizer()
    return state_dict, published


def published_tokenizer(codes: int) -> tuple[dict[str, np.ndarray], dict]:
    """Returns a state dict with every published name and shape, one value per tensor, and its configuration."""
    random = np.random.default_rng(0)
    state_dict = {}
    for name, shape in PUBLISHED["tensors"].items():
        dtype = np.int64 if name.endswith("num_batches_tracked") else np.float32
        value = np.asarray(100 * random.normal(), dtype)
        state_dict[name] = np.broadcast_to(value, [codes if size == "n_embed" else size for size in shape])
    return state_dict, PUBLISHED["config"] | {"n_embed": codes}


@pytest.mark.parametrize("name", PUBLISHED["codebook_sizes"])
def test_every_published_tokenizer_loads(name):
    codes = PUBLISHED["codebook_sizes"][name]
    params = tokenizer_from_torch(*published_tokenizer(codes), use_ema=False)
    assert params["quantize"]["codebook"].shape == (codes, 256)


@pytest.mark.parametrize("name", PUBLISHED["others"])
def test_a_published_tokenizer_of_other_sizes_has_these_names_and_shapes(name):
    """455 M parameters; check_tokenizer looks at shapes alone, so that nothing is allocated."""
    published, shapes = PUBLISHED["others"][name]["config"], PUBLISHED["others"][name]["tensors"]
    check_tokenizer({tensor: tuple(shape) for tensor, shape in shapes.items()}, published)
    assert sum(math.prod(shape) for shape in shapes.values()) == 455_336_963
    with pytest.raises(
        UsageError, match=r"encoder.conv_in.weight has shape \(256, 3, 3, 3\) instead of \(128, 3, 3, 3\)"
    ):
        smaller = published | {"ddconfig": published["ddconfig"] | {"ch": 128}}
        check_tokenizer({tensor: tuple(shape) for tensor, shape in shapes.items()}, smaller)


def test_every_published_name_is_exported_with_its_own_tensor():
    state_dict, published = published_tokenizer(1024)
    exported = tokenizer_to_torch(tokenizer_from_torch(state_dict, published, use_ema=False))
    exported |= discriminator_to_torch(discriminator_from_torch(state_dict, published))
    exported |= ema_to_torch(tokenizer_from_torch(state_dict, published, use_ema=True))
    not_ours = re.compile(r"model_ema\.(lossdiscriminator|decay|num_updates)")
    assert exported.keys() == {name for name in state_dict if not not_ours.match(name)}
    for name, tensor in exported.items():
        assert tensor.dtype == state_dict[name].dtype, name
        assert tensor.shape == state_dict[name].shape, name
        assert np.all(tensor == state_dict[name].flat[0]), name


def test_a_round_trip_is_exact_bit_for_bit(small):
    state_dict, published = small
    exported = tokenizer_to_torch(tokenizer_from_torch(state_dict, published, use_ema=False))
    exported |= discriminator_to_torch(discriminator_from_torch(state_dict, published))
    exported |= ema_to_torch(tokenizer_from_torch(state_dict, published, use_ema=True))
    for name, tensor in exported.items():
        assert tensor.flags.c_contiguous
        assert tensor.dtype == state_dict[name].dtype
        np.testing.assert_array_equal(tensor, state_dict[name], strict=True, err_msg=name)
    again = tokenizer_from_torch(exported, published, use_ema=False)
    jax.tree.map(np.testing.assert_array_equal, again, tokenizer_from_torch(state_dict, published, use_ema=False))


def test_layouts(small):
    state_dict, published = small
    params = tokenizer_from_torch(state_dict, published, use_ema=False)
    kernel = params["encoder"]["down_1"]["block_0"]["conv1"]["kernel"]
    assert kernel.shape == (3, 3, 32, 64)
    assert kernel[0, 2, 5, 7] == state_dict["encoder.down.1.block.0.conv1.weight"][7, 5, 0, 2]
    np.testing.assert_array_equal(params["quantize"]["codebook"], state_dict["quantize.embedding.weight"])
    assert discriminator_from_torch(state_dict, published)["params"]["conv_1"]["kernel"].shape == (4, 4, 8, 16)


def test_the_autoencoder_alone_is_enough(small):
    state_dict, published = small
    alone = {name: tensor for name, tensor in state_dict.items() if not name.startswith(("loss.", "model_ema."))}
    params = tokenizer_from_torch(alone, published, use_ema=False)
    assert tokenizer_to_torch(params).keys() == alone.keys()
    with pytest.raises(UsageError, match=r"no averaged weights.*use_ema=False"):
        tokenizer_from_torch(alone, published, use_ema=True)
    with pytest.raises(UsageError, match=r"loss.discriminator.main.0.*is missing"):
        discriminator_from_torch(alone, published)


def test_half_precision_files_become_float32_parameters(small):
    state_dict, published = small
    halves = {name: tensor.astype(np.float16) for name, tensor in state_dict.items()}
    params = tokenizer_from_torch(halves, published, use_ema=False)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}


def test_frozen_perceptual_weights_beside_the_rest_are_known(small):
    state_dict, published = small
    layers = [
        (1, 0),
        (1, 2),
        (2, 5),
        (2, 7),
        (3, 10),
        (3, 12),
        (3, 14),
        (4, 17),
        (4, 19),
        (4, 21),
        (5, 24),
        (5, 26),
        (5, 28),
    ]
    vgg16, prefix = released.vgg16(), "loss.perceptual_loss."
    frozen = {f"{prefix}scaling_layer.{name}": np.zeros((1, 3, 1, 1)) for name in ("shift", "scale")}
    for stage, index in layers:
        for kind in ("weight", "bias"):
            frozen[f"{prefix}net.slice{stage}.{index}.{kind}"] = vgg16[f"features.{index}.{kind}"]
    heads = released.load("lpips")
    frozen |= {f"{prefix}lin{i}.model.1.weight": heads[f"lin{i}"] for i in range(5)}
    tokenizer_from_torch(state_dict | frozen, published, use_ema=False)
    del frozen[f"{prefix}net.slice3.12.bias"]
    with pytest.raises(UsageError, match=r"loss.perceptual_loss.net.slice3.12.bias is missing"):
        tokenizer_from_torch(state_dict | frozen, published, use_ema=False)


@pytest.mark.parametrize(
    ("name", "tensor", "complaint"),
    [
        ("quant_conv.bias", None, "quant_conv.bias is missing"),
        (
            "encoder.conv_in.weight",
            np.zeros((32, 3, 1, 1)),
            r"encoder.conv_in.weight has shape \(32, 3, 1, 1\) instead of",
        ),
        ("encoder.conv_on.weight", np.zeros(3), "encoder.conv_on.weight is unknown"),
        ("loss.discriminator.main.3.running_var", None, "loss.discriminator.main.3.running_var is missing"),
        (
            "loss.discriminator.main.5.weight",
            np.zeros(1),
            r"main.5.weight has shape \(1,\) instead of \(32, 16, 4, 4\)",
        ),
        ("model_ema.quant_convbias", None, "model_ema.quant_convbias is missing"),
        ("model_ema.lossdiscriminatormain0bias", np.zeros(9), r"main0bias has shape \(9,\) instead of \(8,\)"),
        ("model_ema.decay", None, "model_ema.decay is missing"),
    ],
)
def test_whatever_does_not_fit_is_named(small, name, tensor, complaint):
    state_dict, published = small
    changed = {key: value for key, value in (state_dict | {name: tensor}).items() if value is not None}
    with pytest.raises(UsageError, match=f"nothing was loaded: .*{complaint}"):
        tokenizer_from_torch(changed, published, use_ema=False)


def test_all_that_is_wrong_is_named(small):
    state_dict, published = small
    with pytest.raises(UsageError) as raised:
        tokenizer_from_torch(state_dict | {f"extra.{i}": np.zeros(1) for i in range(20)}, published, use_ema=False)
    assert all(f"extra.{i} is unknown" in str(raised.value) for i in range(20))


def test_another_codebook_size_is_named(small):
    state_dict, published = small
    with pytest.raises(UsageError, match=r"quantize.embedding.weight has shape \(64, 16\) instead of \(128, 16\)"):
        tokenizer_from_torch(state_dict, published | {"n_embed": 128}, use_ema=False)


def test_fields_of_a_published_configuration():
    fields = model_fields(PUBLISHED["config"] | {"n_embed": 8192})
    assert fields == {
        "channels": 128,
        "channel_multipliers": (1, 1, 2, 2, 4),
        "num_res_blocks": 4,
        "attention_resolutions": (16,),
        "z_channels": 256,
        "resolution": 256,
        "codebook_size": 8192,
        "code_dim": 256,
    }
    assert discriminator_fields(PUBLISHED["config"]) == {"channels": 64, "num_layers": 3}
    assert discriminator_fields({"loss": {"disc_ndf": 8, "disc_num_layers": 2}}) == {"channels": 8, "num_layers": 2}


def test_configurations_of_other_architectures_are_refused(small):
    _, published = small
    with pytest.raises(UsageError, match="n_embed is missing"):
        model_fields({key: value for key, value in published.items() if key != "n_embed"})
    with pytest.raises(UsageError, match=r"ddconfig.ch is missing"):
        model_fields(published | {"ddconfig": {}})
    with pytest.raises(UsageError, match=r"ddconfig.double_z is True"):
        model_fields(published | {"ddconfig": published["ddconfig"] | {"double_z": True}})
