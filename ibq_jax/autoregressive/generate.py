"""The compiled loop that draws codes: a prefill, then one step per code with cached keys and values.

`sample_codes.py` calls it for any number of samples, on all devices; `sample_images.py` decodes the codes to images.

Shapes: B samples per call in R rows (B, or 2 B under guidance: each sample with and then without its class), P codes
of a given prefix, S codes per image, V vocabulary; C, L, H, G, D as in the model. Within a step activations are
[C, R], channels first: multiplying few rows by a whole matrix then reads the matrix once, at the memory's speed.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from functools import partial
from numbers import Integral
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ibq_jax.autoregressive.layers import rms_norm, rotary_angles, rotate
from ibq_jax.autoregressive.model import GeneratorModel
from ibq_jax.base.errors import UsageError
from ibq_jax.base.precision import FULL

MOST_STAGES, LEAST_STAGE = 4, 64  # stages of a loop, and the positions of one
MATRIX_ROWS = 8  # a TPU's vector registers hold so many rows, and its matrix units take no fewer


@dataclasses.dataclass(frozen=True)
class LogitFilter:
    """Top-k and top-p (nucleus) filtering of logits before a code is drawn.

    Attributes:
        top_k: keeps the `top_k` most likely codes; 0 keeps all.
        top_p: then keeps a code if those more likely than it have a total probability of at most `top_p`; 1 keeps all.
        greedy: takes the most likely code instead of drawing one.
    """

    top_k: int = 0
    top_p: float = 1.0
    greedy: bool = False

    def __post_init__(self):
        if not isinstance(self.top_k, Integral) or self.top_k < 0:
            raise UsageError(f"top_k={self.top_k} is not an integer of at least 0; 0 keeps every code")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p={self.top_p} is not in (0, 1]; 1 keeps every code")

    def __call__(self, logits: jax.Array) -> jax.Array:
        """Returns logits [B, V] in which those of the codes that are not kept are minus infinity."""
        if 0 < self.top_k < logits.shape[-1]:
            logits = jnp.where(logits < lax.top_k(logits, self.top_k)[0][:, -1:], -jnp.inf, logits)
        if self.top_p < 1:
            ordered = jnp.sort(logits, axis=-1, descending=True)
            probabilities = jax.nn.softmax(ordered, axis=-1)
            # As released: a code is dropped if those more likely than it exceed top_p, so the most likely always stays.
            kept = jnp.cumsum(probabilities, axis=-1) - probabilities <= self.top_p
            lowest = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
            logits = jnp.where(logits < lowest, -jnp.inf, logits)
        return logits


class LayerWeights(NamedTuple):
    """One layer's matrices [out, in] and norms' scales [C, 1], in the form that a step uses."""

    attention_norm: jax.Array
    wqkv: jax.Array
    wo: jax.Array
    ffn_norm: jax.Array
    w1: jax.Array
    w3: jax.Array
    w2: jax.Array


class StepWeights(NamedTuple):
    """All weights that a step reads, except for the token embeddings."""

    layers: tuple[LayerWeights, ...]
    head_norm: jax.Array
    head: jax.Array


def step_weights(model: GeneratorModel, params: Mapping) -> StepWeights:
    """Returns the matrices of `params` split by layer, transposed and in the model's type, to be computed once."""
    blocks = params["blocks"]

    def layer(i: int) -> LayerWeights:
        def norm(name):
            return blocks[name]["scale"][i][:, None]

        def matrix(module, name):
            return blocks[module][name]["kernel"][i].T.astype(model.dtype)

        return LayerWeights(
            attention_norm=norm("attention_norm"),
            wqkv=matrix("attention", "wqkv"),
            wo=matrix("attention", "wo"),
            ffn_norm=norm("ffn_norm"),
            **{name: matrix("feed_forward", name) for name in ("w1", "w3", "w2")},
        )

    layers = tuple(layer(i) for i in range(model.num_layers))
    return StepWeights(layers, params["head_norm"]["scale"][:, None], params["head"].astype(model.dtype))


class Conditions(NamedTuple):
    """The modulations (adaLN) by the classes of R rows: of the layers [L, 6, C, R] and before the head [2, C, R]."""

    layers: jax.Array
    head: jax.Array


