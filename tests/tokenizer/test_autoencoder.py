"""The autoencoder's structure; its numbers against the released code are in test_model.py."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from ibq_jax.base.errors import UsageError
from ibq_jax.tokenizer import autoencoder
from ibq_jax.tokenizer.autoencoder import Attention, Computing, Conv, Decoder, Encoder, GroupNorm

LAYOUT = dict(
    channels=32,
    channel_multipliers=(1, 2),
    num_res_blocks=2,
    attention_resolutions=(16,),
    z_channels=8,
    resolution=32,
)


@pytest.fixture(scope="module")
def params() -> dict:
    """Random weights, small enough to keep activations near 1; cheaper than compiling an initialisation."""
    random = np.random.default_rng(0)

    def weights(module: nn.Module, x: jax.Array) -> dict:
        shapes = nn.meta.unbox(jax.eval_shape(module.init, jax.random.key(0), x))["params"]
        return jax.tree.map(lambda leaf: random.normal(scale=0.05, size=leaf.shape).astype(np.float32), shapes)

    return {
        "encoder": weights(Encoder(**LAYOUT), jnp.zeros((1, 32, 32, 3))),
        "decoder": weights(Decoder(**LAYOUT), jnp.zeros((1, 16, 16, 8))),
    }


def test_attention_follows_every_block_of_its_level_and_the_decoder_has_one_block_more(params):
    blocks = ["attention_0", "attention_1", "block_0", "block_1"]
    assert sorted(params["encoder"]["down_1"]) == blocks
    assert sorted(params["encoder"]["down_0"]) == ["block_0", "block_1"]
    assert sorted(params["decoder"]["up_1"]) == sorted([*blocks, "attention_2", "block_2"])
    assert sorted(params["decoder"]["up_0"]) == ["block_0", "block_1", "block_2"]


@pytest.mark.parametrize(("height", "width"), [(32, 32), (64, 64), (48, 16)])
def test_weights_work_at_other_image_sizes(params, height, width):
    images = jax.random.uniform(jax.random.key(2), (2, height, width, 3), minval=-1.0)
    latents = jax.jit(Encoder(**LAYOUT).apply)({"params": params["encoder"]}, images)
    assert latents.shape == (2, height // 2, width // 2, 8)
    reconstruction = jax.jit(Decoder(**LAYOUT).apply)({"params": params["decoder"]}, latents)
    assert reconstruction.shape == images.shape
    assert jnp.all(jnp.isfinite(reconstruction))


def test_every_parameter_is_float32_and_names_its_axes():
    encoder = Encoder(**LAYOUT, dtype=jnp.bfloat16)
    boxed = jax.eval_shape(encoder.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    for path, leaf in flatten_dict(boxed).items():
        assert leaf.value.dtype == jnp.float32, path
        assert leaf.names == ((None, None, "conv_in", "conv_out") if path[-1] == "kernel" else ("conv_out",)), path


def test_convolutions_start_uniform_within_the_root_of_their_inputs():
    """This is PyTorch's default, with which the released code starts."""
    params = nn.meta.unbox(Conv(200).init(jax.random.key(0), jnp.zeros((1, 3, 3, 50))))["params"]
    bound = (3 * 3 * 50) ** -0.5
    for weights in params.values():
        assert 0.9 * bound < float(jnp.abs(weights).max()) <= bound
        assert float(weights.std()) == pytest.approx(bound / 3**0.5, rel=0.1)


def test_bfloat16_stays_close_to_float32(params):
    images = jax.random.uniform(jax.random.key(3), (2, 32, 32, 3), minval=-1.0)
    exact = jax.jit(Encoder(**LAYOUT).apply)({"params": params["encoder"]}, images)
    rounded = jax.jit(Encoder(**LAYOUT, dtype=jnp.bfloat16).apply)({"params": params["encoder"]}, images)
    assert rounded.dtype == jnp.bfloat16
    error = jnp.linalg.norm(rounded.astype(jnp.float32) - exact) / jnp.linalg.norm(exact)
    assert 0 < error < 0.03


