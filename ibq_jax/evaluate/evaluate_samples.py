"""Evaluates samples against reference images: those in an .npz, or those drawn from a generator's run."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from ibq_jax.base.errors import UsageError
from ibq_jax.base.processes import barrier
from ibq_jax.base.saved_run import SavedRun
from ibq_jax.base.sharding import check_batch, make_mesh, process_rows
from ibq_jax.data.pipeline import evaluation_batches, open_split
from ibq_jax.data.token_cache import read_run_manifest
from ibq_jax.evaluate.draw_samples import SampleSettings, draw_sample_set
from ibq_jax.evaluate.feature_nets import find_feature_nets, small_sample_caveats
from ibq_jax.evaluate.protocols import Protocol, find_protocol
from ibq_jax.evaluate.records import make_record
from ibq_jax.evaluate.sample_statistics import FeatureExtractor, Features, ImageSet, compare, read_moments

NETS = ("inception", "efficientnet")
FOLDER = "samples"  # of a run: the sets that were drawn to be evaluated


def evaluate_samples(
    samples: Path,
    reference: Path,
    *,
    protocol: str = "adm",
    batch_size: int = 32,
    weight_files: Mapping[str, str] | None = None,
) -> dict:
    """Compares the samples in an .npz with a reference; returns the evaluation record.

    Args:
        samples: an .npz with `arr_0` uint8 [N, H, W, 3], as `draw_sample_set` writes it.
        reference: an .npz of the same form, or with statistics (`mu` and `sigma`), or both.
        protocol: name of a protocol.
        batch_size: images per batch, over all devices.
        weight_files: the user's files of feature nets by kind (see `feature_nets.KINDS`).

    Raises:
        UsageError: a file is missing or not what it should be, or there is nothing that can be compared.
    """
    extractor, images = _Extractor(find_protocol(protocol), batch_size, weight_files or {}), ImageSet(samples)
    expected, run = extractor.reference(reference), {"run": None, "step": None, "weights": ""}
    return _compare(images, extractor, reference.name, expected, [], run)


def evaluate_generator_samples(
    run: Path,
    num: int,
    *,
    weights: str = "ema",
    reference: Path | None = None,
    protocol: str = "adm",
    batch_size: int = 32,
    weight_files: Mapping[str, str] | None = None,
) -> dict:
    """Draws `num` samples from a generator's run into its `samples/`, unless they are there, and evaluates them.

    Without a `reference` they are compared with the images that the run was trained on. The other arguments, the result
    and errors are those of `evaluate_samples`; `weights` is "ema" (averaged) or "raw".
    """
    saved = SavedRun.find(run, "autoregressive", needed="a generator")
    step, manifest = saved.saved_step(), read_run_manifest(saved.workdir)
    if reference is None and "dir" not in manifest["data"]:
        raise UsageError(f"{saved.workdir} was imported, without its data: give --reference=FILE.npz")
    samples = saved.workdir / FOLDER / f"{step:07}-{weights}-{num}.npz"
    samples.parent.mkdir(exist_ok=True)
    missing = not samples.exists()
    barrier("looked")  # no process may complete the set before all have looked
    if missing:
        draw_sample_set(saved.workdir / "checkpoints" / str(step), samples, num, (), SampleSettings(weights=weights))
    extractor, caveats = _Extractor(find_protocol(protocol), batch_size, weight_files or {}), []
    if reference is None:
        name, features = extractor.originals(manifest)
        caveats.append(f"not comparable: against {name}, not {extractor.protocol.reference}")
    else:
        name, features = reference.name, extractor.reference(reference)
    run_fields = {"run": run, "step": step, "weights": weights}
    return _compare(ImageSet(samples), extractor, name, features, caveats, run_fields)


class _Extractor:
    """Reads images from several kinds of places and computes their features under one protocol."""

    def __init__(self, protocol: Protocol, batch_size: int, weight_files: Mapping[str, str]):
        self.protocol, self._batch_size, self._mesh = protocol, batch_size, make_mesh({"data": -1})
        check_batch(batch_size, self._mesh, 1, "--batch-size")
        self._features = FeatureExtractor(find_feature_nets(NETS, weight_files), protocol, self._mesh)

    def images(self, images: ImageSet) -> Features:
        """Returns the features of a set of images."""
        return self._features(images.batches(self._batch_size))

    def reference(self, path: Path) -> Features:
        """Returns the features of an .npz with images, statistics or both; its own statistics have precedence."""
        moments = read_moments(path)
        try:
            images = ImageSet(path)
        except UsageError:
            if not moments:
                raise
            return Features(statistics=moments)
        features = self.images(images)
        features.statistics |= moments
        return features

    def originals(self, manifest: Mapping) -> tuple[str, Features]:
        """Returns (description, features) of the images that the generator of a run's manifest was trained on."""
        data, preprocessing = manifest["data"], manifest["preprocessing"]
        split = data["splits"]["train"]["source"]
        batches: Iterable[Mapping[str, np.ndarray]] = evaluation_batches(
            open_split(data["name"], data["dir"], split),
            image_size=preprocessing["image_size"],
            resize=preprocessing["resize"],
            batch_size=self._batch_size,
            rows=process_rows(self._mesh, self._batch_size),
        )
        return f"the originals of {data['name']}/{split}", self._features(batches)


def _compare(
    samples: ImageSet, extractor: _Extractor, reference: str, expected: Features, caveats: list[str], run: Mapping
) -> dict:
    """Returns the evaluation record of `samples`, compared with the features `expected` of what `reference` names."""
    protocol, found = extractor.protocol, extractor.images(samples)
    metrics = dict(compare(found, expected, protocol))
    if len(metrics) == 1:  # the number of images alone
        raise UsageError(f"{reference} has no statistics of a net whose weights are here: nothing can be computed")
    return make_record(
        stage="autoregressive",
        split=samples.path.name,
        protocol=protocol,
        caveats=[
            *protocol.caveats(found.num_images, found.num_images, found.image_size),
            *small_sample_caveats(metrics, found.num_images),
            *caveats,
        ],
        metrics=metrics,
        reference=reference,
        samples=_settings(samples.path),
        **run,
    )


def _settings(samples: Path) -> dict:
    """Reads how a set was drawn from the .json next to it; empty if that is missing or damaged."""
    path = samples.with_suffix(".json")
    try:
        return json.loads(path.read_text()) if path.is_file() else {}
    except json.JSONDecodeError:
        return {}
