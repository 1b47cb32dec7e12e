"""The tokenizer's train state and train step, as pure functions.

Shapes: B images per step, in A micro-batches; images and reconstructions [B, H, W, 3] in [-1, 1].

One step (arXiv 2412.02692, section 3; order as released): reconstruct once; update the discriminator on the images and
the reconstructions; then update the autoencoder and the codebook against the new discriminator, through the same
forward pass.

Metrics of a step; those of a part that is switched off, or that the quantizer lacks, are absent:

| name | meaning |
|---|---|
| loss/total | what is minimised: loss/nll + loss/codebook + weighted loss/adversarial and loss/alignment |
| loss/nll, loss/l1, loss/lpips | all distances, weighted; mean absolute error in [-1, 1]; LPIPS (0 if off) |
| loss/features, loss/logits, loss/alignment | of frozen networks, see `net_losses` |
| loss/alignment_adaptive_weight | VA-VAE's factor of alignment.weight |
| loss/adversarial, loss/adaptive_weight | loss.adversarial against the discriminator; VQGAN's factor of its weight |
| loss/codebook, loss/quantizer, loss/entropy | weighted sum of the quantizer's loss and of its entropy loss |
| codebook/sample_entropy, codebook/batch_entropy | nats |
| codebook/max_probability, codebook/max_logit | mean over tokens of the chosen code's probability; largest logit |
| codebook/max_norm | largest length of a code |
| codebook/usage, codebook/dead_codes, codebook/perplexity | over the last `codebook_monitor.window_tokens` |
| discriminator/loss, discriminator/hinge, discriminator/lecam, discriminator/r1 | hinge + weighted lecam and r1 |
| discriminator/logits_real, discriminator/logits_fake | mean logits of images and of reconstructions |
| discriminator/gradient_norm | global norm, before clipping |
| optimizer/gradient_norm, optimizer/learning_rate | of the tokenizer; the discriminator has the same rate |

Validation adds `validation/...`: psnr (dB), ssim, l1, lpips_NET, Frechet distances, usage, perplexity, entropy (nats)
and images (a count), see `ibq_jax.evaluate.reconstruction`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from ibq_jax.base.sharding import (
    WeightPlacement,
    abstract_state,
    batch_sharding,
    jit_step,
    replicated,
    with_sharding,
)
from ibq_jax.base.state import AveragedWeights, adam, adamw, apply_gradient, drop_schedule, moving_average
from ibq_jax.data.preprocess import to_float
from ibq_jax.tokenizer import losses
from ibq_jax.tokenizer.codebook_monitor import CodebookWindow
from ibq_jax.tokenizer.discriminators import DiscriminatorState, DiscriminatorTrainer, has_discriminator
from ibq_jax.tokenizer.forward import EncoderEnd, Forward, ForwardPass, Judged
from ibq_jax.tokenizer.last_layers import at_last_layer_of_decoder, at_last_layer_of_encoder
from ibq_jax.tokenizer.micro_batches import MicroBatches, merge
from ibq_jax.tokenizer.model import PROJECTION, TokenizerModel, build_model, downsampling, used_in_model_type
from ibq_jax.tokenizer.net_losses import (
    Nets,
    aligned_channels,
    alignment_gradients,
    initial_projection,
    measure_features,
    measure_logits,
    measure_lpips,
    weight_shapes,
)
from ibq_jax.tokenizer.parts import at_rates, frozen_parts, learning_rates, modules_of, without
from ibq_jax.tokenizer.quantizers import WITH_TRAINED_ROWS


@flax.struct.dataclass
class TokenizerState(AveragedWeights):
    """Everything that a step changes. `discriminator` is None if nothing is trained against one.

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

    Its methods are pure functions of their arguments. An argument `nets` is the frozen networks' weights by name
    (`net_losses.wanted_nets`), or None; the losses of those that it lacks are off.
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
    def adversarial(self) -> DiscriminatorTrainer:
        """The training of the discriminator, and its loss for the tokenizer."""
        return DiscriminatorTrainer(self.config, self.mesh, self.optimizer)

    @cached_property
    def discriminator(self) -> nn.Module:
        return self.adversarial.module

    @cached_property
    def placement(self) -> WeightPlacement:
        """The places of the parameters: in the state, and where the model computes with them."""
        return WeightPlacement.of(lambda: self.create_state(0).params, self.mesh)

    @cached_property
    def learning_rate(self) -> optax.Schedule:
        """Step -> the learning rate of both optimizers."""
        config = self.config.optimizer
        drops = tuple(epoch * self.steps_per_epoch for epoch in config.drop_epochs)
        return drop_schedule(config.learning_rate, config.warmup_steps, drops, config.drop_factor)

    @cached_property
    def optimizer(self) -> optax.GradientTransformation:
        """Adam or AdamW, for the tokenizer and, with a separate state, for the discriminator."""
        config = self.config.optimizer
        names = ("beta1", "beta2", "gradient_clip", "moment_dtype")
        fields: Any = {name: config[name] for name in names}
        if not config.weight_decay:
            return adam(self.learning_rate, **fields)
        return adamw(self.learning_rate, config.weight_decay, decays=lambda name: name.endswith("/kernel"), **fields)

    @cached_property
    def tokenizer_optimizer(self) -> optax.GradientTransformation:
        """The tokenizer's optimizer, at the rates of its parts."""
        rates = learning_rates(self.config)
        return self.optimizer if set(rates.values()) == {1.0} else at_rates(self.optimizer, rates)

    @cached_property
    def frozen(self) -> tuple[str, ...]:
        """The modules at the top of the parameters that are not trained."""
        return modules_of(frozen_parts(self.config))

    @cached_property
    def forward_pass(self) -> ForwardPass:
        return ForwardPass(self.config, self.model, self.micro_batches, self.frozen)

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
        if self.config.alignment.weight:
            key, channels = jax.random.fold_in(autoencoder_key, 1), aligned_channels(self.config)
            params = {**params, PROJECTION: initial_projection(self.config, key, channels)}
        discriminator = self.adversarial.create(discriminator_key) if has_discriminator(self.config) else None
        return self.first_state(params, discriminator)

    def first_state(self, params: dict, discriminator: DiscriminatorState | None) -> TokenizerState:
        """Returns the state before the first step of given parameters, boxed with their logical axis names or not."""
        window, trained = CodebookWindow.empty(self.config.codebook.size), without(params, self.frozen)
        return TokenizerState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            optimizer=self.tokenizer_optimizer.init(trained),
            ema=jax.tree.map(jnp.copy, trained),
            discriminator=discriminator,
            window=jax.tree.map(lambda leaf: nn.LogicallyPartitioned(leaf, ("codes",)), window),
        )

    def train_step(self, state: TokenizerState, nets: Nets | None, images: jax.Array):
        """Takes one step on images [B, H, W, 3], uint8 or float.

        Returns:
            (state, metrics): the metrics of the module's table, float32 scalars, and "finite", a bool.
        """
        images, nets = to_float(images), nets or {}
        weights = self.gathered(state.params)
        forward = self.run_forward(weights, images, nets)
        judged = self.judge(forward, weights, state, nets, images)
        gradient = self.placement.scatter(forward.pull_back(judged))
        return self.stepped(state, forward, judged, gradient)

    def gathered(self, params: dict) -> dict:
        """Returns a state's parameters where the model computes with them, and in the types that it does."""
        return self.placement.gather(params, jnp.dtype(self.config.dtype), used_in_model_type)

    def run_forward(self, weights: dict, images: jax.Array, nets: Nets, with_latents: bool = False) -> Forward:
        """Runs images [B, H, W, 3] in [-1, 1] through the tokenizer with gathered weights, for a step."""
        return self.forward_pass.run(weights, images, nets, with_latents)

    def judge(self, forward: Forward, weights: dict, state: TokenizerState, nets: Nets, images: jax.Array) -> Judged:
        """Updates the discriminator on images and reconstructions, and measures these against the new one."""
        discriminator, reconstructions, metrics = state.discriminator, forward.reconstructions, {}
        if discriminator is not None:
            net = nets.get(self.config.discriminator.net)
            discriminator, metrics = self.adversarial.train(discriminator, images, reconstructions, state.step, net)
        if discriminator is None or (forward.last_input is None and forward.encoder_end is None):
            (loss, (discriminator, scalars)), cotangent = jax.value_and_grad(self._image_loss, has_aux=True)(
                reconstructions, discriminator, nets, images, state.step
            )
            of_distances = cotangent
        else:
            loss, (discriminator, scalars), cotangent, of_distances = self._weighed_image_loss(
                forward, weights, discriminator, nets, images, state.step
            )
        judged = Judged(discriminator, loss, cotangent, metrics | scalars)
        if forward.encoder_end is None:
            return judged
        return self._align(forward.encoder_end, judged, of_distances, weights, nets, images)

    def stepped(self, state: TokenizerState, forward: Forward, judged: Judged, gradient: dict):
        """Returns (state, metrics) as `train_step` does, after an update along a gradient that is spread like it."""
        params, optimizer, ema = self._update(gradient, state)
        step, warmup = state.step + 1, self.config.finetune.discriminator_warmup_steps
        state = TokenizerState(
            step=step,
            params=params,
            optimizer=optimizer,
            ema=ema,
            discriminator=judged.discriminator,
            window=state.window.update(forward.indices, step, self.window_steps),
        )
        metrics = forward.metrics | judged.metrics
        metrics |= {
            "loss/total": judged.loss + forward.latent_loss,
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

    def reconstruction_loss(
        self, images: jax.Array, reconstructions: jax.Array, nets: Nets
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Returns the loss of reconstructions [B, H, W, 3] without its adversarial part, and its terms by name.

        A subclass may replace it (see examples/train_with_another_loss.py); "l1" has to stay among the terms.
        """
        config, distance = self.config.loss, self.perceptual_distance(images, reconstructions, nets)
        loss, terms = losses.reconstruction_nll(images, reconstructions, distance, config.perceptual_weight)
        for name, weight, net, measure in (
            ("features", config.features_weight, config.features_net, measure_features),
            ("logits", config.logits_weight, config.logits_net, measure_logits),
        ):
            if weight and net in nets:
                measure = partial(measure, self.config, nets)
                terms[name] = jnp.mean(self.micro_batches.map(measure, images, reconstructions))
                loss += weight * terms[name]
        return loss, terms | {"nll": loss}

    def perceptual_distance(self, images: jax.Array, reconstructions: jax.Array, nets: Nets) -> jax.Array:
        """Returns LPIPS of each image [B], or zeros if its network is absent."""
        return merge(self.micro_batches.map(partial(measure_lpips, self.config, nets), images, reconstructions))

    def _image_loss(self, reconstructions, discriminator: DiscriminatorState | None, nets: Nets, images, step):
        """Returns the loss of the reconstructions: (loss, (discriminator with updated statistics, metrics))."""
        loss, scalars = self.reconstruction_loss(images, reconstructions, nets)
        metrics = {f"loss/{name}": value for name, value in scalars.items()}
        if discriminator is not None:
            net = nets.get(self.config.discriminator.net)
            adversarial, discriminator = self.adversarial.loss_of(discriminator, reconstructions, step, net)
            metrics["loss/adversarial"] = adversarial
            loss += self.config.loss.adversarial_weight * self.adversarial.share(step) * adversarial
        return loss, (discriminator, metrics)

    def _weighed_image_loss(
        self, forward: Forward, weights: dict, discriminator: DiscriminatorState, nets: Nets, images, step
    ):
        """Returns what `_image_loss` does, the gradient of the loss, and that of the distances alone.

        The adversarial loss has VQGAN's adaptive weight, if the config wants that.
        """
        config, reconstructions = self.config.loss, forward.reconstructions
        net = nets.get(self.config.discriminator.net)
        (loss, scalars), gradient = jax.value_and_grad(self.reconstruction_loss, argnums=1, has_aux=True)(
            images, reconstructions, nets
        )
        (adversarial, discriminator), adversarial_gradient = jax.value_and_grad(
            lambda images: self.adversarial.loss_of(discriminator, images, step, net), has_aux=True
        )(reconstructions)
        metrics = {f"loss/{name}": value for name, value in scalars.items()} | {"loss/adversarial": adversarial}
        factor: Any = 1.0
        if forward.last_input is not None:
            at_last_layer = partial(at_last_layer_of_decoder, self.model, weights, forward.last_input)
            factor = losses.adaptive_weight(
                at_last_layer(gradient), at_last_layer(adversarial_gradient), config.adaptive_limit
            )
            metrics["loss/adaptive_weight"] = factor
        weight = factor * (config.adversarial_weight * self.adversarial.share(step))
        whole = gradient + weight * adversarial_gradient
        return loss + weight * adversarial, (discriminator, metrics), whole, gradient

    def _align(self, end: EncoderEnd, judged: Judged, of_distances, weights: dict, nets: Nets, images) -> Judged:
        """Adds the alignment of latents with VA-VAE's adaptive weight, given the distances' gradient at images."""
        config = self.config.alignment
        alignment, of_projection, of_latents = alignment_gradients(
            self.config, nets, weights[PROJECTION], images, end.latents, self.micro_batches
        )
        at_last_layer = partial(at_last_layer_of_encoder, self.model, weights, end.inputs)
        factor = losses.adaptive_weight(
            at_last_layer(end.pull_back(of_distances)), at_last_layer(of_latents), config.adaptive_limit
        )
        weight = config.weight * factor
        metrics = {"loss/alignment": alignment, "loss/alignment_adaptive_weight": factor}
        return judged._replace(
            loss=judged.loss + weight * alignment,
            metrics=judged.metrics | metrics,
            of_latents=weight * of_latents,
            of_projection={PROJECTION: jax.tree.map(lambda leaf: weight * leaf, of_projection)},
        )

    @property
    def micro_batches(self) -> MicroBatches:
        """The micro-batches that a step takes its batch in."""
        return MicroBatches(self.config.train.grad_accum_steps, self.mesh)


def jit_train_step(trainer: TokenizerTrainer):
    """Returns `trainer.train_step(state, nets, images)`, jitted and sharded over its mesh; donates the state."""
    mesh, changes = trainer.mesh, trainer.config.train.compiler_options
    return jit_step(trainer.train_step, trainer.create_state, mesh, (replicated(mesh), batch_sharding(mesh)), changes)


def abstract_arguments(trainer: TokenizerTrainer) -> tuple:
    """Returns shapes, types and shardings of the step's arguments, with all frozen networks that the config wants."""
    mesh, data = trainer.mesh, trainer.config.data
    state, _ = abstract_state(trainer.create_state, mesh, 0)
    nets = with_sharding(weight_shapes(trainer.config), replicated(mesh)) or None
    shape = (data.batch_size, data.image_size, data.image_size, 3)
    return state, nets, jax.ShapeDtypeStruct(shape, jnp.uint8, sharding=batch_sharding(mesh))