def generate(
    model: GeneratorModel,
    params: Mapping,
    weights: StepWeights,
    *,
    labels: jax.Array,
    keys: jax.Array,
    prefix: jax.Array,
    guidance_scales: jax.Array,
    temperature: jax.Array,
    guided: bool,
    logit_filter: LogitFilter,
) -> jax.Array:
    """Draws the codes of B samples one after another, int32 [B, S].

    Args:
        model: the generator; static under jit, as are `guided` and `logit_filter`.
        params: its parameters.
        weights: `step_weights(model, params)`.
        labels: the samples' classes, [B].
        keys: one random key per sample, [B]; the code at position s is drawn with fold_in(key, s).
        prefix: the first P < S codes, which are given, [B, P].
        guidance_scales: the scale of classifier-free guidance at each position, [S]; not read unless `guided`.
        temperature: divides the guided logits, [].
        guided: if False, "no class" is never evaluated.
        logit_filter: which codes may be drawn.
    """
    variables = {"params": params}
    given = prefix.shape[1]
    rows = _with_and_without_class(labels, model.num_classes) if guided else labels

    def per_row(codes: jax.Array) -> jax.Array:
        return jnp.repeat(codes, 2, axis=0) if guided else codes

    per_layer, head = model.apply(variables, rows, method="modulations")
    conditions = Conditions(per_layer.transpose(0, 2, 3, 1), head.transpose(1, 2, 0))
    hidden, keys_values = model.apply(variables, per_row(prefix), rows, (per_layer, head), method="prefill")
    cos, sin = rotary_angles(model.grid, model.head_channels)

    def draw(hidden: jax.Array, position: jax.Array) -> jax.Array:
        logits = _product(weights.head, hidden).T
        if guided:
            with_class, without = logits[::2], logits[1::2]
            logits = without + (with_class - without) * guidance_scales[position]
        return _draw(logits, logit_filter, temperature, keys, position)

    def step(carry, position):
        """Draws the code at `position`; the code before it is at index `position` of the sequence, after the class."""
        codes, caches = carry
        x = model.apply(variables, per_row(codes)[:, None], method="embed")[:, 0].T
        angles = cos[position][None, None], sin[position][None, None]
        hidden, caches = _network_step(model, weights, conditions, caches, x, position, angles)
        drawn = draw(hidden, position)
        return (drawn, caches), drawn

    codes = draw(hidden.T, jnp.int32(given))
    drawn, caches = [codes[None]], _caches(keys_values)
    for begin, end in _stages(given + 1, model.positions):
        caches = jax.tree.map(partial(_lengthened, positions=end), caches)
        (codes, caches), others = lax.scan(step, (codes, caches), jnp.arange(begin, end, dtype=jnp.int32))
        drawn.append(others)
    return jnp.concatenate((prefix, jnp.concatenate(drawn).T), axis=1)


