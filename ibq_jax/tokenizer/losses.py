"""The tokenizer's training losses as pure functions (arXiv 2412.02692, section 3; the adversarial part as released).

Shapes: images and reconstructions [B, H, W, 3] in [-1, 1]; logits [B, h', w', N] with N = 1 for patches; every loss is
a float32 scalar. docs/losses.md has the table of all losses and their sources.
"""

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import optax


def reconstruction_nll(
    images: jax.Array, reconstructions: jax.Array, perceptual: jax.Array, perceptual_weight: float
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns the mean absolute error plus the weighted mean of `perceptual`, and the terms by name.

    `perceptual` is LPIPS per image, [B]; zeros if it is switched off.
    """
    l1 = jnp.mean(jnp.abs(images - reconstructions))
    lpips = jnp.mean(perceptual)
    nll = l1 + perceptual_weight * lpips
    return nll, {"nll": nll, "l1": l1, "lpips": lpips}


def non_saturating(logits_fake: jax.Array) -> jax.Array:
    """Returns the autoencoder's adversarial loss: softplus(-mean logit of an image), averaged over images."""
    return jnp.mean(jax.nn.softplus(-jnp.mean(logits_fake, axis=(1, 2, 3))))


def raise_logits(logits_fake: jax.Array) -> jax.Array:
    """Returns the autoencoder's loss that goes with `hinge` (arXiv 1705.02894): minus the mean logit."""
    return -jnp.mean(logits_fake)


def least_squares_of_fakes(logits_fake: jax.Array) -> jax.Array:
    """Returns the autoencoder's least-squares loss (arXiv 1611.04076, equation 9): half the mean of (logit - 1)^2."""
    return 0.5 * jnp.mean((logits_fake - 1.0) ** 2)


def hinge(logits_real: jax.Array, logits_fake: jax.Array) -> jax.Array:
    """Returns the discriminator's hinge loss, averaged over patches."""
    return 0.5 * (jnp.mean(jax.nn.relu(1.0 - logits_real)) + jnp.mean(jax.nn.relu(1.0 + logits_fake)))


def logistic(logits_real: jax.Array, logits_fake: jax.Array) -> jax.Array:
    """Returns the discriminator's cross-entropy (arXiv 1406.2661), halved as `hinge` is and averaged over patches."""
    return 0.5 * (jnp.mean(jax.nn.softplus(-logits_real)) + jnp.mean(jax.nn.softplus(logits_fake)))


def least_squares(logits_real: jax.Array, logits_fake: jax.Array) -> jax.Array:
    """Returns the discriminator's least-squares loss (arXiv 1611.04076, equation 9), averaged over patches."""
    return 0.5 * (jnp.mean((logits_real - 1.0) ** 2) + jnp.mean(logits_fake**2))


# By name, of the tokenizer (loss.adversarial) and of the discriminator (discriminator.loss).
ADVERSARIAL_LOSSES: dict[str, Callable] = {
    "non_saturating": non_saturating,
    "hinge": raise_logits,
    "lsgan": least_squares_of_fakes,
}
DISCRIMINATOR_LOSSES: dict[str, Callable] = {"hinge": hinge, "non_saturating": logistic, "lsgan": least_squares}


def input_gradients(logits_of: Callable[[jax.Array], jax.Array], images: jax.Array) -> jax.Array:
    """Returns the squared length of the gradient of an image's mean logit for each of `images`, [B].

    Its mean over images times half a weight is the R1 penalty (arXiv 1801.04406, equation 9). `logits_of` maps images
    to logits; if it looks at several images together, the gradient is that of the sum over images.
    """
    gradient = jax.grad(lambda x: jnp.sum(jnp.mean(logits_of(x), axis=(1, 2, 3))))(images)
    return jnp.sum(gradient**2, axis=(1, 2, 3))


def adaptive_weight(nll_gradient, adversarial_gradient, limit: float) -> jax.Array:
    """Returns VQGAN's weight of the adversarial loss (arXiv 2012.09841, equation 7), clipped to [0, limit].

    It is the ratio of the lengths of two losses' gradients with respect to the decoder's last layer.
    """
    ratio = optax.tree.norm(nll_gradient) / (optax.tree.norm(adversarial_gradient) + 1e-4)
    return jax.lax.stop_gradient(jnp.clip(ratio, 0.0, limit))


@flax.struct.dataclass
class LecamAverages:
    """Moving averages of the discriminator's mean logits on images and reconstructions; part of the train state."""

    real: jax.Array
    fake: jax.Array

    @classmethod
    def zeros(cls) -> "LecamAverages":
        return cls(real=jnp.zeros((), jnp.float32), fake=jnp.zeros((), jnp.float32))

    def update(self, real_mean: jax.Array, fake_mean: jax.Array, decay: float) -> "LecamAverages":
        """Returns the averages moved towards the batch's means; no gradient flows through them."""
        real_mean, fake_mean = jax.lax.stop_gradient((real_mean, fake_mean))
        return LecamAverages(
            real=decay * self.real + (1.0 - decay) * real_mean,
            fake=decay * self.fake + (1.0 - decay) * fake_mean,
        )


def lecam(logits_real: jax.Array, logits_fake: jax.Array, averages: LecamAverages) -> jax.Array:
    """Returns the LeCAM regulariser (arXiv 2104.03310); the caller has already updated the averages with this batch."""
    real_term = jnp.mean(jax.nn.relu(logits_real - averages.fake) ** 2)
    fake_term = jnp.mean(jax.nn.relu(averages.real - logits_fake) ** 2)
    return real_term + fake_term


def discriminator_loss(
    logits_real: jax.Array, logits_fake: jax.Array, averages: LecamAverages, lecam_weight: float, name: str = "hinge"
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns the loss `name` of `DISCRIMINATOR_LOSSES` plus the weighted LeCAM regulariser, and the terms by name."""
    loss = DISCRIMINATOR_LOSSES[name](logits_real, logits_fake)
    lecam_loss = lecam(logits_real, logits_fake, averages)
    total = loss + lecam_weight * lecam_loss
    return total, {
        "loss": total,
        name: loss,
        "lecam": lecam_loss,
        "logits_real": jnp.mean(logits_real),
        "logits_fake": jnp.mean(logits_fake),
    }
