"""The joint stage's train state and train step: a tokenizer and a generator of its codes, trained together.

Shapes: B images per step, in A micro-batches; images [B, H, W, 3] in [-1, 1], latents z [B, h, w, D], codes i
[B, h, w]; S = h w; codebook E [K, D]; token embeddings T [K, C] and head U [K, C] of the generator; labels int32 [B].

EOSTok (arXiv 2605.00503) minimises one sum over tokenizer and generator:

    L = L_tok + next_token_weight L_NTP + prediction_weight L_APR + hidden_alignment.weight L_HA

    L_tok   the losses of stage one (`ibq_jax.tokenizer.step`), the discriminator and the alignment among them
    L_NTP   mean of -log p(i_n | class, h_1 .. h_(n-1)), where h = (onehot(i) + p - sg(p)) T with p = softmax(z E^T) is
            `soft_lookup(z, E, T)`: the embeddings of the codes, with a gradient that reaches encoder and codebook
    L_APR   mean of (x - decode(v))^2 over all pixels and colours + loss.perceptual_weight LPIPS(x, decode(v)), where
            v = (onehot(argmax g) + q - sg(q)) E with g the generator's logits and q = softmax(g) is
            `soft_lookup(hidden, U, E)`: what the generator predicts at every position, given the true codes before it
    L_HA    GEAR's alignment of hidden states with a frozen network's features (`ibq_jax.joint.hidden_alignment`)

L_NTP alone lets the tokenizer make its codes easy to predict, by using few of them; L_APR, whose images have to be
right, works against that (there, table of ablations: 99.8% of the codes in use become 51.8%, and 99.7% again).

The tokenizer's optimizer follows the gradient of L, and the generator's that of L / next_token_weight, so that its clip
and its losses are those of stage two. Each has its own settings and its own averages, and all is one backward pass.
Without `joint.next_token_gradient` the codes are constants in h, and only L_APR's way through E and the decoder is left
to the tokenizer; with prediction_weight 0 too, and no L_HA, the tokenizer is trained as in stage one. GEAR (arXiv
2606.32039) keeps the next-token loss from the tokenizer in the same way, and guides it by L_HA, which has a lookup and
a switch of its own.

As in the sources at hand (notes on EOSTok, a re-implementation by others): predictions are teacher forced, and L_APR
sends gradients to generator, decoder and codebook, and through h to the encoder. Assumed, where these do not tell: both
weights, that L_APR is a mean and has no adversarial term, and that h and v have the step's dropout.

With `train.grad_accum_steps` every term and gradient is the mean over A micro-batches, which is that of the whole batch
for all that is a mean over images, codes or pixels: L_NTP, L_APR, L_HA, the distances, the quantizer's loss, the sample
entropy. A micro-batch has its own batch entropies (one with `quantizer.entropy_group_tokens=0`, else one of each group,
which lies within it), its own batch norms or deviations in the discriminator (by `discriminator.norm_group` likewise)
and its own dropout in the generator. Discriminator, tokenizer and generator are updated once, by the whole batch.

Metrics of a step: those of `ibq_jax.tokenizer.step` (`optimizer/...` is the tokenizer's), with loss/total as L, and

| name | meaning |
|---|---|
| loss/next_token, loss/perplexity | L_NTP, nats, with dropout; its exponential |
| loss/next_token_relative | L_NTP / log(codebook/perplexity): 1 for codes of which only the frequencies are known |
| loss/prediction | L_APR; absent if its weight is 0 |
| loss/hidden_alignment | L_HA, with dropout; absent if its weight is 0 or its network is absent |
| codebook/gradient_norm_reconstruction | of L_tok's gradient at the codebook |
| codebook/gradient_norm_next_token | the same of what comes through h, weighted |
| codebook/gradient_norm_prediction | the same of what comes through v, weighted |
| codebook/gradient_norm_hidden_alignment | the same of what comes through the lookup of L_HA, weighted |
| generator/gradient_norm, generator/learning_rate, generator/weight_decay | of the generator's optimizer |

Validation adds that of stage one, and for the generator on the codes of the same images validation/next_token (nats),
validation/next_token_relative (to validation/entropy) and validation/perplexity_by_position ([h, w]).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from ibq_jax.autoregressive.step import IN_MODEL_TYPE, GeneratorState, GeneratorTrainer
from ibq_jax.base.sharding import WeightPlacement, abstract_state, batch_sharding, jit_step, replicated, with_sharding
from ibq_jax.base.state import apply_gradient
from ibq_jax.data.preprocess import to_float
from ibq_jax.joint.hidden_alignment import (
    Projector,
    ProjectorState,
    aligned_layer,
    build_projector,
    is_on,
    measure_hidden_alignment,
    uses,
)
from ibq_jax.joint.parts import generator_part, tokenizer_part
from ibq_jax.ops import soft_lookup
from ibq_jax.tokenizer.micro_batches import merge
from ibq_jax.tokenizer.net_losses import Nets, measure_lpips, weight_shapes
from ibq_jax.tokenizer.parts import DECODING, PARTS, modules_of, only, without
from ibq_jax.tokenizer.step import TokenizerState, TokenizerTrainer

CODEBOOK = PARTS["codebook"]  # modules of the tokenizer's parameters
DECODING_MODULES = modules_of(DECODING)
LEAST_ENTROPY = 1e-3  # nats; codes with less are one code


@flax.struct.dataclass
class JointState:
    """Everything that a step changes: both stages' states; `projector` is None if no hidden states are aligned."""

    tokenizer: TokenizerState
    generator: GeneratorState
    projector: ProjectorState | None = None

    @property
    def params(self) -> dict:
        """The parameters of both networks."""
        return {"tokenizer": self.tokenizer.params, "generator": self.generator.params}


