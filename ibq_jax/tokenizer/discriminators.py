"""The discriminators by name, and what they share: one state, one training step, one loss for the tokenizer.

Shapes: images and reconstructions [B, H, W, 3] in [-1, 1]; logits [B, h', w', N].

| name | network | sees |
|---|---|---|
| patch | PatchGAN with batch norms (`discriminator.py`), as the released code has it | images |
| stylegan | StyleGAN2's residual network (`style_discriminator.py`) | images |
| dino | small heads (`feature_discriminator.py`) | hidden maps of the frozen network `discriminator.net` |
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from ibq_jax.base.sharding import WeightPlacement
from ibq_jax.base.state import apply_gradient
from ibq_jax.pretrained.frozen_nets import NETS, resized
from ibq_jax.tokenizer import losses, spectral_norm
from ibq_jax.tokenizer.diff_augment import augment, augmentations, crop, draw, draw_crop
from ibq_jax.tokenizer.discriminator import RUNNING, PatchDiscriminator
from ibq_jax.tokenizer.feature_discriminator import FeatureDiscriminator
from ibq_jax.tokenizer.micro_batches import MicroBatches, merge
from ibq_jax.tokenizer.model import used_in_model_type
from ibq_jax.tokenizer.style_discriminator import StyleDiscriminator

NONE, ON_NET = "none", "dino"
SPECTRAL = "spectral"  # where spectral normalisation keeps its vectors among `batch_stats`
REAL, FAKE, AGAINST = 0, 1, 2  # numbers of the augmentations' random draws in a step
CROPS = {REAL: 3, FAKE: 3, AGAINST: 4}  # those of crops: as in VAR's code, a discriminator's step has one for all


def _patch(config: ConfigDict, dtype: jnp.dtype) -> nn.Module:
    return PatchDiscriminator(config.channels, config.num_layers, config.norm_group, dtype)


def _stylegan(config: ConfigDict, dtype: jnp.dtype) -> nn.Module:
    return StyleDiscriminator(config.channels, config.norm_group, dtype)


def _dino(config: ConfigDict, dtype: jnp.dtype) -> nn.Module:
    return FeatureDiscriminator(config.channels, config.norm_group, config.heads, dtype)


DISCRIMINATORS: dict[str, Callable[[ConfigDict, jnp.dtype], nn.Module]] = {
    "patch": _patch,
    "stylegan": _stylegan,
    ON_NET: _dino,
}


def has_discriminator(config: ConfigDict) -> bool:
    """Returns whether a tokenizer's config trains against a discriminator."""
    return bool(config.loss.adversarial_weight) and config.discriminator.name != NONE


def frozen_net(config: ConfigDict) -> str | None:
    """Returns the name of the frozen network that a config's discriminator looks through, None if it needs none."""
    return config.discriminator.net if has_discriminator(config) and config.discriminator.name == ON_NET else None


@flax.struct.dataclass
class DiscriminatorState:
    """The discriminator's part of the train state; `batch_stats` is all that it keeps besides weights."""

    params: dict
    optimizer: optax.OptState
    batch_stats: dict
    lecam: losses.LecamAverages


