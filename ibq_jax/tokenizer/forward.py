"""A batch's pass through the tokenizer for a train step, what it costs, and the way back.

Shapes: B images [B, H, W, 3] in [-1, 1], in A micro-batches; latents [B, h, w, D], codes [B, h, w].
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from ibq_jax.tokenizer.autoencoder import SEEN
from ibq_jax.tokenizer.discriminators import DiscriminatorState
from ibq_jax.tokenizer.micro_batches import MicroBatches, merge
from ibq_jax.tokenizer.model import PROJECTION, TokenizerModel
from ibq_jax.tokenizer.net_losses import Nets, measure_alignment
from ibq_jax.tokenizer.parts import PARTS, only, without


class EncoderEnd(NamedTuple):
    """The end of the encoder in a pass, where the alignment's adaptive weight compares losses."""

    inputs: jax.Array  # [B, h, w, C], of that layer
    latents: jax.Array  # [B, h, w, D]
    pull_back: Callable[[jax.Array], jax.Array]  # a loss's gradient at reconstructions -> at the latents


class Forward(NamedTuple):
    """One pass of a batch through the tokenizer, and the way back."""

    reconstructions: jax.Array  # [B, H, W, 3]
    latent_loss: jax.Array  # [], what latents and codes cost
    latents: jax.Array | None  # [B, h, w, D], if they were asked for
    indices: jax.Array  # [B, h, w]
    metrics: dict[str, jax.Array]
    last_input: jax.Array | None  # of the decoder's last layer, if the adversarial loss's adaptive weight needs it
    pull_back_outputs: Callable
    encoder_end: EncoderEnd | None = None  # if the alignment has an adaptive weight

    def pull_back(self, judged: "Judged", of_latents: jax.Array | None = None) -> dict:
        """Returns the gradient of the trained parameters.

        It is that of all that was judged, and of one more loss, if its gradient at the latents is given.
        """
        at_latents = [gradient for gradient in (judged.of_latents, of_latents) if gradient is not None]
        outputs = (
            judged.cotangent,
            jnp.ones_like(self.latent_loss),
            sum(at_latents[1:], at_latents[0]) if at_latents else None,
        )
        return self.pull_back_outputs(outputs)[0] | (judged.of_projection or {})


class Judged(NamedTuple):
    """The cost of a batch of reconstructions, without that of latents and codes."""

    discriminator: DiscriminatorState | None  # after its update
    loss: jax.Array  # []
    cotangent: jax.Array  # [B, H, W, 3], the loss's gradient at the reconstructions
    metrics: dict[str, jax.Array]
    of_latents: jax.Array | None = None  # [B, h, w, D], the gradient of an alignment with an adaptive weight
    of_projection: dict | None = None  # {module: its gradient}, of such an alignment


