"""LPIPS against the released code on a stand-in VGG16, and how the user's VGG16 file is found and read."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import released
from safetensors.numpy import save_file

from ibq_jax.base.errors import UsageError
from ibq_jax.tokenizer import perceptual
from ibq_jax.tokenizer.perceptual import find_weights, load_weights, lpips


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
    """LPIPS [B], and the gradient of its sum with respect to y."""
    value, pull_back = jax.vjp(lambda y: lpips(weights, x, y), y)
    return value, pull_back(jnp.ones_like(value))[0]


def test_value_and_gradient_agree_with_the_released_code(weights):
    golden = released.load("lpips")
    x, y = released.nhwc(golden["x"]), released.nhwc(golden["y"])
    value, gradient = value_and_gradient(weights, x, y)
    released.assert_close(value, golden["value"].reshape(-1))
    released.assert_close(gradient, released.nhwc(golden["grad_y"]))


def test_shipped_heads_are_those_of_the_lpips_package(weights):
    golden = released.load("lpips")
    for i, head in enumerate(weights["heads"]):
        np.testing.assert_array_equal(head, golden[f"lin{i}"].reshape(-1))
    assert sum(head.size for head in weights["heads"]) == 1472


def test_equal_images_are_at_no_distance_with_a_finite_gradient(weights):
    x = jnp.zeros((1, 16, 16, 3))
    value, gradient = value_and_gradient(weights, x, x)
    assert 0 <= value < 1e-10
    assert jnp.all(jnp.isfinite(gradient))


def test_a_position_without_any_active_channel_has_a_gradient_of_0():
    gradient = jax.grad(lambda features: perceptual._unit(features).sum())(jnp.zeros((1, 1, 1, 4)))
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


def test_weights_are_looked_for_in_the_config_then_the_environment_then_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("IBQ_VGG16", raising=False)
    assert find_weights("") is None
    cache = tmp_path / ".cache" / "ibq_jax"
    cache.mkdir(parents=True)
    files = {name: cache / f"vgg16-397923af.{name}" for name in ("safetensors", "pth")}
    for file in files.values():
        file.touch()
        assert find_weights("") == file
    mine, yours = tmp_path / "mine.pth", tmp_path / "yours.pth"
    mine.touch(), yours.touch()
    monkeypatch.setenv("IBQ_VGG16", str(mine))
    assert find_weights("") == mine
    assert find_weights(str(yours)) == yours


def test_a_file_that_was_asked_for_has_to_exist(tmp_path, monkeypatch):
    monkeypatch.setenv("IBQ_VGG16", str(tmp_path / "absent.pth"))
    with pytest.raises(UsageError, match=r"\$IBQ_VGG16 is .*absent.pth, which does not exist"):
        find_weights("")
    with pytest.raises(UsageError, match=r"loss.perceptual_file is nowhere.pth, which does not exist"):
        find_weights("nowhere.pth")
