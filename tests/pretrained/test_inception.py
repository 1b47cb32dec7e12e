"""The FID Inception-v3 against pytorch-fid's network with made-up weights; reading of the user's file."""

import json
import re
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file
from support import released

from ibq_jax.base.errors import UsageError
from ibq_jax.pretrained.inception import Features, Inception, features, load_weights, resize_bilinear
from ibq_jax.pretrained.weight_files import WEIGHT_FILES

GOLDEN = released.load("inception")
SHAPES = {name: tuple(shape) for name, shape, _ in json.loads(str(GOLDEN["state_dict_json"]))}
GROUPS = ("a", "b")  # two images of 64 pixels, one of 299


@pytest.fixture(scope="module")
def tensors() -> dict[str, np.ndarray]:
    return released.stand_ins(GOLDEN["state_dict_json"])


@pytest.fixture(scope="module")
def weights(tensors, tmp_path_factory) -> dict:
    path = tmp_path_factory.mktemp("inception") / WEIGHT_FILES["inception"].names[1]
    save_file(tensors, path)
    loaded = load_weights(path)
    path.unlink()  # 96 MB that pytest would keep
    return jax.device_put(loaded)


@pytest.fixture(scope="module")
def outputs(weights) -> dict[str, Features]:
    return {group: jitted_features(weights, images(group)) for group in GROUPS}


@jax.jit
def jitted_features(weights: dict, images: jax.Array) -> Features:
    return features(weights, images)


@jax.jit
def steps(weights: dict, images: jax.Array) -> dict[str, jax.Array]:
    """Returns the output of each step of the network, by name."""
    x = 2 * resize_bilinear(images, 299) - 1
    sown = Inception().apply(weights, x, mutable="intermediates")[1]["intermediates"]
    return {name.removeprefix("after_"): values[0] for name, values in sown.items()}


def images(group: str) -> jax.Array:
    return jnp.asarray(GOLDEN[f"{group}_images"], jnp.float32) / 255


def test_stand_in_weights_are_those_of_the_golden_values(tensors):
    checksums = [zlib.crc32(tensors[name].tobytes()) for name in sorted(SHAPES)]
    np.testing.assert_array_equal(checksums, GOLDEN["weight_crc32"])


@pytest.mark.parametrize("group", GROUPS)
def test_network_input_agrees_with_pytorch_fid(group):
    row = 2 * resize_bilinear(images(group), 299)[:, 7] - 1
    np.testing.assert_allclose(row, GOLDEN[f"{group}_netinput_row7"].transpose(0, 2, 1), atol=1e-6)


@pytest.mark.parametrize("group", GROUPS)
def test_each_step_of_the_network_agrees_with_pytorch_fid(weights, group):
    sown = steps(weights, images(group))
    for step, block, channels in (("maxpool1", 0, 64), ("maxpool2", 1, 192), ("Mixed_6e", 2, 768)):
        x, about = sown[step], f"{step} of {group}"
        np.testing.assert_allclose(x.mean((1, 2)), GOLDEN[f"{group}_feat{channels}"], 0, 2e-5, err_msg=about)
        np.testing.assert_allclose(x[:, 0, 0], GOLDEN[f"{group}_block{block}_corner"], 0, 2e-5, err_msg=about)
    np.testing.assert_allclose(sown["Mixed_6e"][:, 8, 8], GOLDEN[f"{group}_block2_center"], 0, 2e-5)


@pytest.mark.parametrize("group", GROUPS)
def test_pool_features_agree_with_pytorch_fid(outputs, group):
    np.testing.assert_allclose(outputs[group].pool, GOLDEN[f"{group}_pool2048"], 0, 2e-5)
    np.testing.assert_allclose(outputs[group].pool, GOLDEN[f"{group}_pool2048_f64"], 0, 2e-5)


@pytest.mark.parametrize("group", GROUPS)
def test_spatial_features_are_seven_channels_of_mixed_6d_in_hwc_order(outputs, group):
    expected = released.nhwc(GOLDEN[f"{group}_mixed6d_first7"]).reshape(-1, 2023)
    np.testing.assert_allclose(outputs[group].spatial, expected, 0, 2e-5)


