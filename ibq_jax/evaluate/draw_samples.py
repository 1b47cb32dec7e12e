"""Draws samples from a generator's run: a contact sheet to look at, or a large set to evaluate."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from ibq_jax.autoregressive.generate import LogitFilter
from ibq_jax.autoregressive.model import build_model
from ibq_jax.autoregressive.restore import find_tokenizer, restore_run
from ibq_jax.autoregressive.sample_codes import Guidance, check_labels, check_settings
from ibq_jax.autoregressive.sample_images import ImageSampler
from ibq_jax.base.errors import UsageError
from ibq_jax.base.files import resolve
from ibq_jax.base.processes import barrier, joined
from ibq_jax.base.saved_run import SavedRun
from ibq_jax.base.sharding import make_mesh
from ibq_jax.data.preprocess import UnreadableImage, centre_crop, decode_image, resize_shorter_side
from ibq_jax.data.token_cache import read_run_manifest
from ibq_jax.evaluate.contact_sheet import contact_sheet
from ibq_jax.evaluate.sample_set import write_sample_set

MAX_CLASSES = 10  # of a contact sheet, unless labels are given


@dataclass(frozen=True)
class SampleSettings:
    """How samples are drawn. None stands for the value in the run's config.

    Attributes:
        weights: "ema" (averaged) or "raw".
        seed: sample number i of a seed is always the same.
        cfg_scale: classifier-free guidance; 1 is none. Schedule, power and interval are those of `Guidance`.
        temperature: 0 always takes the most likely code.
        top_k: draw from this many most likely codes; 0 for all.
        top_p: draw from the most likely codes that together have this probability.
        per_device_batch: samples that a device draws at once; 0 for 4 on CPUs and 64 elsewhere.
        tokenizer: the run or file of the codes' tokenizer; empty for the place that the token cache names.
        image: every sample starts with this image's first rows of codes.
        keep_rows: how many rows of codes of `image` are kept; None for the upper half.
    """

    weights: str = "ema"
    seed: int = 0
    cfg_scale: float | None = None
    cfg_schedule: str = "constant"
    cfg_power: float = 1.0
    cfg_interval: tuple[float, float] = (0.0, 1.0)
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    per_device_batch: int = 0
    tokenizer: str = ""
    image: Path | None = None
    keep_rows: int | None = None


def draw_contact_sheet(
    run: Path, out: Path, labels: Sequence[int] = (), per_class: int = 8, settings: SampleSettings | None = None
) -> int:
    """Draws `per_class` samples of each class in `labels` (default: the first 10) and writes them as the PNG `out`.

    Returns the number of classes. Raises UsageError as `draw_sample_set` does.
    """
    drawing = _Drawing(run, labels, settings or SampleSettings())
    shown = drawing.labels if labels else drawing.labels[:MAX_CLASSES]
    if jax.process_index() == 0:  # its devices suffice for a contact sheet
        images = drawing.draw(np.repeat(shown, per_class))
        images = images.reshape(len(shown), per_class, *images.shape[1:])
        names = drawing.class_names or ("",)
        Image.fromarray(contact_sheet(images, [names[label] for label in shown])).save(out, "PNG")
    return len(shown)


def draw_sample_set(
    run: Path, out: Path, num: int, labels: Sequence[int] = (), settings: SampleSettings | None = None
) -> bool:
    """Draws `num` samples, with every class in `labels` equally often, and writes them as the set `out` (.npz).

    A set that was begun with the same settings is continued; several processes share the work (see `sample_set`).

    Args:
        run: folder of a generator's run, or one of its checkpoints.
        out: the set, which must not exist yet.
        num: number of samples.
        labels: classes; all of them if empty.
        settings: how to draw.

    Returns:
        True once the set is complete; False while other processes are drawing their parts.

    Raises:
        UsageError: there is no generator's run or nothing saved in it, its tokenizer is missing or another one, labels,
            settings or the image are wrong, or `out` exists or was begun with other settings.
    """
    drawing = _Drawing(run, labels, settings or SampleSettings())
    complete = write_sample_set(
        out,
        np.resize(drawing.labels, num),
        drawing.draw,
        drawing.describe(),
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    barrier("drawn")  # the last process to finish its parts joins all of them
    return complete or joined()


class _Drawing:
    """A run's sampler with its settings."""

    def __init__(self, run: Path, labels: Sequence[int], settings: SampleSettings):
        saved = SavedRun.find(run, "autoregressive", needed="a generator")
        self._sampling = _sampling(settings, saved.config)  # what may be wrong is checked before weights are read
        check_settings(self._sampling["temperature"], settings.seed)
        image = settings.image and _read_image(settings.image)
        self._manifest = read_run_manifest(saved.workdir)
        self.class_names = tuple(self._manifest["data"]["class_names"])
        self.labels = check_labels(
            build_model(saved.config), np.asarray(labels or range(max(len(self.class_names), 1)))
        )
        tokenizer = find_tokenizer(settings.tokenizer, self._manifest, needed=True)
        assert tokenizer is not None  # as it was needed
        trainer, restored, _ = restore_run(run)
        self._run, self._step, self._given_labels, self._settings = run, restored.step, labels, settings
        params = jax.device_get(restored.state.weights(settings.weights))
        mesh = make_mesh({"data": -1}, jax.local_devices())
        self._sampler = ImageSampler(trainer.model, params, tokenizer, mesh, self._sampling, settings.per_device_batch)
        self._prefix = np.zeros((1, 0), np.int32) if image is None else self._first_codes(image)

    def draw(self, labels: np.ndarray, sample_ids: np.ndarray | None = None) -> np.ndarray:
        """Draws samples of `labels` [N] -> uint8 [N, H, W, 3]."""
        return self._sampler(labels, sample_ids, np.repeat(self._prefix, len(labels), axis=0))

    def describe(self) -> dict:
        """Returns everything that the samples depend on, for the set's .json; keys are those of earlier sets."""
        guidance, logit_filter = self._sampling["guidance"], self._sampling["logit_filter"]
        return {
            "run": str(resolve(self._run)),
            "weights": self._settings.weights,
            "seed": self._settings.seed,
            "temperature": self._sampling["temperature"],
            "top_k": logit_filter.top_k,
            "top_p": logit_filter.top_p,
            "cfg_scale": guidance.scale,
            "cfg_schedule": guidance.schedule,
            "cfg_power": guidance.power,
            "cfg_interval": list(guidance.interval),
            "labels": list(self._given_labels) or "all classes in turn",
            "lane": self._settings.per_device_batch,
            "image": str(self._settings.image or ""),
            "keep_rows": self._settings.keep_rows,
            "step": self._step,
            "tokenizer": self._manifest["tokenizer"]["fingerprint"],
        }

    def _first_codes(self, image: np.ndarray) -> np.ndarray:
        """Returns the codes [1, P] with which every sample starts: the first rows of the image's codes."""
        keep_rows = self._settings.keep_rows
        preprocessing = self._manifest["preprocessing"]
        image = centre_crop(resize_shorter_side(image, preprocessing["resize"]), preprocessing["image_size"])
        codes = self._sampler.encode(image)
        kept = len(codes) // 2 if keep_rows is None else keep_rows
        if kept >= len(codes):
            raise UsageError(f"--keep-rows={kept}: the image has {len(codes)} rows of codes; keep at most one fewer")
        return codes[:kept].reshape(1, -1)


def _read_image(path: Path) -> np.ndarray:
    """Returns the image of --image, uint8 [H, W, 3]."""
    try:
        return decode_image(path.read_bytes())
    except FileNotFoundError:
        raise UsageError(f"--image={path} does not exist") from None
    except UnreadableImage as error:
        raise UsageError(f"--image={path} cannot be read: {error}") from error


def _sampling(settings: SampleSettings, config: ConfigDict) -> dict:
    """Returns the arguments of `Sampler.__call__`: the settings, and the run's config where they are None."""

    def chosen(name: str):
        value = getattr(settings, name)
        return getattr(config.sample, name) if value is None else value

    return {
        "guidance": Guidance(chosen("cfg_scale"), settings.cfg_schedule, settings.cfg_power, settings.cfg_interval),
        "logit_filter": LogitFilter(chosen("top_k"), chosen("top_p")),
        "temperature": chosen("temperature"),
        "seed": settings.seed,
    }
