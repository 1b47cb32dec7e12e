"""Gradients of losses at the last kernel of the decoder or of the encoder, whose lengths adaptive weights compare.

They follow from what the layer gets and from the gradient at what it leads to, so nothing before it is passed again.
Weights are where the model computes with them; the results are float32.
"""

import jax
import jax.numpy as jnp

from ibq_jax.tokenizer.autoencoder import Conv
from ibq_jax.tokenizer.model import TokenizerModel


def at_last_layer_of_decoder(model: TokenizerModel, weights: dict, inputs: jax.Array, gradient: jax.Array):
    """Returns a loss's gradient at the decoder's last kernel [3, 3, C, 3], from that at images [B, H, W, 3].

    `inputs` [B, H, W, C] are those of the layer.
    """
    layer = weights["decoder"]["conv_out"]

    def decode(kernel: jax.Array) -> jax.Array:
        conv = Conv(3, computing=model.computing)
        return conv.apply({"params": {**layer, "kernel": kernel}}, inputs).astype(jnp.float32)

    return _at_kernel(decode, layer, gradient)


def at_last_layer_of_encoder(model: TokenizerModel, weights: dict, inputs: jax.Array, gradient: jax.Array):
    """Returns a loss's gradient at the encoder's last 3x3 kernel [3, 3, C, Z], from that at latents [B, h, w, D].

    `inputs` [B, h, w, C] are those of the layer, which the 1x1 convolution `quant_conv` follows.
    """
    layer, projection = weights["encoder"]["conv_out"], weights["quant_conv"]

    def encode(kernel: jax.Array) -> jax.Array:
        conv = Conv(model.z_channels, computing=model.computing)
        outputs = conv.apply({"params": {**layer, "kernel": kernel}}, inputs)
        return Conv(projection["kernel"].shape[-1], 1).apply({"params": projection}, outputs)

    return _at_kernel(encode, layer, gradient)


def _at_kernel(function, layer: dict, gradient: jax.Array) -> jax.Array:
    return jax.vjp(function, layer["kernel"])[1](gradient)[0].astype(jnp.float32)