@pytest.mark.parametrize("group", GROUPS)
def test_logits_are_those_of_pytorch_fid_less_the_bias(outputs, tensors, group):
    expected = GOLDEN[f"{group}_logits1008"] - tensors["fc.bias"]
    np.testing.assert_allclose(outputs[group].logits, expected, 0, 1e-4)


def test_an_images_features_do_not_depend_on_its_batch(outputs, weights):
    with_black = jitted_features(weights, images("a").at[1].set(0.0))
    for name, together, alone in zip(Features._fields, outputs["a"], with_black, strict=True):
        np.testing.assert_allclose(alone[0], together[0], 0, 1e-6, err_msg=name)
        assert np.abs(alone[1] - together[1]).max() > 0.01, name


def test_an_image_that_already_has_the_size_is_unchanged():
    np.testing.assert_array_equal(resize_bilinear(images("b"), 299), images("b"))


def test_shrinking_mixes_the_four_pixels_around_a_centre_and_no_others():
    image = np.random.RandomState(0).rand(1, 8, 8, 3).astype(np.float32)
    expected = (image[:, 1::4] + image[:, 2::4]) / 2
    expected = (expected[:, :, 1::4] + expected[:, :, 2::4]) / 2
    np.testing.assert_allclose(resize_bilinear(jnp.asarray(image), 2), expected, atol=1e-6)


@pytest.mark.parametrize(("height", "width"), [(37, 61), (400, 350), (777, 1024)])
def test_resizing_agrees_with_pytorch(height, width):
    torch = pytest.importorskip("torch")
    image = np.random.RandomState(0).rand(1, 3, height, width).astype(np.float32)
    expected = torch.nn.functional.interpolate(torch.from_numpy(image), (299, 299), mode="bilinear")
    resized = resize_bilinear(jnp.asarray(released.nhwc(image)), 299)
    np.testing.assert_allclose(resized, released.nhwc(expected.numpy()), atol=1e-6)


def test_a_pickled_file_without_batch_counts_gives_the_same_weights(weights, tensors, tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / WEIGHT_FILES["inception"].names[0]
    published = {name: torch.from_numpy(x) for name, x in tensors.items() if "num_batches" not in name}
    torch.save(published, path, _use_new_zipfile_serialization=False)
    loaded = load_weights(path)
    path.unlink()
    jax.tree.map(np.testing.assert_array_equal, loaded, weights)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"Mixed_7c.branch_pool.bn.running_var": None}, "it has no tensor Mixed_7c.branch_pool.bn.running_var"),
        (
            {"Mixed_6b.branch7x7_2.conv.weight": (128, 128, 7, 1)},
            "Mixed_6b.branch7x7_2.conv.weight has shape (128, 128, 7, 1) instead of (128, 128, 1, 7)",
        ),
        ({"fc.weight": (1000, 2048)}, "fc.weight has shape (1000, 2048) instead of (1008, 2048)"),  # torchvision's
    ],
)
def test_another_inception_is_refused_by_the_name_of_the_tensor(tmp_path, change, message):
    path = tmp_path / "other.safetensors"
    shapes = {name: shape for name, shape in (SHAPES | change).items() if shape is not None}
    save_file({name: np.zeros(shape, np.int8) for name, shape in shapes.items()}, path)
    with pytest.raises(UsageError, match=re.escape(f"{path}: not the FID Inception-v3: {message}")):
        load_weights(path)
    path.unlink()


def test_another_network_is_refused(tmp_path):
    path = tmp_path / "vgg16-397923af.safetensors"
    save_file({"features.0.weight": np.zeros((64, 3, 3, 3), np.float32)}, path)
    message = f"{path}: not the FID Inception-v3: it has no tensor Conv2d_1a_3x3.conv.weight"
    with pytest.raises(UsageError, match=re.escape(message)):
        load_weights(path)
