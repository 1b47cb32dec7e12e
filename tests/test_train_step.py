"""The train step: against four steps of the released code, on several meshes, in micro-batches."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ibq_jax.base.config import load_config
from ibq_jax.base.sharding import create_sharded, make_mesh
from ibq_jax.interop import names
from ibq_jax.tokenizer.perceptual import HEADS_FILE, STAGES
from ibq_jax.tokenizer.train import Trainer

GOLDEN = Path(__file__).with_name("golden")
CONFIGS = Path(__file__).parents[1] / "configs"
PUBLISHED_NAMES = {
    "train/total_loss": "loss/total",
    "train/nll_loss": "loss/nll",
    "train/reconstruct_loss": "loss/l1",
    "train/perceptual_loss": "loss/lpips",
    "train/codebook_loss": "loss/codebook",
    "train/codebook_quant_loss": "loss/quantizer",
    "train/codebook_entropy_loss": "loss/entropy",
    "train/codebook_sample_entropy_loss": "codebook/sample_entropy",
    "train/codebook_avg_entropy_loss": "codebook/average_entropy",
    "train/unsacled_g_loss": "loss/adversarial",
    "train/disc_loss": "adversary/discriminator",
    "train/lecam_loss": "adversary/lecam",
    "train/logits_real": "adversary/logits_real",
    "train/logits_fake": "adversary/logits_fake",
}


def random_vgg16() -> dict:
    """The deterministic VGG16 that the golden numbers were made with, and the real heads."""
    stages, i, in_channels = [], 0, 3
    for stage in STAGES:
        convolutions = []
        for _, channels in stage:
            r = np.random.RandomState(1000 + i)
            weight = r.standard_normal((channels, in_channels, 3, 3)).astype(np.float32)
            weight *= np.float32(np.sqrt(2 / (9 * in_channels)))
            bias = (r.standard_normal(channels) * 0.05).astype(np.float32)
            convolutions.append({"kernel": weight.transpose(2, 3, 1, 0), "bias": bias})
            i, in_channels = i + 1, channels
        stages.append(convolutions)
    heads = np.load(HEADS_FILE)
    return jax.tree.map(jnp.asarray, {"stages": stages, "heads": [heads[f"lin{i}"].reshape(-1) for i in range(5)]})


def small_config(*overrides: str):
    """openmoji32 at 16 pixels, shrunk until a step takes a moment."""
    fields = {
        "data.image_size": 16,
        "data.resize": 16,
        "data.batch_size": 16,
        "model.resolution": 16,
        "model.channel_multipliers": (1, 2),
        "codebook.size": 64,
        "codebook.dim": 8,
        "quantizer.entropy_group_tokens": 256,
        "discriminator.channels": 8,
        "discriminator.layers": 1,
        "discriminator.norm_group": 4,
    }
    arguments = [f"--config.{name}={value}" for name, value in fields.items()]
    return load_config(f"{CONFIGS}/tokenizer.py:openmoji32", [*arguments, *overrides])


def close(actual, expected, tolerance: float) -> None:
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * np.abs(expected).max())


@pytest.fixture(scope="module")
def released():
    with np.load(GOLDEN / "tokenizer.npz") as file:
        tensors = {name.removeprefix("sd/"): file[name] for name in file.files if name.startswith("sd/")}
        published = json.loads(str(file["config"]))
    with np.load(GOLDEN / "train_steps.npz") as file:
        steps = {name: file[name] for name in file.files}
    return tensors, published, steps


@pytest.fixture(scope="module")
def after_four_steps(released):
    tensors, published, steps = released
    layout = published["ddconfig"]
    config = small_config(
        *(f"--config.model.{ours}={layout[theirs]}" for ours, theirs in names.GENERATOR_CONFIG.items()),
        f"--config.codebook.size={published['n_embed']}",
        f"--config.codebook.dim={published['embed_dim']}",
        "--config.data.image_size=32",
        f"--config.data.batch_size={steps['images'].shape[1]}",
        "--config.quantizer.entropy_group_tokens=0",
        f"--config.discriminator.channels={published['loss']['disc_ndf']}",
        f"--config.discriminator.layers={published['loss']['disc_num_layers']}",
        "--config.discriminator.norm_group=0",
        "--config.optimizer.learning_rate=1e-3",
        "--config.optimizer.ema_decay=0.999",
    )
    trainer = Trainer(config, make_mesh({}, jax.devices()[:1]), steps_per_epoch=1)
    state = create_sharded(trainer.create_state, trainer.mesh, 0)
    discriminator = names.discriminator_from_torch(tensors, published)
    params = names.tokenizer_from_torch(tensors, published, use_ema=False)
    state = state.replace(
        params=params,
        ema=names.tokenizer_from_torch(tensors, published, use_ema=True),
        adversary=state.adversary.replace(params=discriminator["params"], batch_stats=discriminator["batch_stats"]),
    )
    perceptual, step, logs, states = random_vgg16(), jax.jit(trainer.train_step), [], []
    images = [jnp.asarray(batch.transpose(0, 2, 3, 1)) for batch in steps["images"]]
    for batch in images:
        state, metrics = step(state, perceptual, batch)
        logs.append(jax.device_get(metrics))
        states.append(state)
    return states, logs


def test_four_steps_log_what_the_released_code_logged(released, after_four_steps):
    _, logs = after_four_steps
    published_logs = json.loads(str(released[2]["logs"]))
    assert len(logs) == len(published_logs) == 4
    for step, (ours, theirs) in enumerate(zip(logs, published_logs, strict=True)):
        for published_name, name in PUBLISHED_NAMES.items():
            expected = theirs[published_name]
            assert abs(ours[name] - expected) < 1e-4 * max(1.0, abs(expected)), (step, name, ours[name], expected)


def test_first_gradients_are_the_released_ones(released, after_four_steps):
    first_moment = after_four_steps[0][0].optimizer[0].mu  # (1 - beta1) times the gradient after one step
    gradients = names.tokenizer_to_torch(jax.tree.map(lambda leaf: leaf / 0.5, first_moment))
    expected = {
        name.removeprefix("grad0/"): tensor for name, tensor in released[2].items() if name.startswith("grad0/")
    }
    assert len(expected) == 9
    for name, tensor in expected.items():
        close(gradients[name], tensor, 1e-4)


def test_four_steps_end_at_the_released_tensors(released, after_four_steps):
    steps, state = released[2], after_four_steps[0][-1]
    adversary = state.adversary
    ours = names.tokenizer_to_torch(state.params) | names.ema_to_torch(state.ema)
    ours |= names.discriminator_to_torch({"params": adversary.params, "batch_stats": adversary.batch_stats})
    expected = {name.removeprefix("final/"): steps[name] for name in steps if name.startswith("final/")}
    assert len(expected) > 20
    for name, tensor in expected.items():
        close(ours[name], tensor, 1e-3)
    assert ours["loss.discriminator.main.3.num_batches_tracked"] == 12
    close(adversary.lecam.real, steps["lecam_real"], 1e-3)
    close(adversary.lecam.fake, steps["lecam_fake"], 1e-3)
