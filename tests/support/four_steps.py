"""Four train steps from the released code's weights, on its images (tests/golden/train_steps.npz).

As a script, `python four_steps.py OUT.npz`, it takes them in float64. In float32 the released code's trajectory is
chaotic: Adam's first steps divide each gradient by its own size, so that rounding decides the sign of the smallest
ones, and PyTorch itself, run again on another machine, ends 6e-2 away. In float64 all take the same path.
"""

import json
import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":
    import jax
    import jax.numpy

    jax.config.update("jax_enable_x64", True)
    jax.numpy.float32 = jax.numpy.float64  # before anything else is imported: every float32 of the code is a float64

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from ibq_jax.base.config import load_config
from ibq_jax.base.sharding import abstract_state, make_mesh
from ibq_jax.interop import tokenizer_names
from ibq_jax.pretrained.lpips import load_weights
from ibq_jax.tokenizer.step import TokenizerState, TokenizerTrainer
from support import released
from support.published_names import discriminator_from_torch, discriminator_to_torch, ema_to_torch

CONFIGS = Path(__file__).parents[2] / "configs"


def config_of(published: dict, recorded: dict[str, np.ndarray]):
    layout = published["ddconfig"]
    fields = {
        "dtype": np.dtype(jnp.float32).name,
        "model.resolution": layout["resolution"],
        "model.channels": layout["ch"],
        "model.channel_multipliers": tuple(layout["ch_mult"]),
        "model.num_res_blocks": layout["num_res_blocks"],
        "model.attention_resolutions": tuple(layout["attn_resolutions"]),
        "model.z_channels": layout["z_channels"],
        "codebook.size": published["n_embed"],
        "codebook.dim": published["embed_dim"],
        "data.image_size": recorded["images"].shape[-1],
        "data.batch_size": recorded["images"].shape[1],
        "quantizer.entropy_group_tokens": 0,
        "discriminator.channels": published["loss"]["disc_ndf"],
        "discriminator.num_layers": published["loss"]["disc_num_layers"],
        "discriminator.norm_group": 0,
        "optimizer.learning_rate": float(recorded["learning_rate"]),
        "optimizer.drop_epochs": (),
        "optimizer.ema_decay": published["ema_decay"],
    }
    overrides = [f"--config.{name}={value}" for name, value in fields.items()]
    return load_config(f"{CONFIGS}/tokenizer.py:imagenet256_1024", overrides)


def vgg16() -> dict:
    """The stand-in for VGG16 with the real LPIPS heads, as the train step takes them."""
    with tempfile.TemporaryDirectory() as folder:
        save_file(dict(released.vgg16()), f"{folder}/vgg16.safetensors")
        weights = load_weights(f"{folder}/vgg16.safetensors")
    return jax.tree.map(lambda array: jnp.asarray(array, jnp.float32), weights)


def everything_but_weights(trainer: TokenizerTrainer) -> TokenizerState:
    """A state before the first step; the random weights, whose program takes the longest to compile, are left out."""

    def create() -> TokenizerState:
        state = nn.meta.unbox(trainer.create_state(0))
        discriminator = state.discriminator and state.discriminator.replace(params=None, batch_stats=None)
        return state.replace(params=None, ema=None, discriminator=discriminator)

    return jax.jit(create)()


def take(steps: int = 4) -> tuple[list[dict], dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(every step's metrics, the first step's gradients, the last tensors), the latter two under published names."""
    tensors, published, _ = released.tokenizer()
    recorded = released.load("train_steps")
    config = config_of(published, recorded)
    trainer = TokenizerTrainer(config, make_mesh({}, jax.devices()[:1]), steps_per_epoch=1)
    discriminator = discriminator_from_torch(tensors, published)
    state = everything_but_weights(trainer)
    state = state.replace(
        params=tokenizer_names.tokenizer_from_torch(tensors, published, use_ema=False),
        ema=tokenizer_names.tokenizer_from_torch(tensors, published, use_ema=True),
        discriminator=state.discriminator.replace(
            params=discriminator["params"], batch_stats=discriminator["batch_stats"]
        ),
    )
    floats = (np.float32, np.float64)
    state = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32) if x.dtype in floats else x, state)
    state = jax.device_put(state, abstract_state(trainer.create_state, trainer.mesh, 0)[1])  # as a step returns it
    step, nets, logs, gradients = jax.jit(trainer.train_step), {"vgg16": vgg16()}, [], None
    for images in recorded["images"][:steps]:
        state, metrics = step(state, nets, jnp.asarray(released.nhwc(images), jnp.float32))
        logs.append({name: float(value) for name, value in metrics.items()})
        if gradients is None:  # Adam's first moment after one step is (1 - beta1) times the gradient
            first_moments = jax.tree.map(lambda moment: moment / (1 - config.optimizer.beta1), state.optimizer[0].mu)
            gradients = tokenizer_names.tokenizer_to_torch(first_moments)
    end = state.discriminator
    final = tokenizer_names.tokenizer_to_torch(state.params) | ema_to_torch(state.ema)
    final |= discriminator_to_torch({"params": end.params, "batch_stats": end.batch_stats})
    return logs, gradients, final | {"lecam_real": np.asarray(end.lecam.real), "lecam_fake": np.asarray(end.lecam.fake)}


if __name__ == "__main__":
    logs, gradients, final = take()
    prefixed = {f"grad0/{name}": array for name, array in gradients.items()}
    prefixed |= {f"final/{name}": array for name, array in final.items()}
    np.savez(sys.argv[1], logs=json.dumps(logs), **prefixed)