def _stages(begin: int, end: int) -> Iterator[tuple[int, int]]:
    """Yields the parts of begin .. end - 1 in which caches of one length are read, whose ends `begin` does not change.

    A step reads whole caches, so that with one stage half of what is read would be positions yet to come.
    """
    size = max(LEAST_STAGE, -(-end // MOST_STAGES))
    while begin < end:
        last = min(end, (begin // size + 1) * size)
        yield begin, last
        begin = last


def _with_and_without_class(labels: jax.Array, num_classes: int) -> jax.Array:
    """Labels [B] -> [2 B], each followed by "no class"."""
    return jnp.stack((labels, jnp.full_like(labels, num_classes)), axis=1).reshape(-1)


def _draw(logits, logit_filter: LogitFilter, temperature, keys, position) -> jax.Array:
    """Draws one code per sample from logits [B, V], int32 [B]."""
    if logit_filter.greedy:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logit_filter(logits / temperature)
    noise = jax.vmap(lambda key: jax.random.gumbel(jax.random.fold_in(key, position), logits.shape[1:]))(keys)
    return jnp.argmax(logits + noise, axis=-1).astype(jnp.int32)


def _network_step(model, weights: StepWeights, conditions: Conditions, caches, x, position, angles):
    """Applies all layers at one position, token embeddings x [C, R] -> (the head's input [C, R], the new caches)."""
    updated = []
    for layer, modulation, cache in zip(weights.layers, conditions.layers, caches, strict=True):
        x, cache = _layer_step(model, layer, modulation, cache, x, position, angles)
        updated.append(cache)
    scale, shift = conditions.head
    return rms_norm(x, jnp.broadcast_to(weights.head_norm, x.shape), axis=0) * (1 + scale) + shift, tuple(updated)


def _layer_step(model, weights: LayerWeights, modulation, cache, x, position, angles):
    """Applies one layer at one position, x [C, R] -> ([C, R], cache); cache: keys and values, each [R, G, S, D]."""
    gamma1, gamma2, scale1, scale2, shift1, shift2 = modulation
    norm1, norm2 = (jnp.broadcast_to(scale, x.shape) for scale in (weights.attention_norm, weights.ffn_norm))
    y = rms_norm(x, norm1, axis=0) * (1 + scale1) + shift1
    y, cache = _attend(model, _product(weights.wqkv, y), cache, position, angles)
    x = x + gamma1 * _product(weights.wo, y)
    y = rms_norm(x, norm2, axis=0) * (1 + scale2) + shift2
    hidden = jax.nn.silu(_product(weights.w1, y)) * _product(weights.w3, y)
    return x + gamma2 * _product(weights.w2, hidden), cache


def _attend(model, qkv: jax.Array, cache, position, angles):
    """qkv [(H + 2 G) D, R] at `position` -> (the heads' outputs [H D, R], the cache with this position added)."""
    r, g, d = qkv.shape[1], model.num_kv_heads, model.head_channels
    query, key, value = jnp.split(qkv.T.reshape(r, -1, d), (model.num_heads, model.num_heads + g), axis=1)
    query, key = (rotate(t, *angles).astype(model.dtype) for t in (query, key))
    new = key, value.astype(model.dtype)
    keys, values = (
        lax.dynamic_update_slice_in_dim(c, n[:, :, None], position, 2) for c, n in zip(cache, new, strict=True)
    )
    seen = jnp.arange(keys.shape[2]) <= position
    query = query.reshape(r, g, -1, d)
    out = lax.platform_dependent(query, keys, values, seen, tpu=_attention_of_padded_rows, default=_attention)
    return out.reshape(r, -1).T, (keys, values)


def _attention(query: jax.Array, keys: jax.Array, values: jax.Array, seen: jax.Array) -> jax.Array:
    """Returns float32 [R, G, Q, D] for queries [R, G, Q, D], of keys and values [R, G, S, D] that are `seen` [S]."""
    scores = _einsum("rgqd,rgsd->rgqs", query, keys) * query.shape[-1] ** -0.5
    weights = jax.nn.softmax(jnp.where(seen[None, None, None], scores, -jnp.inf), axis=-1).astype(values.dtype)
    return _einsum("rgqs,rgsd->rgqd", weights, values)


def _attention_of_padded_rows(query: jax.Array, keys: jax.Array, values: jax.Array, seen: jax.Array) -> jax.Array:
    """Returns the same with rows of zeros added to the queries, so that a TPU's matrix units multiply them.

    Products with one row are computed by its vector units, which the compiler expects to take 30 times as long.
    """
    count = query.shape[2]
    query = jnp.pad(query, ((0, 0), (0, 0), (0, -count % MATRIX_ROWS), (0, 0)))
    return _attention(query, keys, values, seen)[:, :, :count]


def _product(matrix: jax.Array, x: jax.Array) -> jax.Array:
    """Multiplies [out, in] by [in, R] in the matrix's type -> float32.

    The barriers keep XLA from folding a neighbouring transpose into the product: its other forms take 20 times as long
    on a CPU.
    """
    x = lax.optimization_barrier(x.astype(matrix.dtype))
    return lax.optimization_barrier(_einsum("oi,ir->or", matrix, x))


def _einsum(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns the einsum of arrays of one type, every bit of which is multiplied on every machine, in float32."""
    return jnp.einsum(spec, a, b, precision=FULL, preferred_element_type=jnp.float32)


def _caches(keys_values: Any) -> tuple:
    """A prefill's keys and values [L, R, T, G, D] -> those of each layer [R, G, T, D]."""
    keys, values = (array.transpose(0, 1, 3, 2, 4) for array in keys_values)
    return tuple(zip(keys, values, strict=True))


def _lengthened(cache: jax.Array, positions: int) -> jax.Array:
    """Returns a cache [R, G, T, D] with zeros after its positions, [R, G, positions, D]."""
    return jnp.pad(cache, ((0, 0), (0, 0), (0, positions - cache.shape[2]), (0, 0)))
