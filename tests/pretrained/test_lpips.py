"""LPIPS against the released code and the lpips package, with made-up trunks; reading of the user's files."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file
from support import released

from ibq_jax.base.errors import UsageError
from ibq_jax.pretrained import lpips as lpips_module
from ibq_jax.pretrained.lpips import load_weights, lpips, weight_shapes
from ibq_jax.pretrained.normalisation import unit_channels


@pytest.fixture(scope="module")
def vgg16_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("vgg16") / "vgg16-397923af.safetensors"
    save_file(dict(released.vgg16()), path)
    return path


@pytest.fixture(scope="module")
def weights(vgg16_file) -> dict:
    return load_weights(vgg16_file)


@jax.jit
def value_and_gradient(weights: dict, x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Computes LPIPS [B], and the gradient of its sum with respect to y."""
    value, pull_back = jax.vjp(lambda y: lpips(weights, x, y), y)
    return value, pull_back(jnp.ones_like(value))[0]


def test_value_and_gradient_agree_with_the_released_code(weights):
    golden = released.load("lpips")
    x, y = released.nhwc(golden["x"]), released.nhwc(golden["y"])
    value, gradient = value_and_gradient(weights, x, y)
    released.assert_close(value, golden["value"].reshape(-1))
    released.assert_close(gradient, released.nhwc(golden["grad_y"]))


def test_equal_images_have_distance_0_and_a_finite_gradient(weights):
    x = jnp.zeros((1, 16, 16, 3))
    value, gradient = value_and_gradient(weights, x, x)
    assert 0 <= value < 1e-10
    assert jnp.all(jnp.isfinite(gradient))


def test_a_position_without_any_active_channel_has_a_gradient_of_0():
    gradient = jax.grad(lambda features: unit_channels(features).sum())(jnp.zeros((1, 1, 1, 4)))
    assert not gradient.any()


def test_bfloat16_stays_close_to_float32(weights):
    golden = released.load("lpips")
    value = jax.jit(lpips, static_argnames="dtype")(
        weights, released.nhwc(golden["x"]), released.nhwc(golden["y"]), dtype=jnp.bfloat16
    )
    assert value.dtype == jnp.float32
    error = np.abs(value / golden["value"].reshape(-1) - 1).max()
    assert 1e-6 < error < 0.01


def test_pickled_weights_are_the_same(weights, tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "vgg16-397923af.pth"
    tensors = {name: torch.from_numpy(array) for name, array in released.vgg16().items()}
    torch.save(tensors, path, _use_new_zipfile_serialization=False)  # the format of torchvision's file
    jax.tree.map(np.testing.assert_array_equal, load_weights(path), weights)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features.10.bias": None}, "has no tensor features.10.bias"),
        (
            {"features.0.weight": np.zeros((64, 1, 3, 3), np.float32)},
            r"features.0.weight has shape \(64, 1, 3, 3\) instead of \(64, 3, 3, 3\)",
        ),
    ],
)
def test_another_file_is_refused_by_the_name_of_the_tensor(tmp_path, change, message):
    tensors = {name: array for name, array in (released.vgg16() | change).items() if array is not None}
    path = tmp_path / "other.safetensors"
    save_file(tensors, path)
    with pytest.raises(UsageError, match=message):
        load_weights(path)


# ---- both nets, against the lpips package ------------------------------------------------------------------------

NETS = released.load("lpips_nets")
KEYS = {"vgg16": "vgg", "alexnet": "alex"}


@pytest.fixture(scope="module", params=KEYS)
def net(request, tmp_path_factory) -> tuple[str, dict]:
    """(name, weights read from a file) of a network."""
    path = tmp_path_factory.mktemp("nets") / f"{request.param}.safetensors"
    save_file(released.stand_ins(NETS[f"{KEYS[request.param]}_trunk_json"]), path)
    return request.param, load_weights(path, request.param)


def test_shipped_heads_are_those_of_the_lpips_package(net):
    name, weights = net
    for i, head in enumerate(weights["heads"]):
        np.testing.assert_array_equal(head, NETS[f"{KEYS[name]}_lin{i}"])
    assert sum(head.size for head in weights["heads"]) == {"vgg16": 1472, "alexnet": 1152}[name]


def test_distances_are_those_of_the_lpips_package(net):
    name, weights = net
    x, y = (jnp.asarray(NETS[side] / 127.5 - 1, jnp.float32) for side in ("in0", "in1"))
    value = jax.jit(lambda x, y: lpips(weights, x, y, net=name))(x, y)
    np.testing.assert_allclose(value, NETS[f"{KEYS[name]}_value"], rtol=1e-5)
    same = jax.jit(lambda x: lpips(weights, x, x, net=name))(x)
    np.testing.assert_allclose(same, 0, atol=1e-7)


def test_the_contribution_of_each_tap_is_that_of_the_lpips_package(net):
    name, weights = net
    x, y = (jnp.asarray(NETS[side] / 127.5 - 1, jnp.float32) for side in ("in0", "in1"))
    terms = jax.jit(lambda x, y: jnp.stack(list(lpips_module._terms(weights, x, y, jnp.float32, name)), axis=1))(x, y)
    np.testing.assert_allclose(terms, NETS[f"{KEYS[name]}_per_layer"], rtol=1e-5)


def test_each_tap_is_that_of_the_lpips_package(net):
    name, weights = net
    taps = lpips_module._taps(weights, jnp.asarray(NETS["in0"] / 127.5 - 1, jnp.float32), jnp.float32, name)
    means = np.stack([np.asarray(tap).mean(axis=(1, 2, 3)) for tap in taps], axis=1)
    np.testing.assert_allclose(means, NETS[f"{KEYS[name]}_tap_mean"], rtol=1e-5)


def test_shapes_are_known_without_the_file(net):
    name, weights = net
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), weight_shapes(name))
    assert shapes == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), weights)


def test_too_small_images_are_refused(net):
    name, weights = net
    side = {"vgg16": 16, "alexnet": 31}[name]
    assert np.isfinite(lpips(weights, *jnp.zeros((2, 1, side, side, 3)), net=name)).all()
    with pytest.raises(UsageError, match=f"at least {side}x{side} pixels, not {side - 1}x{side}$"):
        lpips(weights, *jnp.zeros((2, 1, side - 1, side, 3)), net=name)


def test_one_nets_file_is_not_the_others(vgg16_file, tmp_path):
    alexnet_file, tensors = tmp_path / "alexnet.safetensors", released.stand_ins(NETS["alex_trunk_json"])
    save_file(tensors, alexnet_file)
    with pytest.raises(UsageError, match=r"not torchvision's VGG16: features.0.weight has shape"):
        load_weights(alexnet_file, "vgg16")
    with pytest.raises(UsageError, match=r"not torchvision's AlexNet: features.0.weight has shape"):
        load_weights(vgg16_file, "alexnet")
    save_file({name: array for name, array in tensors.items() if name != "features.8.bias"}, alexnet_file)
    with pytest.raises(UsageError, match=r"not torchvision's AlexNet: it has no tensor features.8.bias"):
        load_weights(alexnet_file, "alexnet")