@dataclass(frozen=True)
class ForwardPass:
    """The passes of a config's model; a step runs one. `frozen` are the modules that are not trained."""

    config: ConfigDict
    model: TokenizerModel
    micro_batches: MicroBatches
    frozen: tuple[str, ...]

    def run(self, weights: dict, images: jax.Array, nets: Nets, with_latents: bool = False) -> Forward:
        """Runs images [B, H, W, 3] through the tokenizer with gathered weights."""
        trained, frozen = without(weights, self.frozen), only(weights, self.frozen)
        if adapts_alignment(self.config, nets):
            return self._run_in_two(trained, frozen, images, nets)
        outputs, pull_back, (indices, metrics, last_input) = jax.vjp(
            lambda trained: self.reconstruct(trained | frozen, images, nets, with_latents), trained, has_aux=True
        )
        return Forward(*outputs, indices, metrics, last_input, pull_back)

    def _run_in_two(self, trained: dict, frozen: dict, images: jax.Array, nets: Nets) -> Forward:
        """Runs the encoder, then the rest: two ways back lead to the latents, of which one goes on to the encoder."""
        encoding, other = only(trained, PARTS["encoder"]), without(trained, (*PARTS["encoder"], PROJECTION))
        latents, pull_encoder, encoder_input = jax.vjp(
            lambda params: self._encode(params, images), encoding, has_aux=True
        )
        (reconstructions, loss, _), pull_rest, (indices, metrics, last_input) = jax.vjp(
            lambda other, latents: self.reconstruct(other | frozen, images, nets, False, latents),
            other,
            latents,
            has_aux=True,
        )

        def pull_back(cotangents: tuple) -> tuple[dict]:
            *of_outputs, of_latents = cotangents
            of_other, at_latents = pull_rest((*of_outputs, None))
            return (of_other | pull_encoder(at_latents + of_latents)[0],)

        def to_latents(of_reconstructions: jax.Array) -> jax.Array:
            return pull_rest((of_reconstructions, jnp.zeros_like(loss), None))[1]

        end = EncoderEnd(encoder_input, latents, to_latents)
        return Forward(reconstructions, loss, latents, indices, metrics, last_input, pull_back, end)

    def _encode(self, params: dict, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns (latents, what the encoder's last layer gets, of which it is not differentiated)."""

        def encode(micro_batch):
            latents, kept = self.model.apply({"params": params}, micro_batch, method="latent", mutable=[SEEN])
            return latents, kept[SEEN]["encoder"]["last_input"][0]

        latents, last_input = self.micro_batches.map(encode, images)
        return merge(latents), jax.lax.stop_gradient(merge(last_input))

    def reconstruct(
        self, params: dict, images: jax.Array, nets: Nets, with_latents: bool, latents: jax.Array | None = None
    ):
        """Returns the fields of `Forward` up to `latents`, and the next three, of which it is not differentiated.

        Images whose `latents` are given are not encoded, and neither are the latents aligned.
        """
        config = self.config
        aligns = config.alignment.weight and config.alignment.net in nets and latents is None
        adapts = config.loss.adaptive_limit > 0

        def reconstruct(micro_batch, latents):
            look = bool(aligns or adapts or with_latents)
            reconstruction, quantized, seen = self._forward(params, micro_batch, latents, look)
            scalars = {
                "loss/quantizer": quantized.quant_loss,
                "loss/entropy": quantized.entropy_loss,
                "codebook/sample_entropy": quantized.sample_entropy,
                "codebook/batch_entropy": quantized.batch_entropy,
                "codebook/max_probability": quantized.max_probability,
            }
            scalars = {name: value for name, value in scalars.items() if value is not None}
            if aligns:
                aligned = seen[config.alignment.of]
                scalars["loss/alignment"] = measure_alignment(config, nets, params[PROJECTION], micro_batch, aligned)
            maxima = {} if quantized.max_logit is None else {"codebook/max_logit": quantized.max_logit}
            latents, last_input = seen["latents"] if with_latents else None, seen["last"] if adapts else None
            return reconstruction, latents, quantized.indices, scalars, maxima, last_input

        mapped = self.micro_batches.map(reconstruct, images, latents)
        reconstructions, latents, indices, scalars, maxima, last = mapped
        scalars = jax.tree.map(jnp.mean, scalars)
        weights = config.loss
        loss = weights.quantizer_weight * scalars["loss/quantizer"] + weights.entropy_weight * scalars["loss/entropy"]
        metrics = scalars | {"loss/codebook": loss} | jax.tree.map(jnp.max, maxima)
        if aligns:
            loss += config.alignment.weight * scalars["loss/alignment"]
        aux = merge(indices), metrics, None if last is None else merge(last)
        outputs = merge(reconstructions), loss, None if latents is None else merge(latents)
        return outputs, jax.lax.stop_gradient(aux)

    def _forward(self, params: dict, images: jax.Array, latents: jax.Array | None, look: bool) -> tuple:
        """Returns (reconstructions, the quantizer's output, {} or with `look` what losses may look at, by name)."""
        inputs, method = (images, "__call__") if latents is None else (latents, "from_latents")
        if not look:
            return *self.model.apply({"params": params}, inputs, method=method), {}
        (reconstructions, quantized), kept = self.model.apply({"params": params}, inputs, method=method, mutable=[SEEN])
        (latents,), decoder = kept[SEEN]["latent"], kept[SEEN]["decoder"]
        seen = {"latents": latents, "decoder": decoder["lowest_map"][0], "last": decoder["last_input"][0]}
        return reconstructions, quantized, seen


def adapts_alignment(config: ConfigDict, nets: Nets) -> bool:
    """Returns whether a step aligns latents by VA-VAE's adaptive weight, with the frozen networks that there are."""
    alignment = config.alignment
    return bool(alignment.weight and alignment.adaptive_limit) and alignment.net in nets
