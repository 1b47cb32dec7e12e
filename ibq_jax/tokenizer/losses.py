"""The tokenizer's training losses as pure functions (arXiv 2412.02692, section 3; the adversarial part as released).

Shapes: images and reconstructions [B, H, W, 3] in [-1, 1]; patch logits [B, h', w', 1]; every loss is a float32 scalar.
"""

import flax.struct
import jax
import jax.numpy as jnp


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


def hinge(logits_real: jax.Array, logits_fake: jax.Array) -> jax.Array:
    """Returns the discriminator's hinge loss, averaged over patches."""
    return 0.5 * (jnp.mean(jax.nn.relu(1.0 - logits_real)) + jnp.mean(jax.nn.relu(1.0 + logits_fake)))


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
    logits_real: jax.Array, logits_fake: jax.Array, averages: LecamAverages, lecam_weight: float
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns the hinge loss plus the weighted LeCAM regulariser, and the terms by name."""
    hinge_loss = hinge(logits_real, logits_fake)
    lecam_loss = lecam(logits_real, logits_fake, averages)
    total = hinge_loss + lecam_weight * lecam_loss
    return total, {
        "loss": total,
        "hinge": hinge_loss,
        "lecam": lecam_loss,
        "logits_real": jnp.mean(logits_real),
        "logits_fake": jnp.mean(logits_fake),
    }
