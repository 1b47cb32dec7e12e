"""Tokenizer, the class: the released code's weights give the released code's codes and pictures."""

import numpy as np
import pytest
from PIL import Image
from support import released

from ibq_jax import Tokenizer
from ibq_jax.base.errors import UsageError


@pytest.fixture(scope="module")
def golden():
    return released.tokenizer()


@pytest.fixture(scope="module")
def tokenizer(golden):
    state_dict, config, _ = golden
    return Tokenizer.from_torch(state_dict, config)


@pytest.mark.parametrize("prefix", ["", "ema_"])
def test_codes_and_pictures_are_the_released_ones(golden, prefix):
    state_dict, config, arrays = golden
    tokenizer = Tokenizer.from_torch(state_dict, config, use_ema=bool(prefix))
    codes = tokenizer.encode(released.nhwc(arrays["image"]))
    assert codes.dtype == np.int32 and codes.shape == (len(arrays["image"]), 16, 16)
    np.testing.assert_array_equal(np.asarray(codes).reshape(-1), arrays[f"{prefix}indices"].reshape(-1))
    released.assert_close(tokenizer.decode(codes), released.nhwc(arrays[f"{prefix}reconstruction"]), 1e-4)


def test_weights_go_back_as_they_came(golden, tokenizer):
    state_dict = golden[0]
    returned = tokenizer.to_torch()
    published = {name for name in state_dict if not name.startswith(("loss.", "model_ema."))}
    assert returned.keys() == published
    for name, array in returned.items():
        np.testing.assert_array_equal(array, state_dict[name])


def test_uint8_images_and_their_floats_have_the_same_codes(tokenizer):
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 64, 3), np.uint8)
    codes = tokenizer.encode(images)
    assert codes.shape == (2, 16, 32)
    np.testing.assert_array_equal(codes, tokenizer.encode(images / np.float32(127.5) - 1))


def test_an_image_of_any_size_becomes_codes_and_comes_back(tokenizer, tmp_path):
    """The golden tokenizer halves sides: multiples of 2, and a thin grid of codes."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (21, 60, 3), np.uint8))
    image.save(tmp_path / "image.png")
    codes = tokenizer.encode_image(image, min_pixels=1)
    assert codes.dtype == np.int32 and codes.shape == (11, 30)
    resized = np.asarray(image.resize((60, 22), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(codes, tokenizer.encode(resized[None])[0])
    np.testing.assert_array_equal(tokenizer.encode_image(tmp_path / "image.png", min_pixels=1), codes)
    assert tokenizer.decode(codes[None]).shape == (1, 22, 60, 3)
    assert tokenizer.encode_image(image, min_pixels=1, max_pixels=400).shape == (6, 16)


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (np.zeros((32, 32, 3), np.uint8), r"images \[B, H, W, 3\], not an array of shape \(32, 32, 3\)"),
        (np.zeros((1, 3, 32, 32), np.uint8), r"not an array of shape \(1, 3, 32, 32\)"),
        (np.zeros((1, 32, 32, 3), np.int32), "not int32"),
        (np.zeros((1, 33, 32, 3), np.uint8), "33x32 pixels; this tokenizer takes sides that are multiples of 2"),
    ],
)
def test_images_of_another_kind_are_refused(tokenizer, images, words):
    with pytest.raises(UsageError, match=words):
        tokenizer.encode(images)


@pytest.mark.parametrize(
    ("codes", "words"),
    [
        (np.zeros((16, 16), np.int32), r"integer codes \[B, h, w\]"),
        (np.zeros((1, 2, 2), np.float32), "not float32"),
        (np.full((1, 2, 2), 64), "0..63; these reach from 64 to 64"),
        (np.full((1, 2, 2), -1), "reach from -1 to -1"),
    ],
)
def test_codes_of_another_kind_are_refused(tokenizer, codes, words):
    with pytest.raises(UsageError, match=words):
        tokenizer.decode(codes)


def test_a_state_dict_that_does_not_fit_names_what_is_wrong(golden):
    state_dict, config, _ = golden
    lacking = {name: array for name, array in state_dict.items() if name != "quant_conv.bias"}
    with pytest.raises(UsageError, match=r"quant_conv\.bias"):
        Tokenizer.from_torch(lacking, config)
    with pytest.raises(UsageError, match=r"decoder\.surplus"):
        Tokenizer.from_torch(state_dict | {"decoder.surplus": np.zeros(3)}, config)
    with pytest.raises(UsageError, match=r"quantize\.embedding\.weight"):
        Tokenizer.from_torch(state_dict | {"quantize.embedding.weight": np.zeros((3, 4), np.float32)}, config)


def test_a_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"config\.json does not exist"):
        Tokenizer.load(tmp_path)
