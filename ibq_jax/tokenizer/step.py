"""The tokenizer's train state and train step, as pure functions.

Shapes: B images per step, in A micro-batches; images and reconstructions [B, H, W, 3] in [-1, 1].

One step (arXiv 2412.02692, section 3; order as released): reconstruct once; update the discriminator on the images and
the reconstructions; then update the autoencoder and the codebook against the new discriminator, through the same
forward pass.

Metrics of a step; those of a part that is switched off, or that the quantizer lacks, are absent:

| name | meaning |
|---|---|
| loss/total | what the tokenizer minimises: loss/nll + loss/codebook + weighted loss/adversarial |
| loss/nll, loss/l1, loss/lpips | l1 + weighted lpips; mean absolute error of values in [-1, 1]; LPIPS (0 if off) |
| loss/adversarial | non-saturating loss against the discriminator |
| loss/codebook, loss/quantizer, loss/entropy | weighted sum of the quantizer's loss and of its entropy loss |
| codebook/sample_entropy, codebook/batch_entropy | nats |
| codebook/max_probability, codebook/max_logit | mean over tokens of the chosen code's probability; largest logit |
| codebook/max_norm | largest length of a code |
| codebook/usage, codebook/dead_codes, codebook/perplexity | over the last `codebook_monitor.window_tokens` |
| discriminator/loss, discriminator/hinge, discriminator/lecam | hinge + weighted lecam |
| discriminator/logits_real, discriminator/logits_fake | mean logits of images and of reconstructions |
| discriminator/gradient_norm | global norm, before clipping |
| optimizer/gradient_norm, optimizer/learning_rate | of the tokenizer; the discriminator has the same rate |

Validation adds `validation/...`: psnr (dB), ssim, l1, lpips_NET, Frechet distances, usage, perplexity, entropy (nats)
and images (a count), see `ibq_jax.evaluate.reconstruction`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from ibq_jax.base.sharding import (
    AXES,
    WeightPlacement,
    abstract_state,
    batch_sharding,
    jit_step,
    replicated,
    with_sharding,
)
from ibq_jax.base.state import AveragedWeights, adam, apply_gradient, drop_schedule, moving_average
from ibq_jax.data.preprocess import to_float
from ibq_jax.pretrained.lpips import lpips, weight_shapes
from ibq_jax.tokenizer import losses
from ibq_jax.tokenizer.codebook_monitor import CodebookWindow
from ibq_jax.tokenizer.discriminator import PatchDiscriminator
from ibq_jax.tokenizer.model import TokenizerModel, build_model, downsampling, used_in_model_type
from ibq_jax.tokenizer.parts import at_rates, frozen_parts, learning_rates, modules_of, only, without
from ibq_jax.tokenizer.quantizers import WITH_TRAINED_ROWS


@flax.struct.dataclass
class DiscriminatorState:
    """The discriminator's part of the train state."""

    params: dict
    optimizer: optax.OptState
    batch_stats: dict
    lecam: losses.LecamAverages


@flax.struct.dataclass
class TokenizerState(AveragedWeights):
    """Everything that a step changes. `discriminator` is None if loss.adversarial_weight is 0.

    `optimizer` and `ema` hold nothing of parameters that finetune.freeze leaves as they are.
    """

    step: jax.Array
    params: dict
    optimizer: optax.OptState
    ema: dict
    discriminator: DiscriminatorState | None
    window: CodebookWindow


