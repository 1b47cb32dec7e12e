"""Draws the codes of any number of samples on all devices, with classifier-free guidance (arXiv 2412.02692, 3.3).

It batches, seeds and checks; the loop that draws a batch's codes is in `generate.py`.

Shapes: N samples, P codes of a given prefix, S = h w codes per image.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from numbers import Integral

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ibq_jax.autoregressive.generate import LogitFilter, generate, step_weights
from ibq_jax.autoregressive.model import GeneratorModel
from ibq_jax.autoregressive.step import GeneratorTrainer
from ibq_jax.base.errors import UsageError
from ibq_jax.base.sharding import abstract_everywhere, batch_sharding, jit_on_mesh, replicated, to_host, with_sharding

SCHEDULES = ("constant", "linear", "cosine")


@dataclasses.dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance: logits without class + scale * (logits with class - logits without).

    Attributes:
        scale: at least 0; 1 is no guidance.
        schedule: over an image's codes the scale is "constant", or rises from 1 to `scale`, either "linear" or as
            (1 - cos(pi t^power)) / 2 ("cosine", the power-cosine schedule of arXiv 2303.14389), t from 0 to 1.
        power: of the cosine schedule.
        interval: the fractions of an image's codes, in [0, 1], between which guidance is on; the scale is 1 elsewhere.
    """

    scale: float = 1.0
    schedule: str = "constant"
    power: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self):
        if self.schedule not in SCHEDULES:
            raise UsageError(f"guidance schedule {self.schedule!r} is not one of {', '.join(SCHEDULES)}")
        if not (np.isfinite(self.scale) and self.scale >= 0):
            raise UsageError(f"guidance scale {self.scale} is not a number of at least 0 (1 is no guidance)")
        if not self.power > 0:
            raise UsageError(f"guidance power {self.power} is not positive")
        if len(self.interval) != 2 or not 0 <= self.interval[0] <= self.interval[1] <= 1:
            raise UsageError(f"guidance interval {self.interval} is not two increasing fractions in 0..1")

    def scale_per_position(self, positions: int) -> np.ndarray:
        """Returns the scale at each code of an image of S codes, float32 [S]."""
        t = np.linspace(0.0, 1.0, positions)
        rise = {"constant": np.ones_like(t), "linear": t, "cosine": (1 - np.cos(np.pi * t**self.power)) / 2}
        fraction = np.arange(positions) / positions
        on = (fraction >= self.interval[0]) & (fraction < self.interval[1])
        return np.where(on, 1 + (self.scale - 1) * rise[self.schedule], 1.0).astype(np.float32)


class Sampler:
    """Draws codes with fixed weights on the devices of `mesh`.

    Every device runs the same program on `per_device_batch` samples at a time (0: 4 on CPUs, 64 elsewhere), and the
    last batch is padded. So a sample depends, bit for bit, on nothing but its seed, id, class and prefix. With another
    `per_device_batch` sums are rounded differently, which can decide a tie between two codes.
    """

    def __init__(self, model: GeneratorModel, params: Mapping, mesh: Mesh, per_device_batch: int = 0):
        self._mesh, self._model = mesh, model.clone(mesh=None)
        self._per_device_batch = per_device_batch or (4 if mesh.devices.flat[0].platform == "cpu" else 64)
        self._params = jax.device_put(params, replicated(mesh))
        prepare = jax.jit(step_weights, static_argnums=0, out_shardings=replicated(mesh))
        self._weights = prepare(self._model, self._params)
        static = "model", "guided", "logit_filter"
        self._generate = jit_on_mesh(generate, mesh, static_argnames=static, out_shardings=batch_sharding(mesh))

    @property
    def batch_size(self) -> int:
        """Samples that all devices together draw at a time."""
        return self._mesh.size * self._per_device_batch

    def __call__(
        self,
        labels: np.ndarray,
        *,
        guidance: Guidance,
        logit_filter: LogitFilter,
        temperature: float,
        seed: int,
        sample_ids: np.ndarray | None = None,
        prefix: np.ndarray | None = None,
    ) -> np.ndarray:
        """Returns the codes of N samples, int32 [N, h, w].

        Args:
            labels: classes [N], 0..num_classes - 1; 0 in a model without classes.
            guidance: if its scale is 1 throughout, "no class" is never evaluated.
            logit_filter: which codes may be drawn.
            temperature: divides the logits; 0 takes the most likely code.
            seed: 0..2**32 - 1.
            sample_ids: the samples' numbers within the seed, [N]; 0..N - 1 if None.
            prefix: the first P codes of every sample, [N, P]; none if None.

        Raises:
            UsageError: labels, codes or settings are out of range.
        """
        labels, prefix = check_labels(self._model, labels), check_prefix(self._model, prefix, len(labels))
        sample_ids = np.arange(len(labels)) if sample_ids is None else np.asarray(sample_ids)
        guidance_scales = guidance.scale_per_position(self._model.positions)
        guided = bool(np.any(guidance_scales != 1))
        if guided and not (self._model.no_class and self._model.num_classes):
            raise UsageError(
                'guidance needs a model that was trained on "no class" too: this one was not '
                "(loss.class_dropout was 0, or its data set has no classes); use cfg_scale=1"
            )
        check_settings(temperature, seed)
        if not 0 <= sample_ids.min() <= sample_ids.max() < 2**32:
            raise UsageError(f"samples are numbered 0..2**32 - 1, not {sample_ids.min()}..{sample_ids.max()}")
        settings = {
            "logit_filter": dataclasses.replace(logit_filter, greedy=logit_filter.greedy or temperature == 0),
            "guided": guided,
            "guidance_scales": guidance_scales,
            "temperature": jnp.float32(temperature or 1.0),
        }
        codes = []
        for start in range(0, len(labels), self.batch_size):
            rows = slice(start, start + self.batch_size)
            batch = self._batch(labels[rows], sample_ids[rows], prefix[rows], seed)
            drawn = self._generate(self._model, self._params, self._weights, **batch, **settings)
            codes.append(to_host(drawn)[: len(labels[rows])])
        return np.concatenate(codes).reshape(-1, *self._model.grid)

    def _batch(self, labels: np.ndarray, sample_ids: np.ndarray, prefix: np.ndarray, seed: int) -> dict[str, jax.Array]:
        """Returns labels, random keys and prefixes of one batch as `generate` takes them: padded, on the devices."""
        padded = partial(pad_batch, size=self.batch_size, mesh=self._mesh)
        ids = padded(sample_ids.astype(np.uint32))
        keys = jax.vmap(partial(jax.random.fold_in, jax.random.key(seed)))(ids)
        return {"labels": padded(labels), "keys": keys, "prefix": padded(prefix)}