def test_norm_statistics_are_float32():
    """With a mean of 100, bfloat16 has no digits left for the variance."""
    x = (100.0 + jax.random.normal(jax.random.key(4), (1, 16, 16, 32))).astype(jnp.bfloat16)
    y, _ = GroupNorm(False, Computing(jnp.bfloat16)).init_with_output(jax.random.key(0), x)
    wide = np.asarray(x, np.float64)
    expected = (wide - wide.mean((1, 2))) / wide.std((1, 2))
    np.testing.assert_allclose(np.asarray(y, np.float64), expected, atol=0.02)


def test_channels_that_do_not_divide_into_norm_groups_are_refused():
    encoder = Encoder(**LAYOUT | {"channels": 24})
    with pytest.raises(UsageError, match=r"24 channels.*multiple of 32"):
        jax.eval_shape(encoder.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))


def test_computing_blocks_again_changes_no_gradient(params):
    images = jax.random.uniform(jax.random.key(2), (2, 32, 32, 3), minval=-1.0)

    def compiled(remat):
        def loss(weights):
            return jnp.sum(Encoder(**LAYOUT, remat=remat).apply({"params": weights}, images) ** 2)

        return jax.jit(jax.grad(loss)).lower(params["encoder"]).compile()

    kept, again = compiled("none"), compiled("blocks")
    gradients, expected = (flatten_dict(run(params["encoder"])) for run in (again, kept))
    largest = max(np.abs(array).max() for array in expected.values())
    for path, array in expected.items():
        # Biases that a norm or a softmax takes away have no gradient but rounding errors.
        atol = max(1e-5 * np.abs(array).max(), 1e-7 * largest)
        np.testing.assert_allclose(gradients[path], array, rtol=0, atol=atol, err_msg=str(path))
    flops = [run.cost_analysis()["flops"] for run in (kept, again)]
    assert 1.03 * flops[0] < flops[1]  # of a block's six products of convolutions one more: the first's, for the second


def attention_weights(channels: int) -> dict:
    shapes = nn.meta.unbox(
        jax.eval_shape(Attention(Computing()).init, jax.random.key(0), jnp.zeros((1, 1, 1, channels)))
    )
    random = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: random.normal(scale=0.3, size=leaf.shape).astype(np.float32), shapes)


@pytest.mark.parametrize(("height", "width"), [(8, 24), (5, 37)])
def test_attention_by_blocks_of_queries_is_that_of_all_at_once(height, width, monkeypatch):
    """Equal formulas, sums in another order: the largest difference seen is 1e-7 of the largest value."""
    weights = attention_weights(32)
    x = jax.random.normal(jax.random.key(1), (2, height, width, 32))

    def run():
        def loss(weights, x):
            y = Attention(Computing()).apply(weights, x)
            return jnp.sum(y * jnp.cos(x)), y

        (_, y), gradients = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(weights, x)
        return y, gradients

    expected = run()
    monkeypatch.setattr(autoencoder, "MOST_POSITIONS", height * width - 1)
    monkeypatch.setattr(autoencoder, "QUERY_BLOCK", 64)
    found = run()
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected[1]))
    np.testing.assert_allclose(found[0], expected[0], rtol=0, atol=1e-6 * np.abs(expected[0]).max())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * largest), found[1], expected[1])


def test_attention_is_blocked_above_1024_pixels_only_and_its_memory_then_grows_with_the_positions():
    """A plain attention over 16,384 positions holds 1 GiB of logits, and more of what softmax makes of them."""

    def lowered(side):
        x = jax.ShapeDtypeStruct((1, side, side, 32), jnp.float32)
        return jax.jit(Attention(Computing()).apply).lower(attention_weights(32), x)

    assert "while" not in lowered(64).as_text() and "while" in lowered(65).as_text()
    small, large = (lowered(side).compile().memory_analysis().temp_size_in_bytes for side in (72, 144))
    assert large < 4.5 * small and large < 2**28
