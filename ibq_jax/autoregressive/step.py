"""The generator's train state and train step, as pure functions (arXiv 2412.02692, section 3.3; recipe as released).

Shapes: B images per step, in A micro-batches; codes int32 [B, h, w], labels int32 [B]; S = h w; losses in nats.

Metrics of a step:

| name | meaning |
|---|---|
| loss/total | mean of -log p over all codes, nats, with dropout |
| loss/perplexity | its exponential |
| optimizer/gradient_norm | global norm, before clipping |
| optimizer/learning_rate, optimizer/weight_decay | of this step; a decayed weight shrinks by their product |

Validation adds validation/loss (nats), validation/perplexity and validation/perplexity_by_position ([h, w]), without
dropout.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from ibq_jax.autoregressive.model import GeneratorModel, build_model
from ibq_jax.base.saved_run import total_steps
from ibq_jax.base.sharding import AXES, WeightPlacement, abstract_state, batch_sharding, jit_step
from ibq_jax.base.state import (
    AveragedWeights,
    adamw,
    apply_gradient,
    cosine_schedule,
    moving_average,
    warmup_hold_decay_schedule,
)
from ibq_jax.ops import cross_entropy, weighted_cross_entropy

UNDECAYED = ("scale", "bias")
PER_LAYER = ("blocks", "modulation")  # modules whose parameters have a leading axis of layers
IN_MODEL_TYPE = ("kernel", "bias", "head")  # names of parameters that are used in the type of the products only


@flax.struct.dataclass
class GeneratorState(AveragedWeights):
    """Everything that a step changes. `ema` is None if optimizer.ema_decay is 0."""

    step: jax.Array
    params: dict
    optimizer: optax.OptState
    ema: dict | None


@dataclass(frozen=True)
class GeneratorTrainer:
    """The generator's model, optimizer and step functions for one config on one mesh; its methods are pure functions.

    The config is resolved: its model's vocabulary, grid and classes are known (`ibq_jax.autoregressive.token_sizes`).
    """

    config: ConfigDict
    mesh: Mesh
    steps_per_epoch: int

    @cached_property
    def model(self) -> GeneratorModel:
        return build_model(self.config, mesh=self.mesh)

    @cached_property
    def placement(self) -> WeightPlacement:
        """The places of the parameters: in the state, and where the model computes with them."""
        return WeightPlacement.of(lambda: self.create_state(0).params, self.mesh)

    @cached_property
    def learning_rate(self) -> optax.Schedule:
        """Step -> the learning rate."""
        config, steps = self.config.optimizer, total_steps(self.config, self.steps_per_epoch)
        return warmup_hold_decay_schedule(
            config.learning_rate,
            steps,
            warmup_fraction=config.warmup_fraction,
            init_lr_factor=config.init_lr_factor,
            hold_fraction=config.hold_fraction,
            end_lr_factor=config.end_lr_factor,
        )

    @cached_property
    def weight_decay(self) -> optax.Schedule:
        """Step -> the weight decay."""
        config, steps = self.config.optimizer, total_steps(self.config, self.steps_per_epoch)
        return cosine_schedule(config.weight_decay, config.weight_decay_end, steps)

    @cached_property
    def optimizer(self) -> optax.GradientTransformation:
        """AdamW with clipped gradients; norms and biases decay only if optimizer.decay_all."""
        config = self.config.optimizer

        def decays(name: str) -> bool:
            return config.decay_all or not any(part in UNDECAYED for part in name.split("/"))

        return adamw(
            self.learning_rate,
            self.weight_decay,
            beta1=config.beta1,
            beta2=config.beta2,
            gradient_clip=config.gradient_clip,
            decays=decays,
            moment_dtype=config.moment_dtype,
        )

    @cached_property
    def create_state(self) -> Callable[[int], GeneratorState]:
        """Seed -> the state before the first step, its parameters boxed with their logical axis names.

        Jitted, so that it is traced once for all who ask for its shapes.
        """
        return jax.jit(self._create_state)

    def _create_state(self, seed: int) -> GeneratorState:
        model = self.config.model
        params = build_model(self.config).init(  # without a mesh: one image cannot be split over devices
            jax.random.key(seed), jnp.zeros((1, *model.grid), jnp.int32), jnp.zeros((1,), jnp.int32)
        )["params"]
        return GeneratorState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            optimizer=self.optimizer.init(params),
            ema=jax.tree.map(jnp.copy, params) if self.config.optimizer.ema_decay else None,
        )

    def train_step(self, state: GeneratorState, codes: jax.Array, labels: jax.Array):
        """Takes one step. Its randomness is a function of config.seed and state.step.

        Returns:
            (state, metrics): the metrics of the module's table, float32 scalars, and "finite", a bool.
        """
        labels, dropout_key = self.draw(state.step, labels)
        return self.stepped(state, *self._gradient(state.params, codes, labels, dropout_key))

    def draw(self, step: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns what is random in a step: the labels, some replaced by "no class", and the key of dropout."""
        class_key, dropout_key = jax.random.split(jax.random.fold_in(jax.random.key(self.config.seed), step))
        dropped = jax.random.bernoulli(class_key, self.config.loss.class_dropout, labels.shape)
        return jnp.where(dropped, self.config.model.num_classes, labels), dropout_key

    def gathered(self, params: dict) -> dict:
        """Returns a state's parameters where the model computes with them, and in the types that it does."""
        return self.placement.gather(params, self.model.dtype, lambda path: path[-1] in IN_MODEL_TYPE)

    def stepped(self, state: GeneratorState, loss: jax.Array, gradient: dict):
        """Returns (state, metrics) as `train_step` does, after an update along a gradient that is spread like it."""
        config = self.config
        params, optimizer = apply_gradient(self.optimizer, gradient, state.optimizer, state.params)
        norm = optax.tree.norm(gradient)
        metrics = {
            "loss/total": loss,
            "loss/perplexity": jnp.exp(loss),
            "optimizer/gradient_norm": norm,
            "optimizer/learning_rate": self.learning_rate(state.step),
            "optimizer/weight_decay": self.weight_decay(state.step),
            "finite": jnp.isfinite(loss) & jnp.isfinite(norm),
        }
        ema = None if state.ema is None else moving_average(state.ema, params, config.optimizer.ema_decay)
        return GeneratorState(step=state.step + 1, params=params, optimizer=optimizer, ema=ema), metrics

    def code_losses(self, params: dict, codes: jax.Array, labels: jax.Array) -> jax.Array:
        """Returns -log p of every code given its class and the codes before it, float32 [B, S], without dropout."""
        hidden = self.model.apply({"params": params}, codes, labels, method="hidden")
        return cross_entropy(*self._head_and_targets(hidden, params, codes), **self._loss_form).reshape(len(codes), -1)

    def mean_loss(self, params: dict, codes: jax.Array, labels: jax.Array, dropout_key: jax.Array) -> jax.Array:
        """Returns the mean of -log p over all codes, with dropout.

        Its gradient needs one matrix product fewer than that of the mean of `code_losses`.
        """
        return self.loss_at(self.hidden(params, codes, labels, dropout_key), params, codes)

    def hidden(
        self,
        params: dict,
        codes: jax.Array,
        labels: jax.Array,
        dropout_key: jax.Array,
        embeddings: jax.Array | None = None,
    ) -> jax.Array:
        """Returns the inputs of the head, float32 [B, S, C], with dropout.

        `embeddings` [B, S - 1, C], if given, are those of all codes but the last, and the codes are not looked at.
        """
        method, inputs = ("hidden", codes) if embeddings is None else ("hidden_after", embeddings)
        return self.model.apply({"params": params}, inputs, labels, True, method=method, rngs={"dropout": dropout_key})

    def states_after(
        self,
        layers: int,
        params: dict,
        codes: jax.Array,
        labels: jax.Array,
        dropout_key: jax.Array,
        embeddings: jax.Array | None = None,
    ) -> jax.Array:
        """Returns the outputs of layer number `layers`, counted from 1, float32 [B, S, C], with dropout.

        No later layer is computed. Other arguments are those of `hidden`.
        """
        model = self.model.clone(num_layers=layers, unroll=min(self.model.unroll, layers))
        first = {name: jax.tree.map(lambda leaf: leaf[:layers], params[name]) for name in PER_LAYER}
        variables = {"params": {**params, **first}}
        if embeddings is None:
            embeddings = model.apply(variables, codes.reshape(len(codes), -1)[:, :-1], method="embed")
        rngs = {"dropout": dropout_key}
        return model.apply(variables, embeddings, labels, True, method="states_after", rngs=rngs)

    def loss_at(self, hidden: jax.Array, params: dict, codes: jax.Array) -> jax.Array:
        """Returns the mean of -log p over all codes [B, h, w], given the inputs of the head [B, S, C]."""
        weights = jnp.full((codes.size,), 1.0 / codes.size)
        return weighted_cross_entropy(*self._head_and_targets(hidden, params, codes), weights, **self._loss_form)

    def _head_and_targets(
        self, hidden: jax.Array, params: dict, codes: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        flat = hidden.reshape(-1, hidden.shape[-1])
        return flat.astype(self.model.dtype), params["head"].astype(self.model.dtype), codes.reshape(-1)

    @property
    def _loss_form(self) -> dict:
        loss = self.config.loss
        return {"block_size": loss.block_size, "implementation": loss.implementation, "mesh": self.mesh}

    def _gradient(self, params: dict, codes: jax.Array, labels: jax.Array, key: jax.Array):
        """Returns (mean loss, its gradient spread like the state), from A micro-batches in turn.

        Only one's activations are in memory.
        """
        weights = self.gathered(params)

        def gradient_of(*batch):
            loss, gradient = jax.value_and_grad(self.mean_loss)(weights, *batch)
            return loss, self.placement.scatter(gradient)

        count = self.config.train.grad_accum_steps
        if count == 1:
            return gradient_of(codes, labels, key)
        sharding = NamedSharding(self.mesh, PartitionSpec(None, AXES))
        codes, labels = (
            jax.lax.with_sharding_constraint(x.reshape(count, -1, *x.shape[1:]), sharding) for x in (codes, labels)
        )

        def add_micro_batch(total, batch):
            return jax.tree.map(jnp.add, total, gradient_of(*batch)), None

        zeros = jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)
        total, _ = jax.lax.scan(add_micro_batch, zeros, (codes, labels, jax.random.split(key, count)))
        return jax.tree.map(lambda leaf: leaf / count, total)


def jit_train_step(trainer: GeneratorTrainer):
    """Returns `trainer.train_step(state, codes, labels)`, jitted and sharded over its mesh; it donates the state."""
    batch = batch_sharding(trainer.mesh)
    changes = trainer.config.train.compiler_options
    return jit_step(trainer.train_step, trainer.create_state, trainer.mesh, (batch, batch), changes)


def abstract_arguments(trainer: GeneratorTrainer) -> tuple:
    """Returns shapes, types and shardings of the step's arguments."""
    state, _ = abstract_state(trainer.create_state, trainer.mesh, 0)
    size, batch = trainer.config.data.batch_size, batch_sharding(trainer.mesh)
    codes = jax.ShapeDtypeStruct((size, *trainer.config.model.grid), jnp.int32, sharding=batch)
    return state, codes, jax.ShapeDtypeStruct((size,), jnp.int32, sharding=batch)
