"""Each loss against its formula in NumPy, and all of them against the released code's first step."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from support import released, torch_discriminators
from support.published_names import discriminator_from_torch

from ibq_jax.interop.tokenizer_names import (
    discriminator_fields,
    model_fields,
    tokenizer_from_torch,
)
from ibq_jax.pretrained.lpips import load_weights, lpips
from ibq_jax.tokenizer import losses
from ibq_jax.tokenizer.discriminator import PatchDiscriminator
from ibq_jax.tokenizer.model import TokenizerModel


@pytest.fixture
def logits() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    return random.normal(0.5, 2, (4, 3, 3, 1)), random.normal(-0.5, 2, (4, 3, 3, 1))


def test_reconstruction_nll():
    random = np.random.default_rng(1)
    x, y, perceptual = random.normal(size=(2, 4, 4, 3)), random.normal(size=(2, 4, 4, 3)), np.array([0.25, 0.5])
    nll, scalars = losses.reconstruction_nll(x, y, perceptual, 2.0)
    assert float(nll) == pytest.approx(np.abs(x - y).mean() + 2.0 * 0.375)
    assert float(scalars["l1"]) == pytest.approx(np.abs(x - y).mean())
    assert float(scalars["lpips"]) == pytest.approx(0.375)
    assert scalars["nll"] is nll


def test_non_saturating_takes_each_images_mean_logit(logits):
    _, fake = logits
    assert float(losses.non_saturating(fake)) == pytest.approx(np.log1p(np.exp(-fake.mean((1, 2, 3)))).mean())


def test_hinge_is_patch_by_patch(logits):
    real, fake = logits
    expected = 0.5 * (np.maximum(1 - real, 0).mean() + np.maximum(1 + fake, 0).mean())
    assert float(losses.hinge(real, fake)) == pytest.approx(expected)


@pytest.mark.parametrize("name", losses.DISCRIMINATOR_LOSSES)
def test_both_sides_losses_have_pytorchs_values_and_gradients(name, logits):
    real, fake = (torch.tensor(part, requires_grad=True) for part in logits)
    torch_discriminators.discriminator_loss(name, real, fake).backward()
    for number, expected in enumerate((real.grad, fake.grad)):
        gradient = jax.grad(losses.DISCRIMINATOR_LOSSES[name], number)(*map(jnp.float32, logits))
        released.assert_close(gradient, expected.numpy(), 1e-6)
    fake.grad = None
    ours, gradient = jax.value_and_grad(losses.ADVERSARIAL_LOSSES[name])(jnp.float32(logits[1]))
    theirs = torch_discriminators.adversarial_loss(name, fake)
    theirs.backward()
    assert float(ours) == pytest.approx(theirs.item(), rel=1e-6)
    released.assert_close(gradient, fake.grad.numpy(), 1e-6)
    total, scalars = losses.discriminator_loss(*logits, losses.LecamAverages.zeros(), 0.0, name)
    theirs = torch_discriminators.discriminator_loss(name, real, fake).item()
    assert float(total) == float(scalars[name]) == pytest.approx(theirs, rel=1e-6)


def test_lecam_averages_start_at_zero_and_move_without_gradient(logits):
    real, fake = logits
    moved = losses.LecamAverages.zeros().update(real.mean(), fake.mean(), 0.9).update(1.0, -1.0, 0.9)
    assert float(moved.real) == pytest.approx(0.09 * real.mean() + 0.1)
    assert float(moved.fake) == pytest.approx(0.09 * fake.mean() - 0.1)
    gradient = jax.grad(lambda mean: losses.LecamAverages.zeros().update(mean, mean, 0.9).real)(1.0)
    assert gradient == 0


def test_lecam(logits):
    real, fake = logits
    averages = losses.LecamAverages(real=jnp.float32(0.3), fake=jnp.float32(-0.2))
    expected = (np.maximum(real + 0.2, 0) ** 2).mean() + (np.maximum(0.3 - fake, 0) ** 2).mean()
    assert float(losses.lecam(real, fake, averages)) == pytest.approx(expected)


def test_discriminator_loss_adds_up(logits):
    real, fake = logits
    averages = losses.LecamAverages(real=jnp.float32(0.3), fake=jnp.float32(-0.2))
    total, scalars = losses.discriminator_loss(real, fake, averages, 0.05)
    assert float(total) == pytest.approx(float(losses.hinge(real, fake) + 0.05 * losses.lecam(real, fake, averages)))
    assert float(scalars["logits_real"]) == pytest.approx(real.mean())
    assert float(scalars["logits_fake"]) == pytest.approx(fake.mean())


def test_losses_of_the_released_codes_first_step(tmp_path):
    """Compares the losses that do not depend on the discriminator's first update."""
    state_dict, published, _ = released.tokenizer()
    steps = released.load("train_steps")
    images, log = released.nhwc(steps["images"][0]), json.loads(str(steps["logs"]))[0]
    save_file(dict(released.vgg16()), tmp_path / "vgg16.safetensors")
    weights = load_weights(tmp_path / "vgg16.safetensors")

    params = tokenizer_from_torch(state_dict, published, use_ema=False)
    reconstructions, quantized = jax.jit(TokenizerModel(**model_fields(published)).apply)({"params": params}, images)
    discriminator = PatchDiscriminator(**discriminator_fields(published), norm_group=0)
    variables = discriminator_from_torch(state_dict, published)
    real, fake = (discriminator.apply(variables, batch) for batch in (images, reconstructions))

    nll, parts = losses.reconstruction_nll(
        images, reconstructions, jax.jit(lpips)(weights, images, reconstructions), 1.0
    )
    averages = losses.LecamAverages.zeros().update(real.mean(), fake.mean(), 0.999)
    total, scalars = losses.discriminator_loss(real, fake, averages, 0.05)
    found = {
        "nll_loss": nll,
        "reconstruct_loss": parts["l1"],
        "perceptual_loss": parts["lpips"],
        "disc_loss": total,
        "lecam_loss": scalars["lecam"],
        "logits_real": scalars["logits_real"],
        "logits_fake": scalars["logits_fake"],
        "codebook_loss": quantized.quant_loss + 0.05 * quantized.entropy_loss,
    }
    for name, value in found.items():
        assert float(value) == pytest.approx(log[f"train/{name}"], rel=1e-4), name