def sampling_program(trainer: GeneratorTrainer) -> tuple[Callable, tuple]:
    """Returns what `sample` compiles for a trainer's model, mesh and config.sample, and its abstract arguments.

    It draws all codes of config.data.batch_size samples.
    """
    mesh, config, model = trainer.mesh, trainer.config.sample, trainer.model.clone(mesh=None)
    guided, samples = config.cfg_scale != 1, trainer.config.data.batch_size
    logit_filter = LogitFilter(config.top_k, config.top_p, greedy=config.temperature == 0)

    def draw(params, weights, labels, keys, scales, temperature):
        return generate(
            model,
            params,
            weights,
            labels=labels,
            keys=keys,
            prefix=jnp.zeros((samples, 0), jnp.int32),
            guidance_scales=scales,
            temperature=temperature,
            guided=guided,
            logit_filter=logit_filter,
        )

    params = abstract_everywhere(lambda: trainer.create_state(0).params, mesh)
    weights = abstract_everywhere(partial(step_weights, model), mesh, params)
    labels_and_keys = jax.eval_shape(lambda: (jnp.zeros(samples, int), jax.random.split(jax.random.key(0), samples)))
    batch = with_sharding(labels_and_keys, batch_sharding(mesh))
    settings = abstract_everywhere(lambda: (jnp.zeros(model.positions), jnp.zeros(())), mesh)
    return jax.jit(draw, out_shardings=batch_sharding(mesh)), (params, weights, *batch, *settings)


def pad_batch(rows: np.ndarray, size: int, mesh: Mesh) -> jax.Array:
    """Returns rows [n, ...] padded to `size` with copies of the last one, split over the devices of the mesh."""
    rows = np.concatenate((rows, np.repeat(rows[-1:], size - len(rows), axis=0)))
    return jax.device_put(rows, batch_sharding(mesh))


def check_settings(temperature: float, seed: int) -> None:
    """Raises UsageError for a temperature or a seed that cannot be."""
    if not (np.isfinite(temperature) and temperature >= 0):
        raise UsageError(f"temperature={temperature} is not a number of at least 0; 0 takes the most likely code")
    if not isinstance(seed, Integral) or not 0 <= seed < 2**32:
        raise UsageError(f"seed={seed} is not an integer in 0..2**32 - 1")


def check_labels(model: GeneratorModel, labels: np.ndarray, no_class: bool = False) -> np.ndarray:
    """Returns labels as int32 [N]. With `no_class`, num_classes ("no class") is allowed too if the model knows it.

    Raises UsageError for another shape or type, no labels at all, or one out of range.
    """
    labels = np.asarray(labels)
    if labels.ndim != 1 or not labels.size or not np.issubdtype(labels.dtype, np.integer):
        raise UsageError(f"labels are integers [N], at least one, not {labels.dtype} of shape {labels.shape}")
    last = max(model.num_classes - 1 + (no_class and model.no_class), 0)
    _check_range(labels, last, "labels")
    return labels.astype(np.int32)


def check_prefix(model: GeneratorModel, prefix: np.ndarray | None, rows: int) -> np.ndarray:
    """Returns a prefix as int32 [N, P]. Raises UsageError for another shape or type, or a code out of range."""
    if prefix is None:
        return np.zeros((rows, 0), np.int32)
    prefix = np.asarray(prefix)
    if prefix.ndim != 2 or len(prefix) != rows or not np.issubdtype(prefix.dtype, np.integer):
        raise UsageError(f"a prefix is integer codes [{rows}, P], not {prefix.dtype} of shape {prefix.shape}")
    if prefix.shape[1] >= model.positions:
        raise UsageError(f"a prefix of {prefix.shape[1]} codes leaves none of an image's {model.positions} to draw")
    _check_range(prefix, model.vocab_size - 1, "a prefix's codes")
    return prefix.astype(np.int32)


def check_codes(model: GeneratorModel, codes: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the codes of whole images as int32 [N, h, w] and their labels, which may be "no class", as int32 [N].

    Raises UsageError for other shapes or types, or values out of range.
    """
    codes, labels = np.asarray(codes), check_labels(model, labels, no_class=True)
    shape = (len(labels), *model.grid)
    if codes.shape not in (shape, (len(labels), model.positions)) or not np.issubdtype(codes.dtype, np.integer):
        raise UsageError(f"codes are integers {list(shape)} for these labels, not {codes.dtype} of shape {codes.shape}")
    _check_range(codes, model.vocab_size - 1, "codes")
    return codes.reshape(shape).astype(np.int32), labels


def _check_range(values: np.ndarray, last: int, what: str) -> None:
    if values.size and not 0 <= values.min() <= values.max() <= last:
        raise UsageError(f"{what} lie in 0..{last}; these reach from {values.min()} to {values.max()}")