@dataclass(frozen=True)
class JointTrainer:
    """The models, optimizers and step functions of a joint config on one mesh; its methods are pure functions.

    The config is resolved (`ibq_jax.joint.parts.resolve`).
    """

    config: ConfigDict
    mesh: Mesh
    steps_per_epoch: int

    @cached_property
    def tokenizer(self) -> TokenizerTrainer:
        return TokenizerTrainer(tokenizer_part(self.config), self.mesh, self.steps_per_epoch)

    @cached_property
    def generator(self) -> GeneratorTrainer:
        return GeneratorTrainer(generator_part(self.config), self.mesh, self.steps_per_epoch)

    @cached_property
    def create_state(self) -> Callable[[int], JointState]:
        """Seed -> the state before the first step, its parameters boxed with their logical axis names."""
        return jax.jit(self._create_state)

    def _create_state(self, seed: int) -> JointState:
        parts = self.tokenizer.create_state(seed), self.generator.create_state(seed)
        if not self.config.joint.hidden_alignment.weight:
            return JointState(*parts)
        return JointState(*parts, self._create_projector(seed))

    def _create_projector(self, seed: int) -> ProjectorState:
        channels, key = self.generator.model.embed_dim, jax.random.fold_in(jax.random.key(seed), 1)
        params = self.projector.init(key, jnp.zeros((1, channels)))["params"]
        return ProjectorState(params, self.generator.optimizer.init(params))

    @cached_property
    def projector(self) -> Projector:
        return build_projector(self.config)

    def everywhere(self, state: JointState) -> dict[str, dict]:
        """Returns both networks' averaged weights where their models compute with them; called outside of steps."""
        return {
            "tokenizer": self.tokenizer.placement.everywhere(state.tokenizer.weights("ema")),
            "generator": self.generator.placement.everywhere(state.generator.weights("ema")),
        }

    def code_losses(self, weights: Mapping[str, dict], images: jax.Array, labels: jax.Array) -> jax.Array:
        """Returns -log p of every code of images [B, H, W, 3], float32 [B, S], as for evaluation."""
        model = self.tokenizer.encoding_model
        codes = model.apply({"params": weights["tokenizer"]}, to_float(images), method="encode")
        return self.generator.code_losses(weights["generator"], codes, labels)

    def train_step(self, state: JointState, nets: Nets | None, images: jax.Array, labels: jax.Array):
        """Takes one step on images [B, H, W, 3], uint8 or float, and their labels [B].

        Returns:
            (state, metrics): the metrics of the module's table, float32 scalars, and "finite", a bool.
        """
        images, nets, joint = to_float(images), nets or {}, self.config.joint
        projector = state.projector if is_on(self.config, nets) else None
        aligned_keys = projector is not None and joint.hidden_alignment.gradient
        linked = joint.next_token_gradient or aligned_keys
        weights = self.tokenizer.gathered(state.tokenizer.params)
        forward = self.tokenizer.run_forward(weights, images, nets, linked)
        judged = self.tokenizer.judge(forward, weights, state.tokenizer, nets, images)

        trained = without(weights, self.tokenizer.frozen)
        varied = {"generator": self.generator.gathered(state.generator.params)}
        if linked:
            varied |= {"latents": forward.latents}
        if joint.next_token_gradient:
            varied |= {"keys": only(trained, CODEBOOK)}
        if joint.prediction_weight:
            varied |= {"decoding": only(trained, DECODING_MODULES)}
        if aligned_keys:
            varied |= {"aligned_keys": only(trained, CODEBOOK)}
        if projector is not None:
            dtype, place = self.generator.model.dtype, self._placement("projector")
            varied |= {"projector": place.gather(projector.params, dtype, lambda path: path[-1] in IN_MODEL_TYPE)}
        labels, dropout_key = self.generator.draw(state.generator.step, labels)
        scalars, slopes = self._generator_gradients(
            varied, weights, nets, (forward.indices, images, labels), dropout_key
        )
        weighted = jax.tree.map(
            lambda leaf: joint.next_token_weight * leaf, without(slopes, ("generator", "projector"))
        )
        gradient, norms = self._add_up(forward.pull_back(judged, weighted.get("latents")), weighted)

        tokenizer, metrics = self.tokenizer.stepped(state.tokenizer, forward, judged, gradient)
        gradient = self.generator.placement.scatter(slopes["generator"])
        generator, of_generator = self.generator.stepped(state.generator, scalars["loss/next_token"], gradient)
        if projector is not None:
            projector, finite = self._projector_stepped(projector, slopes["projector"])
            of_generator["finite"] &= finite
        return JointState(tokenizer, generator, projector or state.projector), self._metrics(
            metrics, of_generator, scalars, norms
        )

    def _projector_stepped(self, state: ProjectorState, gradient: dict) -> tuple[ProjectorState, jax.Array]:
        """Returns (the state after an update by the generator's optimizer, whether the gradient is finite)."""
        gradient = self._placement("projector").scatter(gradient)
        params, optimizer = apply_gradient(self.generator.optimizer, gradient, state.optimizer, state.params)
        return ProjectorState(params, optimizer), jnp.isfinite(optax.tree.norm(gradient))

    def _generator_gradients(self, varied: dict, weights: dict, nets: Nets, batch: tuple, dropout_key: jax.Array):
        """Returns (the terms of `_generator_loss` by name, its gradients at all that `varied` has).

        They are those of the whole batch (codes, images, labels), from A micro-batches in turn, of which only one's
        activations are in memory. With several, all but the latents' gradients come spread like the state.
        """
        micro_batches = self.tokenizer.micro_batches
        if micro_batches.count == 1:
            return self._gradients_of_micro_batch(varied, weights, nets, batch, dropout_key)
        shared, latents = without(varied, ("latents",)), only(varied, ("latents",))

        def add_micro_batch(total: dict, micro_batch: tuple):
            batch, latents, key = micro_batch
            scalars, slopes = self._gradients_of_micro_batch(shared | latents, weights, nets, batch, key)
            at_latents = slopes.pop("latents", None)
            return jax.tree.map(jnp.add, total, self._spread(slopes)), (scalars, at_latents)

        zeros = self._spread(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), shared))
        parts = *micro_batches.split((batch, latents)), jax.random.split(dropout_key, micro_batches.count)
        total, (scalars, at_latents) = jax.lax.scan(add_micro_batch, zeros, parts)
        if at_latents is not None:
            total["latents"] = merge(at_latents)
        return jax.tree.map(jnp.mean, scalars), jax.tree.map(lambda leaf: leaf / micro_batches.count, total)

    def _gradients_of_micro_batch(self, varied: dict, weights: dict, nets: Nets, batch: tuple, dropout_key: jax.Array):
        losses = jax.value_and_grad(self._generator_loss, has_aux=True)
        (_, scalars), slopes = losses(varied, weights, *batch, dropout_key, nets)
        return scalars, slopes

    def _spread(self, slopes: dict) -> dict:
        """Returns gradients at parts of `varied` other than the latents, spread like the state."""
        return {name: self._placement(name).scatter(leaves) for name, leaves in slopes.items()}

    def _placement(self, name: str) -> WeightPlacement:
        """Returns where a part of `varied` lies; keys and decoding are the tokenizer's."""
        if name == "projector":
            return WeightPlacement.of(lambda: self._create_projector(0).params, self.mesh)
        return self.generator.placement if name == "generator" else self.tokenizer.placement

    def _generator_loss(self, varied: dict, weights: dict, codes, images, labels, dropout_key, nets: Nets):
        """Returns (L / next_token_weight without the tokenizer's losses, its terms by name).

        It is differentiated by all that `varied` has: the weights of generator and projector, and of the tokenizer the
        latents, the codebook as keys of either lookup, and what decodes; what it lacks is constant. `weights` are all
        of the tokenizer's.
        """
        params, embeddings = varied["generator"], None
        if "keys" in varied:
            embeddings = self._embed(varied["latents"], only(weights, CODEBOOK) | varied["keys"], params)
        hidden = self.generator.hidden(params, codes, labels, dropout_key, embeddings)
        loss = self.generator.loss_at(hidden, params, codes)
        scalars = {"loss/next_token": loss}
        if "decoding" in varied:
            predicted = self._predict(hidden, params, only(weights, DECODING_MODULES) | varied["decoding"])
            config = self.tokenizer.config
            distances = measure_lpips(config, nets, images, predicted)
            prediction = jnp.mean((images - predicted) ** 2) + config.loss.perceptual_weight * jnp.mean(distances)
            scalars["loss/prediction"] = prediction
            loss += self.config.joint.prediction_weight / self.config.joint.next_token_weight * prediction
        if "projector" in varied:
            alignment = self._align(varied, weights, codes, images, labels, dropout_key, nets)
            scalars["loss/hidden_alignment"] = alignment
            loss += self.config.joint.hidden_alignment.weight / self.config.joint.next_token_weight * alignment
        return loss, jax.lax.stop_gradient(scalars)

    def _align(self, varied: dict, weights: dict, codes, images, labels, dropout_key, nets: Nets) -> jax.Array:
        """Returns L_HA, from a pass of its own through the first of the generator's layers."""
        params, embeddings = varied["generator"], None
        if "aligned_keys" in varied:
            keys = only(weights, CODEBOOK) | varied["aligned_keys"]
            temperature = self.config.joint.hidden_alignment.temperature
            embeddings = self._embed(varied["latents"], keys, params, temperature)
        layer = aligned_layer(self.config)
        hidden = self.generator.states_after(layer, params, codes, labels, dropout_key, embeddings)
        projected = self.projector.apply({"params": varied["projector"]}, hidden)
        return measure_hidden_alignment(self.config, nets, projected, images, self.generator.model.grid)

    def _embed(self, latents: jax.Array, keys: dict, params: dict, temperature: float = 1.0) -> jax.Array:
        """Returns h, the token embeddings of all codes but the last [B, S - 1, C]."""
        table = params["tok_emb"]["embedding"]
        embeddings = self.tokenizer.model.apply({"params": keys}, latents, table, temperature, method="look_up")
        return embeddings.reshape(len(latents), -1, table.shape[1])[:, :-1]

    def _predict(self, hidden: jax.Array, params: dict, decoding: dict) -> jax.Array:
        """Returns decode(v) [B, H, W, 3], given the head's inputs [B, S, C]."""
        model, dtype, (height, width) = self.tokenizer.model, self.generator.model.dtype, self.generator.model.grid
        vectors = model.apply({"params": decoding}, method="code_vectors")
        flat = hidden.reshape(-1, hidden.shape[-1]).astype(dtype)
        chosen = soft_lookup(flat, params["head"].astype(dtype), vectors, mesh=self.mesh).value
        chosen = chosen.reshape(len(hidden), height, width, -1)
        return model.apply({"params": decoding}, chosen, method="decode_vectors")

    def _add_up(self, gradient: dict, weighted: Mapping) -> tuple[dict, dict[str, jax.Array]]:
        """Returns the tokenizer's whole gradient, spread like its state, and the norms of its parts at the codebook."""
        parts = {
            "reconstruction": gradient,
            "next_token": weighted.get("keys"),
            "prediction": weighted.get("decoding"),
            "hidden_alignment": weighted.get("aligned_keys"),
        }
        at_codebook = {
            name: self.tokenizer.placement.scatter(only(part, CODEBOOK))
            for name, part in parts.items()
            if part is not None and only(part, CODEBOOK)
        }
        for name, leaves in without(weighted.get("decoding", {}), CODEBOOK).items():
            gradient = gradient | {name: jax.tree.map(jnp.add, gradient[name], leaves)}
        gradient = self.tokenizer.placement.scatter(without(gradient, CODEBOOK))
        if at_codebook:
            gradient |= jax.tree.map(lambda *leaves: sum(leaves[1:], leaves[0]), *at_codebook.values())
        norms = {f"codebook/gradient_norm_{name}": optax.tree.norm(part) for name, part in at_codebook.items()}
        return gradient, norms

    def _metrics(self, of_tokenizer: dict, of_generator: dict, scalars: dict, norms: dict) -> dict[str, jax.Array]:
        joint, finite = self.config.joint, of_tokenizer["finite"] & of_generator["finite"]
        total = of_tokenizer["loss/total"] + joint.next_token_weight * scalars["loss/next_token"]
        if "loss/prediction" in scalars:
            total += joint.prediction_weight * scalars["loss/prediction"]
        if "loss/hidden_alignment" in scalars:
            total += joint.hidden_alignment.weight * scalars["loss/hidden_alignment"]
        entropy = jnp.maximum(jnp.log(of_tokenizer["codebook/perplexity"]), LEAST_ENTROPY)
        metrics: dict[str, Any] = {**of_tokenizer, **scalars, **norms, "loss/total": total}
        metrics["loss/perplexity"] = of_generator["loss/perplexity"]
        metrics["loss/next_token_relative"] = scalars["loss/next_token"] / entropy
        for name in ("gradient_norm", "learning_rate", "weight_decay"):
            metrics[f"generator/{name}"] = of_generator[f"optimizer/{name}"]
        return metrics | {"finite": finite & jnp.isfinite(total)}


def jit_train_step(trainer: JointTrainer):
    """Returns `trainer.train_step(state, nets, images, labels)`, jitted and sharded; it donates the state."""
    mesh, changes = trainer.mesh, trainer.config.train.compiler_options
    batch = batch_sharding(mesh)
    return jit_step(trainer.train_step, trainer.create_state, mesh, (replicated(mesh), batch, batch), changes)


def abstract_arguments(trainer: JointTrainer) -> tuple:
    """Returns shapes, types and shardings of the step's arguments, with all frozen networks that the config wants."""
    mesh, data = trainer.mesh, trainer.tokenizer.config.data
    state, _ = abstract_state(trainer.create_state, mesh, 0)
    nets = with_sharding(weight_shapes(trainer.tokenizer.config, uses(trainer.config)), replicated(mesh)) or None
    shapes = ((data.batch_size, data.image_size, data.image_size, 3), jnp.uint8), ((data.batch_size,), jnp.int32)
    batch = (jax.ShapeDtypeStruct(*shape, sharding=batch_sharding(mesh)) for shape in shapes)
    return state, nets, *batch
