"""Values that a train step holds between its parts: a batch's pass through the tokenizer, and what that costs.

Shapes: B images [B, H, W, 3] in [-1, 1], latents [B, h, w, D], codes [B, h, w].
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ibq_jax.tokenizer.discriminators import DiscriminatorState


class Forward(NamedTuple):
    """One pass of a batch through the tokenizer, and the way back."""

    reconstructions: jax.Array  # [B, H, W, 3]
    latent_loss: jax.Array  # [], what latents and codes cost
    latents: jax.Array | None  # [B, h, w, D], if they were asked for
    indices: jax.Array  # [B, h, w]
    metrics: dict[str, jax.Array]
    last_input: jax.Array | None  # of the decoder's last layer, if the adaptive weight needs it
    pull_back_outputs: Callable

    def pull_back(self, of_reconstructions: jax.Array, of_latents: jax.Array | None = None) -> dict:
        """Returns the gradient of the trained parameters, given those of the loss at reconstructions and latents."""
        return self.pull_back_outputs((of_reconstructions, jnp.ones_like(self.latent_loss), of_latents))[0]


class Judged(NamedTuple):
    """The cost of a batch of reconstructions, without that of latents and codes."""

    discriminator: DiscriminatorState | None  # after its update
    loss: jax.Array  # []
    cotangent: jax.Array  # [B, H, W, 3], the loss's gradient at the reconstructions
    metrics: dict[str, jax.Array]
