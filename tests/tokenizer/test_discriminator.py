"""The discriminator against a plain float64 computation in NumPy, and against the released code's first step."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import released
from support.published_names import discriminator_from_torch

from ibq_jax.base.errors import UsageError
from ibq_jax.interop.tokenizer_names import discriminator_fields
from ibq_jax.tokenizer.discriminator import PatchDiscriminator


@pytest.fixture(scope="module")
def variables() -> dict:
    """Returns random weights of two layers with 8 channels, with scales and biases of norms that matter."""
    model = PatchDiscriminator(channels=8, num_layers=2, norm_group=0)
    shapes = nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3))))
    random = np.random.default_rng(0)
    return {
        "params": jax.tree.map(lambda leaf: random.normal(0.1, 0.3, leaf.shape).astype(np.float32), shapes["params"]),
        "batch_stats": {
            name: {"mean": np.zeros(norm["mean"].shape), "var": np.ones(norm["var"].shape), "num_batches_tracked": 0}
            for name, norm in shapes["batch_stats"].items()
        },
    }


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(0).uniform(-1, 1, (6, 32, 40, 3)).astype(np.float32)


def plain_conv(x: np.ndarray, params: dict, stride: int) -> np.ndarray:
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (4, 4), axis=(1, 2))[:, ::stride, ::stride]
    y = np.einsum("bhwcij,ijcd->bhwd", windows, np.asarray(params["kernel"], np.float64))
    return y + np.asarray(params["bias"]) if "bias" in params else y


def plain_discriminator(params: dict, x: np.ndarray) -> tuple[np.ndarray, list[tuple[np.ndarray, np.ndarray]]]:
    """Returns (logits, (mean, unbiased variance) before each norm) of one norm group with two layers."""
    moments = []
    x = plain_conv(x.astype(np.float64), params["conv_0"], 2)
    for i, stride in ((1, 2), (2, 1)):
        x = plain_conv(np.where(x > 0, x, 0.2 * x), params[f"conv_{i}"], stride)
        moments.append((x.mean((0, 1, 2)), x.var((0, 1, 2), ddof=1)))
        scale, bias = (np.asarray(params[f"norm_{i}"][name]) for name in ("scale", "bias"))
        x = (x - x.mean((0, 1, 2))) / np.sqrt(x.var((0, 1, 2)) + 1e-5) * scale + bias
    return plain_conv(np.where(x > 0, x, 0.2 * x), params["conv_3"], 1), moments


@pytest.mark.parametrize("norm_group", [0, 2, 3, 6])
def test_logits_and_running_statistics_of_each_group(variables, images, norm_group):
    model = PatchDiscriminator(channels=8, num_layers=2, norm_group=norm_group)
    logits, moved = model.apply(variables, images, mutable=["batch_stats"])
    groups = np.split(images, len(images) // (norm_group or len(images)))
    expected = [plain_discriminator(variables["params"], group) for group in groups]
    assert logits.dtype == jnp.float32
    released.assert_close(logits, np.concatenate([group for group, _ in expected]))
    for i in (1, 2):
        running = moved["batch_stats"][f"norm_{i}"]
        mean, variance = np.mean([moments[i - 1] for _, moments in expected], axis=0)
        released.assert_close(running["mean"], 0.1 * mean)
        released.assert_close(running["var"], 0.9 + 0.1 * variance)
        assert running["num_batches_tracked"] == 1


def test_running_statistics_neither_enter_the_output_nor_change_unless_mutable(variables, images):
    model = PatchDiscriminator(channels=8, num_layers=2, norm_group=0)
    elsewhere = variables | {"batch_stats": jax.tree.map(lambda leaf: leaf + 5, variables["batch_stats"])}
    np.testing.assert_array_equal(model.apply(variables, images), model.apply(elsewhere, images))


def test_mean_logits_of_the_released_codes_first_step():
    state_dict, published, _ = released.tokenizer()
    steps = released.load("train_steps")
    model = PatchDiscriminator(**discriminator_fields(published), norm_group=0)
    logits = model.apply(discriminator_from_torch(state_dict, published), released.nhwc(steps["images"][0]))
    log = json.loads(str(steps["logs"]))[0]
    assert float(logits.mean()) == pytest.approx(log["train/logits_real"], rel=1e-4)


def test_channels_double_up_to_eightfold():
    model = PatchDiscriminator(channels=4, num_layers=5, norm_group=0)
    variables = nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 128, 128, 3))))
    channels = [variables["params"][f"conv_{i}"]["kernel"].shape[-1] for i in range(7)]
    assert channels == [4, 8, 16, 32, 32, 32, 1]


def test_initial_weights_have_the_released_codes_distribution():
    model = PatchDiscriminator(channels=64, num_layers=2, norm_group=0)
    params = nn.meta.unbox(model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3))))["params"]
    assert float(params["conv_2"]["kernel"].std()) == pytest.approx(0.02, rel=0.02)
    assert float(params["norm_2"]["scale"].mean()) == pytest.approx(1.0, abs=0.005)
    assert float(params["norm_2"]["scale"].std()) == pytest.approx(0.02, rel=0.15)
    assert not params["norm_2"]["bias"].any()
    assert float(jnp.abs(params["conv_0"]["bias"]).max()) <= (4 * 4 * 3) ** -0.5


def test_bfloat16_stays_close_to_float32(variables, images):
    exact = PatchDiscriminator(channels=8, num_layers=2, norm_group=0).apply(variables, images)
    rounded = PatchDiscriminator(channels=8, num_layers=2, norm_group=0, dtype=jnp.bfloat16).apply(variables, images)
    assert rounded.dtype == jnp.float32
    assert 0 < jnp.linalg.norm(rounded - exact) / jnp.linalg.norm(exact) < 0.03


def test_a_batch_that_does_not_divide_into_groups_is_refused(variables, images):
    with pytest.raises(UsageError, match=r"6 images.*groups of 4"):
        PatchDiscriminator(channels=8, num_layers=2, norm_group=4).apply(variables, images)


def test_images_too_small_for_the_layers_are_refused():
    model = PatchDiscriminator(channels=4, num_layers=3, norm_group=0)
    logits = jax.eval_shape(model.init_with_output, jax.random.key(0), jnp.zeros((1, 24, 24, 3)))[0]
    assert logits.shape == (1, 1, 1, 1)
    with pytest.raises(UsageError, match=r"num_layers=3.*23x24.*at least 24"):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 23, 24, 3)))
