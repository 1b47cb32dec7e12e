"""Losses that frozen networks give: distances between an image and its reconstruction, and alignment of latents.

Shapes: images and reconstructions [B, H, W, 3] in [-1, 1]; hidden maps [B, h_m, w_m, C_m]; positions [B, h, w, C].
Which networks a config looks for is `wanted_nets`; a loss whose network is absent is off. docs/losses.md has the
formulas and their sources.
"""

from collections.abc import Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from ibq_jax.base.precision import FULL
from ibq_jax.pretrained import lpips
from ibq_jax.pretrained.frozen_nets import NETS, grid_features, resized
from ibq_jax.pretrained.normalisation import unit_channels
from ibq_jax.tokenizer.discriminators import frozen_net
from ibq_jax.tokenizer.micro_batches import MicroBatches, merge
from ibq_jax.tokenizer.model import latent_dim

LPIPS_NET = "vgg16"
Nets = Mapping[str, dict]  # weights by the network's name
Use = tuple[str, float, str]  # of a network: (the config field of a loss's weight, that weight, the network's name)


def wanted_nets(config: ConfigDict, more: Sequence[Use] = ()) -> dict[str, list[str]]:
    """Returns {network: the config fields that give its losses their weights} for all frozen networks of a config.

    `more` are uses that a tokenizer's config does not have.
    """
    loss, alignment = config.loss, config.alignment
    uses = [
        ("loss.perceptual_weight", loss.perceptual_weight, LPIPS_NET),
        ("loss.features_weight", loss.features_weight, loss.features_net),
        ("loss.logits_weight", loss.logits_weight, loss.logits_net),
        ("alignment.weight", alignment.weight, alignment.net),
        ("discriminator.name", frozen_net(config) is not None, config.discriminator.net),
        *more,
    ]
    wanted: dict[str, list[str]] = {}
    for field, weight, net in uses:
        if weight:
            wanted.setdefault(net, []).append(field)
    return wanted


def weight_shapes(config: ConfigDict, more: Sequence[Use] = ()) -> dict[str, dict]:
    """Returns the shapes and types of the weights of `wanted_nets`."""
    return {
        name: lpips.weight_shapes(LPIPS_NET) if name == LPIPS_NET else NETS[name].weight_shapes()
        for name in wanted_nets(config, more)
    }


def measure_lpips(config: ConfigDict, nets: Nets, images: jax.Array, reconstructions: jax.Array) -> jax.Array:
    """Returns LPIPS of each image, float32 [B], or zeros if its network is absent."""
    if LPIPS_NET not in nets:
        return jnp.zeros((images.shape[0],))
    return lpips.lpips(nets[LPIPS_NET], images, reconstructions, dtype=jnp.dtype(config.dtype))


def feature_distances(maps: Sequence[jax.Array], others: Sequence[jax.Array]) -> jax.Array:
    """Returns the distances of two batches' hidden maps, float32 [B]: LPIPS without its learned heads.

    Of every position's channels, scaled to length 1, the squared differences are summed (arXiv 1801.03924, section 3),
    then averaged over positions and over the maps.
    """
    terms = []
    for hidden, other in zip(maps, others, strict=True):
        difference = unit_channels(hidden.astype(jnp.float32)) - unit_channels(other.astype(jnp.float32))
        terms.append(jnp.mean(jnp.sum(difference**2, axis=-1), axis=(1, 2)))
    return jnp.mean(jnp.stack(terms), axis=0)


def measure_features(config: ConfigDict, nets: Nets, images: jax.Array, reconstructions: jax.Array) -> jax.Array:
    """Returns the distances of the hidden maps of network loss.features_net, float32 [B]."""
    name, dtype = config.loss.features_net, jnp.dtype(config.dtype)
    both = (resized(NETS[name], 0.5 * (batch + 1.0)) for batch in (images, reconstructions))
    return feature_distances(*(NETS[name].maps(nets[name], batch, dtype) for batch in both))