@dataclass(frozen=True)
class DiscriminatorTrainer:
    """A config's discriminator with its training step; its methods are pure functions of their arguments.

    An argument `net` is the weights of the frozen network that it looks through, None if it needs none.
    """

    config: ConfigDict
    mesh: Mesh
    optimizer: optax.GradientTransformation

    @cached_property
    def module(self) -> nn.Module:
        """The network whose weights are trained: what it sees -> logits."""
        return DISCRIMINATORS[self.config.discriminator.name](self.config.discriminator, self._dtype)

    @cached_property
    def placement(self) -> WeightPlacement:
        """The places of its parameters: in the state, and where it computes with them."""
        return WeightPlacement.of(lambda: self.create(jax.random.key(0)).params, self.mesh)

    @property
    def _dtype(self) -> jnp.dtype:
        return jnp.dtype(self.config.dtype)

    @property
    def _micro_batches(self) -> MicroBatches:
        return MicroBatches(self.config.train.grad_accum_steps, self.mesh)

    def create(self, key: jax.Array) -> DiscriminatorState:
        """Returns the state before the first step, its parameters boxed with their logical axis names."""
        config, size = self.config.discriminator, self.config.data.image_size
        seen: Any = jnp.zeros((max(1, config.norm_group), size, size, 3))
        if config.name == ON_NET:
            weights = NETS[config.net].weight_shapes()
            shapes = jax.eval_shape(partial(self._see, draws={}), seen, net=weights)
            seen = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        variables = self.module.init(key, seen)
        kept = dict(variables.get(RUNNING, {}))
        if config.spectral_norm:
            vectors = spectral_norm.initial_vectors(jax.random.fold_in(key, 1), nn.meta.unbox(variables["params"]))
            kept[SPECTRAL] = vectors
        return DiscriminatorState(
            params=variables["params"],
            optimizer=self.optimizer.init(variables["params"]),
            batch_stats=kept,
            lecam=losses.LecamAverages.zeros(),
        )

    def train(
        self, old: DiscriminatorState, images: jax.Array, reconstructions: jax.Array, step: jax.Array, net: dict | None
    ) -> tuple[DiscriminatorState, dict[str, jax.Array]]:
        """Returns (the discriminator updated on images and reconstructions, metrics)."""
        config, settings = self.config.loss, self.config.discriminator
        started = self._started(step)

        def loss(params):
            params, kept = self._normalised(params, old.batch_stats)
            real, kept = self._discriminate(params, kept, images, self._draws(step, REAL), net)
            fake = jax.lax.stop_gradient(reconstructions)
            fake, kept = self._discriminate(params, kept, fake, self._draws(step, FAKE), net)
            averages = old.lecam.update(jnp.mean(real), jnp.mean(fake), 1.0 - started * (1.0 - config.lecam_decay))
            total, scalars = losses.discriminator_loss(real, fake, averages, config.lecam_weight, settings.loss)
            if settings.r1_weight:
                penalty = self._r1(params, kept, images, step, net)
                total += 0.5 * settings.r1_weight * settings.r1_every * penalty
                scalars |= {"loss": total, "r1": penalty}
            return started * total, (kept, averages, scalars)

        gradient, (kept, averages, scalars) = jax.grad(loss, has_aux=True)(self._weights(old))
        gradient = self.placement.scatter(gradient)
        params, optimizer = apply_gradient(self.optimizer, gradient, old.optimizer, old.params)
        metrics = {f"discriminator/{name}": value for name, value in scalars.items()}
        metrics["discriminator/gradient_norm"] = optax.tree.norm(gradient)
        return DiscriminatorState(params=params, optimizer=optimizer, batch_stats=kept, lecam=averages), metrics

    def loss_of(
        self, state: DiscriminatorState, reconstructions: jax.Array, step: jax.Array, net: dict | None
    ) -> tuple[jax.Array, DiscriminatorState]:
        """Returns (the tokenizer's adversarial loss, the discriminator with updated statistics)."""
        params, kept = self._normalised(self._weights(state), state.batch_stats)
        fake, kept = self._discriminate(params, kept, reconstructions, self._draws(step, AGAINST), net)
        return losses.ADVERSARIAL_LOSSES[self.config.loss.adversarial](fake), replace(state, batch_stats=kept)

    def share(self, step: jax.Array) -> jax.Array:
        """Returns the share of its weight that the tokenizer's adversarial loss has at a step: 0, then up to 1."""
        settings, share = self.config.discriminator, self._started(step)
        if settings.ramp_steps:
            share *= jnp.minimum(1.0, (step - settings.start_step + 1) / settings.ramp_steps)
        return share

    def _started(self, step: jax.Array) -> jax.Array:
        return (step >= self.config.discriminator.start_step).astype(jnp.float32)

    def _weights(self, state: DiscriminatorState) -> dict:
        return self.placement.gather(state.params, self._dtype, used_in_model_type)

    def _normalised(self, params: dict, kept: dict) -> tuple[dict, dict]:
        """Returns (the parameters to compute with, what is kept), after spectral normalisation if that is on."""
        if SPECTRAL not in kept:
            return params, kept
        params, vectors = spectral_norm.normalise(params, kept[SPECTRAL])
        return params, kept | {SPECTRAL: vectors}

    def _draws(self, step: jax.Array, number: int) -> dict[str, jax.Array]:
        """Returns the augmentations' random numbers for one of a step's three looks at a batch, [B] each."""
        settings, count = self.config.discriminator, self.config.data.batch_size
        key = jax.random.fold_in(jax.random.key(self.config.seed), step)
        names, drawn = augmentations(settings.augment), {}
        if names:
            drawn |= draw(jax.random.fold_in(key, number), names, count)
        if settings.crop_probability:
            drawn |= draw_crop(jax.random.fold_in(key, CROPS[number]), settings.crop_probability, count)
        return drawn

    def _see(self, images: jax.Array, draws: dict[str, jax.Array], net: dict | None) -> Any:
        """Returns what the module gets of images: these augmented, or a frozen network's hidden maps of those."""
        settings, images = self.config.discriminator, augment(images, draws)
        if settings.name != ON_NET:
            return images
        frozen, images = NETS[settings.net], 0.5 * (images + 1.0)
        return frozen.maps(net, crop(images, resized(frozen, images, settings.net_side), draws), self._dtype)

    def _discriminate(self, params: dict, kept: dict, images: jax.Array, draws: dict, net: dict | None):
        """Returns (logits, what is kept, updated by this call)."""
        running = {name: leaves for name, leaves in kept.items() if name != SPECTRAL}

        def discriminate(micro_batch, draws):
            variables = {"params": params, RUNNING: running}
            seen = self._see(micro_batch, draws, net)
            logits, updated = self.module.apply(variables, seen, mutable=[RUNNING])
            return logits, updated.get(RUNNING, {})

        logits, updated = self._micro_batches.map(discriminate, images, draws)
        # Each micro-batch updates the same statistics, linearly in its own: the mean is the update by the whole batch.
        running = jax.tree.map(lambda new, old: jnp.mean(new, axis=0).astype(old.dtype), updated, running)
        return merge(logits), kept | running

    def _r1(self, params: dict, kept: dict, images: jax.Array, step: jax.Array, net: dict | None) -> jax.Array:
        """Returns the mean squared length of the logits' gradients at images, 0 but every `r1_every` steps."""
        running = {name: leaves for name, leaves in kept.items() if name != SPECTRAL}

        def penalty(params):
            def of_micro_batch(micro_batch, draws):
                def logits(images):
                    seen = self._see(images, draws, net)
                    return self.module.apply({"params": params, RUNNING: running}, seen)

                return losses.input_gradients(logits, micro_batch)

            return jnp.mean(self._micro_batches.map(of_micro_batch, images, self._draws(step, REAL)))

        due = step % self.config.discriminator.r1_every == 0
        return jax.lax.cond(due, penalty, lambda params: jnp.zeros(()), params)