@dataclass(frozen=True)
class TokenizerTrainer:
    """The tokenizer's model, optimizer and step functions for one config on one mesh.

    Its methods are pure functions of their arguments. An argument `perceptual` is VGG16's weights for LPIPS, or None to
    switch the perceptual loss off.
    """

    config: ConfigDict
    mesh: Mesh
    steps_per_epoch: int

    @cached_property
    def model(self) -> TokenizerModel:
        return build_model(self.config, mesh=self.mesh)

    @cached_property
    def encoding_model(self) -> TokenizerModel:
        """The model at config.encode.precision, for everything that gives codes or reconstructions to somebody."""
        return self.model.for_encoding(self.config.encode.precision)

    @cached_property
    def discriminator(self) -> PatchDiscriminator:
        config = self.config.discriminator
        return PatchDiscriminator(
            channels=config.channels,
            num_layers=config.num_layers,
            norm_group=config.norm_group,
            dtype=jnp.dtype(self.config.dtype),
        )

    @cached_property
    def placement(self) -> WeightPlacement:
        """The places of the parameters: in the state, and where the model computes with them."""
        return WeightPlacement.of(lambda: self.create_state(0).params, self.mesh)

    @cached_property
    def discriminator_placement(self) -> WeightPlacement:
        """The places of the discriminator's parameters."""
        return WeightPlacement.of(lambda: self._create_discriminator(jax.random.key(0)).params, self.mesh)

    @cached_property
    def learning_rate(self) -> optax.Schedule:
        """Step -> the learning rate of both optimizers."""
        config = self.config.optimizer
        drops = tuple(epoch * self.steps_per_epoch for epoch in config.drop_epochs)
        return drop_schedule(config.learning_rate, config.warmup_steps, drops, config.drop_factor)

    @cached_property
    def optimizer(self) -> optax.GradientTransformation:
        """Adam, for the tokenizer and, with a separate state, for the discriminator."""
        config = self.config.optimizer
        return adam(self.learning_rate, beta1=config.beta1, beta2=config.beta2, gradient_clip=config.gradient_clip)

    @cached_property
    def tokenizer_optimizer(self) -> optax.GradientTransformation:
        """The tokenizer's Adam, at the rates of its parts."""
        rates = learning_rates(self.config)
        return self.optimizer if set(rates.values()) == {1.0} else at_rates(self.optimizer, rates)

    @cached_property
    def frozen(self) -> tuple[str, ...]:
        """The modules at the top of the parameters that are not trained."""
        return modules_of(frozen_parts(self.config))

    @cached_property
    def window_steps(self) -> int:
        """Number of steps after which an unchosen code no longer counts as used."""
        data = self.config.data
        tokens = data.batch_size * (data.image_size // downsampling(self.config)) ** 2
        return max(1, self.config.codebook_monitor.window_tokens // tokens)

    @cached_property
    def create_state(self) -> Callable[[int], TokenizerState]:
        """Seed -> the state before the first step, its parameters boxed with their logical axis names.

        Jitted, so that it is traced once for all who ask for its shapes.
        """
        return jax.jit(self._create_state)

    def _create_state(self, seed: int) -> TokenizerState:
        autoencoder_key, discriminator_key = jax.random.split(jax.random.key(seed))
        size = self.config.data.image_size
        params = self.model.init(autoencoder_key, jnp.zeros((1, size, size, 3)), method="initialize")["params"]
        window, trained = CodebookWindow.empty(self.config.codebook.size), without(params, self.frozen)
        return TokenizerState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            optimizer=self.tokenizer_optimizer.init(trained),
            ema=jax.tree.map(jnp.copy, trained),
            discriminator=self._create_discriminator(discriminator_key)
            if self.config.loss.adversarial_weight
            else None,
            window=jax.tree.map(lambda leaf: nn.LogicallyPartitioned(leaf, ("codes",)), window),
        )

    def _create_discriminator(self, key: jax.Array) -> DiscriminatorState:
        size = self.config.data.image_size
        images = jnp.zeros((max(1, self.config.discriminator.norm_group), size, size, 3))
        variables = self.discriminator.init(key, images)
        return DiscriminatorState(
            params=variables["params"],
            optimizer=self.optimizer.init(variables["params"]),
            batch_stats=variables["batch_stats"],
            lecam=losses.LecamAverages.zeros(),
        )

    def train_step(self, state: TokenizerState, perceptual: dict | None, images: jax.Array):
        """Takes one step on images [B, H, W, 3], uint8 or float.

        Returns:
            (state, metrics): the metrics of the module's table, float32 scalars, and "finite", a bool.
        """
        images = to_float(images)
        weights = self.placement.gather(state.params, jnp.dtype(self.config.dtype), used_in_model_type)
        frozen = only(weights, self.frozen)
        (reconstructions, codebook_loss), pull_back, (indices, metrics) = jax.vjp(
            lambda trained: self._reconstruct(trained | frozen, images), without(weights, self.frozen), has_aux=True
        )
        discriminator = state.discriminator
        if discriminator is not None:
            discriminator, scalars = self._train_discriminator(discriminator, images, reconstructions, state.step)
            metrics |= scalars
        (image_loss, (discriminator, scalars)), cotangent = jax.value_and_grad(self._image_loss, has_aux=True)(
            reconstructions, discriminator, perceptual, images, state.step
        )
        (gradient,) = pull_back((cotangent, jnp.ones_like(codebook_loss)))
        gradient = self.placement.scatter(gradient)
        params, optimizer, ema = self._update(gradient, state)
        step, warmup = state.step + 1, self.config.finetune.discriminator_warmup_steps
        state = TokenizerState(
            step=step,
            params=params,
            optimizer=optimizer,
            ema=ema,
            discriminator=discriminator,
            window=state.window.update(indices, step, self.window_steps),
        )
        metrics |= scalars | {
            "loss/total": image_loss + codebook_loss,
            "optimizer/gradient_norm": optax.tree.norm(gradient),
            "optimizer/learning_rate": self.learning_rate(jnp.maximum(0, step - 1 - warmup) if warmup else step - 1),
        }
        metrics["finite"] = jnp.isfinite(sum(metrics.values()))
        if self.model.quantizer in WITH_TRAINED_ROWS:
            metrics["codebook/max_norm"] = jnp.sqrt(jnp.max(jnp.sum(params["quantize"]["codebook"] ** 2, axis=1)))
        return state, metrics | state.window.metrics(step, self.window_steps)

    def _update(self, gradient: dict, state: TokenizerState) -> tuple[dict, optax.OptState, dict]:
        """Returns (parameters, optimizer, average) after a step, or as they were if only the discriminator learns."""
        before = without(state.params, self.frozen)
        params, optimizer = apply_gradient(self.tokenizer_optimizer, gradient, state.optimizer, before)
        updated = params, optimizer, moving_average(state.ema, params, self.config.optimizer.ema_decay)
        if warmup := self.config.finetune.discriminator_warmup_steps:
            old = before, state.optimizer, state.ema
            updated = jax.tree.map(lambda new, old: jnp.where(state.step < warmup, old, new), updated, old)
        params, optimizer, ema = updated
        return {**state.params, **params}, optimizer, ema

    def reconstruct(self, params: dict, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """uint8 [B, H, W, 3] -> (reconstructions float32 in [-1, 1], codes [B, h, w]), as for evaluation."""
        variables = {"params": params}
        indices = self.encoding_model.apply(variables, to_float(images), method="encode")
        return jnp.clip(self.encoding_model.apply(variables, indices, method="decode"), -1.0, 1.0), indices

    def _reconstruct(self, params: dict, images: jax.Array):
        """Returns ((reconstructions, codebook loss), (codes, metrics))."""

        def reconstruct(micro_batch):
            reconstruction, quantized = self.model.apply({"params": params}, micro_batch)
            scalars = {
                "loss/quantizer": quantized.quant_loss,
                "loss/entropy": quantized.entropy_loss,
                "codebook/sample_entropy": quantized.sample_entropy,
                "codebook/batch_entropy": quantized.batch_entropy,
                "codebook/max_probability": quantized.max_probability,
            }
            scalars = {name: value for name, value in scalars.items() if value is not None}
            maxima = {} if quantized.max_logit is None else {"codebook/max_logit": quantized.max_logit}
            return reconstruction, quantized.indices, scalars, maxima

        reconstructions, indices, scalars, maxima = self._map_micro_batches(reconstruct, images)
        scalars = jax.tree.map(jnp.mean, scalars)
        weights = self.config.loss
        loss = weights.quantizer_weight * scalars["loss/quantizer"] + weights.entropy_weight * scalars["loss/entropy"]
        metrics = scalars | {"loss/codebook": loss} | jax.tree.map(jnp.max, maxima)
        return (_merge(reconstructions), loss), (_merge(indices), jax.lax.stop_gradient(metrics))

    def _train_discriminator(self, old: DiscriminatorState, images: jax.Array, reconstructions: jax.Array, step):
        """Returns (the discriminator updated on images and reconstructions, metrics)."""
        config = self.config.loss
        started = (step >= self.config.discriminator.start_step).astype(jnp.float32)

        def loss(params):
            real, batch_stats = self._discriminate(params, old.batch_stats, images)
            fake, batch_stats = self._discriminate(params, batch_stats, jax.lax.stop_gradient(reconstructions))
            averages = old.lecam.update(jnp.mean(real), jnp.mean(fake), 1.0 - started * (1.0 - config.lecam_decay))
            total, scalars = losses.discriminator_loss(real, fake, averages, config.lecam_weight)
            return started * total, (batch_stats, averages, scalars)

        gradient, (batch_stats, averages, scalars) = jax.grad(loss, has_aux=True)(self._discriminator_weights(old))
        gradient = self.discriminator_placement.scatter(gradient)
        params, optimizer = apply_gradient(self.optimizer, gradient, old.optimizer, old.params)
        metrics = {f"discriminator/{name}": value for name, value in scalars.items()}
        metrics["discriminator/gradient_norm"] = optax.tree.norm(gradient)
        return DiscriminatorState(params=params, optimizer=optimizer, batch_stats=batch_stats, lecam=averages), metrics

    def reconstruction_loss(
        self, images: jax.Array, reconstructions: jax.Array, perceptual: dict | None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Returns the loss of reconstructions [B, H, W, 3] without its adversarial part, and its terms by name.

        A subclass may replace it (see examples/train_with_another_loss.py); "l1" has to stay among the terms.
        """
        distance = jnp.zeros((images.shape[0],))
        if perceptual is not None:
            measure = partial(lpips, perceptual, dtype=jnp.dtype(self.config.dtype))
            distance = _merge(self._map_micro_batches(measure, images, reconstructions))
        return losses.reconstruction_nll(images, reconstructions, distance, self.config.loss.perceptual_weight)

    def _image_loss(
        self, reconstructions, discriminator: DiscriminatorState | None, perceptual: dict | None, images, step
    ):
        """Returns the loss of the reconstructions: (loss, (discriminator with updated statistics, metrics))."""
        config = self.config.loss
        loss, scalars = self.reconstruction_loss(images, reconstructions, perceptual)
        metrics = {f"loss/{name}": value for name, value in scalars.items()}
        if discriminator is not None:
            weights = self._discriminator_weights(discriminator)
            fake, batch_stats = self._discriminate(weights, discriminator.batch_stats, reconstructions)
            discriminator = replace(discriminator, batch_stats=batch_stats)
            metrics["loss/adversarial"] = losses.non_saturating(fake)
            started = (step >= self.config.discriminator.start_step).astype(jnp.float32)
            loss += config.adversarial_weight * started * metrics["loss/adversarial"]
        return loss, (discriminator, metrics)

    def _discriminator_weights(self, discriminator: DiscriminatorState) -> dict:
        dtype = jnp.dtype(self.config.dtype)
        return self.discriminator_placement.gather(discriminator.params, dtype, used_in_model_type)

    def _discriminate(self, params: dict, batch_stats: dict, images: jax.Array):
        """Returns (logits, batch statistics updated by this call)."""

        def discriminate(micro_batch):
            variables = {"params": params, "batch_stats": batch_stats}
            logits, updated = self.discriminator.apply(variables, micro_batch, mutable=["batch_stats"])
            return logits, updated["batch_stats"]

        logits, updated = self._map_micro_batches(discriminate, images)
        # Each micro-batch updates the same statistics, linearly in its own: the mean is the update by the whole batch.
        batch_stats = jax.tree.map(lambda new, old: jnp.mean(new, axis=0).astype(old.dtype), updated, batch_stats)
        return _merge(logits), batch_stats

    def _map_micro_batches(self, function: Callable, *arrays: jax.Array):
        """Applies `function` to A micro-batches of arrays [B, ...] in turn; every output gets a leading axis A.

        It is differentiable. The backward pass computes each micro-batch again, so that the activations of only one
        are held in memory.
        """
        count = self.config.train.grad_accum_steps
        if count == 1:
            return jax.tree.map(lambda leaf: leaf[None], function(*arrays))
        sharding = NamedSharding(self.mesh, PartitionSpec(None, AXES))
        batches = tuple(jax.lax.with_sharding_constraint(x.reshape(count, -1, *x.shape[1:]), sharding) for x in arrays)
        return jax.lax.map(lambda batch: jax.checkpoint(function)(*batch), batches)


def _merge(micro_batches: jax.Array) -> jax.Array:
    """Micro-batches [A, b, ...] -> the whole batch [B, ...]."""
    return micro_batches.reshape(-1, *micro_batches.shape[2:])


def jit_train_step(trainer: TokenizerTrainer):
    """Returns `trainer.train_step(state, perceptual, images)`, jitted and sharded over its mesh; donates the state."""
    mesh, changes = trainer.mesh, trainer.config.train.compiler_options
    return jit_step(trainer.train_step, trainer.create_state, mesh, (replicated(mesh), batch_sharding(mesh)), changes)


def abstract_arguments(trainer: TokenizerTrainer) -> tuple:
    """Returns shapes, types and shardings of the step's arguments, with VGG16 if loss.perceptual_weight is not 0."""
    mesh, data = trainer.mesh, trainer.config.data
    state, _ = abstract_state(trainer.create_state, mesh, 0)
    perceptual = None
    if trainer.config.loss.perceptual_weight:
        perceptual = with_sharding(weight_shapes(), replicated(mesh))
    shape = (data.batch_size, data.image_size, data.image_size, 3)
    return state, perceptual, jax.ShapeDtypeStruct(shape, jnp.uint8, sharding=batch_sharding(mesh))
