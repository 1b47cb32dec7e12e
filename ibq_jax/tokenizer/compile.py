"""The tokenizer's train step as `jax.jit` compiles it, and the shapes of what it takes."""

import jax
import jax.numpy as jnp

from ibq_jax.base.sharding import abstract_state, batch_sharding, jit_step, replicated
from ibq_jax.tokenizer.perceptual import weight_shapes
from ibq_jax.tokenizer.train import Trainer


def jit_train_step(trainer: Trainer):
    """`trainer.train_step(state, perceptual, images)`, sharded over its mesh; the state is donated."""
    mesh = trainer.mesh
    return jit_step(trainer.train_step, trainer.create_state, mesh, (replicated(mesh), batch_sharding(mesh)))


def abstract_arguments(trainer: Trainer) -> tuple:
    """Shapes, types and shardings of the step's arguments; with a perceptual net wherever the config asks for one."""
    mesh, data = trainer.mesh, trainer.config.data
    state, _ = abstract_state(trainer.create_state, mesh, 0)
    perceptual = None
    if trainer.config.loss.perceptual_weight:
        everywhere = replicated(mesh)
        perceptual = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere), weight_shapes()
        )
    shape = (data.batch_size, data.image_size, data.image_size, 3)
    return state, perceptual, jax.ShapeDtypeStruct(shape, jnp.uint8, sharding=batch_sharding(mesh))
