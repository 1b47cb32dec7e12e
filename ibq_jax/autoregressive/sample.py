"""Sampling from the generator, with classifier-free guidance (arXiv 2412.02692, section 3.3).

Shapes: N pictures, P codes of a given prefix, S = h w codes of a picture.
"""

import dataclasses
from collections.abc import Mapping
from functools import partial
from numbers import Integral

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ibq_jax.autoregressive.generate import LogitFilter, generate, step_weights
from ibq_jax.autoregressive.model import GeneratorModel
from ibq_jax.base import processes
from ibq_jax.base.errors import UsageError
from ibq_jax.base.sharding import batch_sharding, replicated, to_host

SCHEDULES = ("constant", "linear", "cosine")


@dataclasses.dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance: logits without class + scale * (logits with class - logits without).

    schedule: over a picture's codes the scale is "constant", or climbs from 1 to `scale`, "linear" or as
        (1 - cos(pi t^power)) / 2 ("cosine", the power-cosine schedule of arXiv 2303.14389), t from 0 to 1.
    interval: parts of the picture's codes, in [0, 1], between which guidance is on; the scale is 1 elsewhere.
    """

    scale: float = 1.0
    schedule: str = "constant"
    power: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self):
        if self.schedule not in SCHEDULES:
            raise UsageError(f"guidance schedule {self.schedule!r} does not exist; there are {', '.join(SCHEDULES)}")
        if not (np.isfinite(self.scale) and self.scale >= 0):
            raise UsageError(f"guidance scale {self.scale} is not a number of at least 0 (1 is no guidance)")
        if not self.power > 0:
            raise UsageError(f"guidance power {self.power} is not positive")
        if len(self.interval) != 2 or not 0 <= self.interval[0] <= self.interval[1] <= 1:
            raise UsageError(f"guidance interval {self.interval} is not two parts of a picture in 0..1, in this order")

    def scales(self, positions: int) -> np.ndarray:
        """The scale at each of a picture's codes, float32 [S]."""
        t = np.linspace(0.0, 1.0, positions)
        climb = {"constant": np.ones_like(t), "linear": t, "cosine": (1 - np.cos(np.pi * t**self.power)) / 2}
        place = np.arange(positions) / positions
        on = (place >= self.interval[0]) & (place < self.interval[1])
        return np.where(on, 1 + (self.scale - 1) * climb[self.schedule], 1.0).astype(np.float32)