def measure_logits(config: ConfigDict, nets: Nets, images: jax.Array, reconstructions: jax.Array) -> jax.Array:
    """Returns the mean squared differences of the class logits of network loss.logits_net, float32 [B].

    As in 1d-tokenizer (arXiv 2406.07550), which takes ConvNeXt-S of images that are resized to 224x224.
    """
    name, dtype = config.loss.logits_net, jnp.dtype(config.dtype)
    classify = NETS[name].logits
    assert classify is not None, f"{name} was checked to be a classifier"
    both = (resized(NETS[name], 0.5 * (batch + 1.0), NETS[name].side) for batch in (images, reconstructions))
    ours, theirs = (classify(nets[name], batch, dtype).astype(jnp.float32) for batch in both)
    return jnp.mean((ours - theirs) ** 2, axis=1)


def alignment_losses(
    projected: jax.Array, features: jax.Array, cosine_margin: float, distance_margin: float
) -> tuple[jax.Array, jax.Array]:
    """Returns the two terms of VA-VAE's VF loss (arXiv 2501.01423, equations 2 and 3), scalars.

    Args:
        projected: latents, projected to the channels of `features`, [B, h, w, C].
        features: a frozen network's, of the same shape.
        cosine_margin: positions whose cosine is within this of 1 cost nothing.
        distance_margin: pairs of an image's positions whose cosines differ by less cost nothing.
    """
    ours, theirs = (
        unit_channels(x.astype(jnp.float32)).reshape(x.shape[0], -1, x.shape[-1]) for x in (projected, features)
    )
    cosine = jnp.einsum("bic,bic->bi", ours, theirs, precision=FULL)
    between_ours, between_theirs = (jnp.einsum("bic,bjc->bij", x, x, precision=FULL) for x in (ours, theirs))
    return (
        jnp.mean(jax.nn.relu(1.0 - cosine_margin - cosine)),
        jnp.mean(jax.nn.relu(jnp.abs(between_ours - between_theirs) - distance_margin)),
    )


def measure_alignment(config: ConfigDict, nets: Nets, projection: dict, images: jax.Array, aligned: jax.Array):
    """Returns the sum of the two terms of `alignment_losses` for latents or hidden maps, a scalar.

    Args:
        config: the tokenizer's.
        nets: the frozen networks.
        projection: {"kernel" [D, C]}, trained with the tokenizer.
        images: the batch, [B, H, W, 3].
        aligned: what is to be like the network's features, [B, h, w, D].
    """
    settings, dtype = config.alignment, jnp.dtype(config.dtype)
    net = NETS[settings.net]
    features = grid_features(net, nets[settings.net], 0.5 * (images + 1.0), aligned.shape[1:3], dtype)
    projected = jnp.einsum("bhwd,dc->bhwc", aligned.astype(jnp.float32), projection["kernel"], precision=FULL)
    features = jax.lax.stop_gradient(features)
    return sum(alignment_losses(projected, features, settings.cosine_margin, settings.distance_margin))


def alignment_gradients(
    config: ConfigDict, nets: Nets, projection: dict, images: jax.Array, latents: jax.Array, micro_batches: MicroBatches
) -> tuple[jax.Array, dict, jax.Array]:
    """Returns (`measure_alignment` of a batch's latents, its gradients at the projection and at the latents)."""

    def measure(images, latents):
        return jax.value_and_grad(measure_alignment, argnums=(2, 4))(config, nets, projection, images, latents)

    alignment, (of_projection, of_latents) = micro_batches.map(measure, images, latents)
    of_projection = jax.tree.map(partial(jnp.mean, axis=0), of_projection)
    return jnp.mean(alignment), of_projection, merge(of_latents) / micro_batches.count


def aligned_channels(config: ConfigDict) -> int:
    """Returns D, the channels of what alignment.of names: the latents', or the decoder's at the lowest resolution."""
    if config.alignment.of == "latents":
        return latent_dim(config)
    return config.model.channels * config.model.channel_multipliers[-1]


def initial_projection(config: ConfigDict, key: jax.Array, channels: int) -> dict:
    """Returns the projection of D `channels` to those of alignment.net, random as PyTorch's linear layers are."""
    shape = (channels, NETS[config.alignment.net].feature_channels)
    return {"kernel": jax.random.uniform(key, shape, jnp.float32, -(channels**-0.5), channels**-0.5)}
