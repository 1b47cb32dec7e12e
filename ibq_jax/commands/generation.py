"""What `evaluate` does with generated pictures: of an .npz, or drawn from a generator's run."""

import json
from argparse import Namespace
from collections.abc import Iterable, Mapping
from pathlib import Path

import jax
import numpy as np

from ibq_jax.autoregressive.restore import CODES
from ibq_jax.base.errors import UsageError
from ibq_jax.base.processes import barrier
from ibq_jax.base.saved_run import SavedRun
from ibq_jax.base.sharding import check_batch, make_mesh, process_rows
from ibq_jax.commands import sample
from ibq_jax.data.pipeline import evaluation_batches, open_split
from ibq_jax.data.token_cache import read_fields
from ibq_jax.evaluate.feature_nets import few_images, find_feature_nets
from ibq_jax.evaluate.protocols import PROTOCOLS
from ibq_jax.evaluate.records import record, save, show
from ibq_jax.evaluate.sample_statistics import FeatureExtractor, Features, ImageSet, compare, read_moments

NETS = ("inception", "efficientnet")
SETS = "samples"  # of a run: the sets that were drawn to be evaluated


def evaluate_drawn(flags: Namespace, saved: SavedRun) -> None:
    """Of a generator's run: draws --num pictures, or goes on drawing them, and evaluates them."""
    step = saved.saved_step()
    checkpoint = saved.workdir / "checkpoints" / str(step)
    (saved.workdir / SETS).mkdir(exist_ok=True)
    flags.samples = saved.workdir / SETS / f"{step:07}-{flags.weights}-{flags.num}.npz"
    if not flags.samples.exists():
        drawing = [f"--run={checkpoint}", f"--out={flags.samples}", f"--num={flags.num}", f"--weights={flags.weights}"]
        sample.main(drawing)
    barrier("drawn")  # the last process to end its part joins all of them
    _evaluate(flags, saved, step)


def evaluate_set(flags: Namespace) -> None:
    """Of an .npz of pictures."""
    if flags.reference is None:
        raise UsageError("--samples needs --reference=FILE.npz: pictures, or their statistics (mu and sigma)")
    _evaluate(flags, None, None)


def _evaluate(flags: Namespace, saved: SavedRun | None, step: int | None) -> None:
    protocol = PROTOCOLS[flags.protocol or "adm"]
    mesh = make_mesh({"data": -1})
    check_batch(flags.batch_size, mesh, 1, "--batch-size")
    pictures = ImageSet(flags.samples)
    extractor = FeatureExtractor(find_feature_nets(NETS, vars(flags)), protocol, mesh)
    where, reference = _reference(flags, saved, extractor, mesh)
    generated = extractor(pictures.batches(flags.batch_size))
    metrics = dict(compare(generated, reference, protocol))
    if len(metrics) == 1:
        raise UsageError(f"{where} has no statistics of a net whose weights are here: nothing can be computed")
    marks = [
        *protocol.marks(generated.images, generated.images, generated.side),
        *few_images(metrics, generated.images),
    ]
    if flags.reference is None:
        marks.append(f"not comparable: against {where}, not {protocol.reference}")
    found = record(
        stage="autoregressive",
        run=flags.run,
        step=step,
        weights=flags.weights if saved else "",
        split=str(flags.samples.name),
        protocol=protocol,
        marks=marks,
        metrics=metrics,
        reference=where,
        samples=_described(flags.samples),
    )
    show(found)
    print(f"  against {where}")
    save(found, saved and saved.workdir, f"{protocol.name}-{flags.samples.stem}", flags.json)


def _reference(
    flags: Namespace, saved: SavedRun | None, extractor: FeatureExtractor, mesh: jax.sharding.Mesh
) -> tuple[str, Features]:
    """(which pictures in words, what the nets saw of them)."""
    if flags.reference is None:
        where, batches = _originals(saved, flags.batch_size, mesh)
        return where, extractor(batches)
    moments = read_moments(flags.reference)
    try:
        pictures = ImageSet(flags.reference)
    except UsageError:
        if not moments:
            raise
        return flags.reference.name, Features(statistics=moments)
    seen = extractor(pictures.batches(flags.batch_size))
    seen.statistics |= moments
    return flags.reference.name, seen


def _originals(
    saved: SavedRun, batch_size: int, mesh: jax.sharding.Mesh
) -> tuple[str, Iterable[Mapping[str, np.ndarray]]]:
    """The pictures whose codes the run was trained on."""
    manifest = read_fields(saved.workdir / CODES)
    if "dir" not in manifest["data"]:
        raise UsageError(f"{saved.workdir} was imported, without its data: give --reference=FILE.npz")
    data, made = manifest["data"], manifest["preprocessing"]
    split = data["splits"]["train"]["source"]
    batches = evaluation_batches(
        open_split(data["name"], data["dir"], split),
        image_size=made["image_size"],
        resize=made["resize"],
        batch_size=batch_size,
        rows=process_rows(mesh, batch_size),
    )
    return f"the originals of {data['name']}/{split}", batches


def _described(samples: Path) -> dict:
    """How a set was drawn, as `sample` wrote it beside it; empty where it says nothing."""
    beside = samples.with_suffix(".json")
    try:
        return json.loads(beside.read_text()) if beside.is_file() else {}
    except json.JSONDecodeError:
        return {}