class Sampler:
    """Draws pictures' codes, with fixed weights, on the devices of `mesh`.

    Every device runs the same program on `per_device_batch` samples at a time and pads the last batch, however many are
    asked for. So a sample depends on its seed, its id, its class and its prefix, and bit for bit on nothing else.
    Another `per_device_batch` rounds differently, which can decide a tie of two codes. 0 means 4 on CPUs, 64 elsewhere.
    """

    def __init__(self, model: GeneratorModel, params: Mapping, mesh: Mesh, per_device_batch: int = 0):
        self._mesh, self._model = mesh, model.clone(mesh=None)
        self._per_device_batch = per_device_batch or (4 if mesh.devices.flat[0].platform == "cpu" else 64)
        self._params = jax.device_put(params, replicated(mesh))
        prepare = jax.jit(step_weights, static_argnums=0, out_shardings=replicated(mesh))
        self._weights = prepare(self._model, self._params)
        self._generate = processes.jit(generate, mesh, static_argnums=(0, 1, 2), out_shardings=batch_sharding(mesh))

    @property
    def round_size(self) -> int:
        """Pictures that all devices together draw at a time."""
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
        """Codes int32 [N, h, w] of pictures with `labels` [N].

        Args:
            labels: classes, 0..num_classes - 1; in a model without classes 0.
            guidance: where its scale is 1 throughout, "no class" is never evaluated.
            logit_filter: which codes may be drawn.
            temperature: above 0; 0 takes the likeliest code.
            seed: 0..2**32 - 1.
            sample_ids: of the pictures within the seed, [N]; 0..N - 1 if None.
            prefix: the first P codes, given, [N, P]; none if None.

        Raises:
            UsageError: labels, codes or settings out of range.
        """
        labels, prefix = check_labels(self._model, labels), check_prefix(self._model, prefix, len(labels))
        sample_ids = np.arange(len(labels)) if sample_ids is None else np.asarray(sample_ids)
        scales = guidance.scales(self._model.positions)
        guided = bool(np.any(scales != 1))
        if guided and not (self._model.no_class and self._model.num_classes):
            raise UsageError(
                'guidance needs a model that has learned "no class": this one has not '
                "(loss.class_dropout was 0, or its data set has no classes); use cfg_scale=1"
            )
        if not (np.isfinite(temperature) and temperature >= 0):
            raise UsageError(f"temperature={temperature} is not a number of at least 0; 0 takes the likeliest code")
        if not isinstance(seed, Integral) or not 0 <= seed < 2**32:
            raise UsageError(f"seed={seed} is not a whole number in 0..2**32 - 1")
        if not 0 <= sample_ids.min() <= sample_ids.max() < 2**32:
            raise UsageError(f"pictures are numbered 0..2**32 - 1, not {sample_ids.min()}..{sample_ids.max()}")
        logit_filter = dataclasses.replace(logit_filter, greedy=logit_filter.greedy or temperature == 0)
        divisor = jnp.float32(temperature or 1.0)
        rounds = []
        for start in range(0, len(labels), self.round_size):
            rows = slice(start, start + self.round_size)
            batch = self._batch(labels[rows], sample_ids[rows], prefix[rows], seed)
            codes = self._generate(
                self._model, logit_filter, guided, self._params, self._weights, *batch, scales, divisor
            )
            rounds.append(to_host(codes)[: len(labels[rows])])
        return np.concatenate(rounds).reshape(-1, *self._model.grid)

    def _batch(self, labels: np.ndarray, sample_ids: np.ndarray, prefix: np.ndarray, seed: int) -> tuple:
        """Labels, keys and prefixes on the devices."""
        labels, sample_ids, prefix = (
            pad_batch(rows, self.round_size, self._mesh) for rows in (labels, sample_ids.astype(np.uint32), prefix)
        )
        return labels, jax.vmap(partial(jax.random.fold_in, jax.random.key(seed)))(sample_ids), prefix


def pad_batch(rows: np.ndarray, size: int, mesh: Mesh) -> jax.Array:
    """Rows [n, ...] on all devices of the mesh, pad_batch up to `size` with copies of the last."""
    rows = np.concatenate((rows, np.repeat(rows[-1:], size - len(rows), axis=0)))
    return jax.device_put(rows, batch_sharding(mesh))


def check_labels(model: GeneratorModel, labels: np.ndarray, no_class: bool = False) -> np.ndarray:
    """Labels as int32 [N]; `no_class` allows num_classes too, where the model has a row for it.

    Raises UsageError for another shape or type, none, or one out of range.
    """
    labels = np.asarray(labels)
    if labels.ndim != 1 or not labels.size or not np.issubdtype(labels.dtype, np.integer):
        raise UsageError(f"labels are integers [N], at least one, not {labels.dtype} of shape {labels.shape}")
    last = max(model.num_classes - 1 + (no_class and model.no_class), 0)
    _check_range(labels, last, "labels")
    return labels.astype(np.int32)


def check_prefix(model: GeneratorModel, prefix: np.ndarray | None, rows: int) -> np.ndarray:
    """A prefix as int32 [N, P]. Raises UsageError for another shape or type, or a code out of range."""
    if prefix is None:
        return np.zeros((rows, 0), np.int32)
    prefix = np.asarray(prefix)
    if prefix.ndim != 2 or len(prefix) != rows or not np.issubdtype(prefix.dtype, np.integer):
        raise UsageError(f"a prefix is integer codes [{rows}, P], not {prefix.dtype} of shape {prefix.shape}")
    if prefix.shape[1] >= model.positions:
        raise UsageError(f"a prefix of {prefix.shape[1]} codes leaves none of the picture's {model.positions} to draw")
    _check_range(prefix, model.vocab_size - 1, "a prefix's codes")
    return prefix.astype(np.int32)


def check_codes(model: GeneratorModel, codes: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Whole pictures' codes as int32 [N, h, w] and their labels as int32 [N], "no class" among them.

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
