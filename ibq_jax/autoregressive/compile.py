"""The generator's train step as `jax.jit` compiles it, and the shapes of what it takes."""

import jax
import jax.numpy as jnp

from ibq_jax.autoregressive.train import Trainer
from ibq_jax.base.sharding import abstract_state, batch_sharding, jit_step


def jit_train_step(trainer: Trainer):
    """`trainer.train_step(state, codes, labels)`, sharded over its mesh; the state is donated."""
    batch = batch_sharding(trainer.mesh)
    return jit_step(trainer.train_step, trainer.create_state, trainer.mesh, (batch, batch))


def abstract_arguments(trainer: Trainer) -> tuple:
    """Shapes, types and shardings of the step's arguments."""
    state, _ = abstract_state(trainer.create_state, trainer.mesh, 0)
    size, batch = trainer.config.data.batch_size, batch_sharding(trainer.mesh)
    codes = jax.ShapeDtypeStruct((size, *trainer.config.model.grid), jnp.int32, sharding=batch)
    return state, codes, jax.ShapeDtypeStruct((size,), jnp.int32, sharding=batch)
