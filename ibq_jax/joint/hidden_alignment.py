"""GEAR's alignment (arXiv 2606.32039): hidden states of the generator are made like a frozen network's features.

Shapes: B images [B, H, W, 3] in [-1, 1]; S = h w codes; C channels of the generator, F of the network's features;
hidden states [B, S, C] of the class token and of all codes but the last. With x the images and P a perceptron,

    L_HA = mean over images and codes n of 1 - cos(P(s_n), f_n(x))

    s_n     the residual stream after layer `layer` of the generator, without the norm before the head
    f_n     the frozen network's features at the n-th of h x w positions, of images resized for that (stage one's
            `grid_features`), constants
    P       three linear layers with SiLU between them, `projector_channels` wide (the authors' form), trained with the
            generator by its optimizer; its weights are the joint state's alone, and no exported run has them

    position="read"       s_n is where code n is the input: it has read the class and the codes 1 .. n. The last code is
                          no input of the generator, and is left out.
    position="predicted"  s_n is where code n is predicted: it has read the class and the codes 1 .. n-1

The alignment has a pass of its own through the first `layer` layers, so that its way to the tokenizer does not depend
on that of the next-token loss. With `gradient` the inputs of that pass are `soft_lookup(z, E, T)`, as h in
`ibq_jax.joint.step`, with logits divided by `temperature` besides `quantizer.logit_temperature`; otherwise the codes
are constants in it.

What GEAR does, by the authors' code (Tencent-Hunyuan/GEAR, src/train_gear.py and its script, at commit 3bdde61): minus
the mean cosine, so the same gradient; DINOv2 ViT-B/14; layers 4, 8, 12 of 12, 24, 36, a third, which is what layer=0
means here; position "predicted"; temperature 0.1; weight 0.5 for tokenizer and generator, next to a next-token loss of
weight 1 that does not reach the tokenizer. Two points differ here. There the tokenizer's gradient comes from a pass of
its own without dropout, in which the embeddings are the softmax's mean (`softmax(z E^T / 0.1) T`), and the generator's
from its pass over the codes; here one pass gives both, with dropout, on the embeddings of the codes and with the
softmax's gradient, which is that code's option `--vq-align-straight-through`. And one weight stands for both. Not known
is whether the paper's runs with IBQ took another temperature or weight than the script's.
"""

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.nn.initializers import variance_scaling
from ml_collections import ConfigDict

from ibq_jax.autoregressive.layers import dense
from ibq_jax.pretrained.frozen_nets import NETS, grid_features
from ibq_jax.tokenizer.net_losses import Nets, Use, alignment_losses

READ, PREDICTED = "read", "predicted"
POSITIONS = (READ, PREDICTED)
SHARE_OF_LAYERS = 3  # layer=0 stands for one in so many


@flax.struct.dataclass
class ProjectorState:
    """The perceptron's parameters and their optimizer's state."""

    params: dict
    optimizer: optax.OptState


class Projector(nn.Module):
    """Three linear layers with SiLU between them, [..., C] -> [..., F]; kernels start as PyTorch's."""

    channels: int
    feature_channels: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, hidden: jax.Array) -> jax.Array:
        x = hidden
        for number, channels in enumerate((self.channels, self.channels, self.feature_channels), start=1):
            x = dense(
                channels,
                ("width", "hidden"),
                dtype=self.dtype,
                name=f"fc{number}",
                use_bias=True,
                kernel_init=variance_scaling(1 / 3, "fan_in", "uniform"),
            )(x if number == 1 else nn.silu(x))
        return x


def build_projector(config: ConfigDict) -> Projector:
    """Returns the perceptron of a joint config."""
    settings = config.joint.hidden_alignment
    return Projector(
        settings.projector_channels, NETS[settings.net].feature_channels, jnp.dtype(config.generator.dtype)
    )


def uses(config: ConfigDict) -> list[Use]:
    """Returns what the alignment of a joint config wants of the frozen networks, for `net_losses.wanted_nets`."""
    settings = config.joint.hidden_alignment
    return [("joint.hidden_alignment.weight", settings.weight, settings.net)]


def is_on(config: ConfigDict, nets: Nets) -> bool:
    """Returns whether a step aligns hidden states, with the frozen networks that there are."""
    settings = config.joint.hidden_alignment
    return settings.weight > 0 and settings.net in nets


def aligned_layer(config: ConfigDict) -> int:
    """Returns the number of the layer, counted from 1, whose hidden states are aligned."""
    return config.joint.hidden_alignment.layer or max(1, round(config.generator.model.num_layers / SHARE_OF_LAYERS))


def measure_hidden_alignment(
    config: ConfigDict, nets: Nets, projected: jax.Array, images: jax.Array, grid: tuple[int, int]
) -> jax.Array:
    """Returns L_HA, a scalar.

    Args:
        config: the joint config.
        nets: the frozen networks.
        projected: P of the hidden states, [B, S, F].
        images: the batch.
        grid: (h, w).
    """
    settings, dtype = config.joint.hidden_alignment, jnp.dtype(config.tokenizer.dtype)
    features = grid_features(NETS[settings.net], nets[settings.net], 0.5 * (images + 1.0), grid, dtype)
    features = jax.lax.stop_gradient(features).reshape(*projected.shape[:2], -1)
    if settings.position == READ:
        projected, features = projected[:, 1:], features[:, :-1]
    return alignment_losses(projected[:, :, None], features[:, :, None], 0.0, 0.0)[0]  # as maps of one column
