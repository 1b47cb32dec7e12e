"""Encodes a data set's images into a token cache (`ibq_jax.data.token_cache`), on all devices.

Shapes: B crops of a batch, each [S, S, 3]; V crops of an image; codes [h, w].

Each shard of the cache is encoded on its own, with its last batch padded. So its content depends on its number alone,
not on how many processes share the work or how often they were killed. All products on the way from an image to its
code are computed at the job's precision.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import grain
import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from ibq_jax.base.errors import UsageError
from ibq_jax.base.parts import write_part
from ibq_jax.base.sharding import (
    abstract_everywhere,
    batch_sharding,
    check_batch,
    global_batch,
    make_mesh,
    replicated,
)
from ibq_jax.data.batches import check_readers, iterate
from ibq_jax.data.pipeline import ImageSource, check_sizes, decode_record
from ibq_jax.data.preprocess import VIEWS, resize_shorter_side, to_float, views
from ibq_jax.data.token_cache import VERSION, CodedImage, find_manifest, read_manifest, record_type
from ibq_jax.data.token_cache_writer import (
    Check,
    Shard,
    finish,
    list_shards,
    locked_cache,
    shard_count,
    write_records,
)
from ibq_jax.tokenizer.model import PROJECTION, TokenizerModel
from ibq_jax.tokenizer.parts import without
from ibq_jax.tokenizer.quantizers import fingerprint_fields
from ibq_jax.tokenizer.step import TokenizerTrainer

# The model's fields that decide which codes an image gets; the others affect only training, speed or placement.
DECIDING_FIELDS = (
    "channels",
    "channel_multipliers",
    "num_res_blocks",
    "attention_resolutions",
    "z_channels",
    "resolution",
    "codebook_size",
    "code_dim",
    "dtype",
)
FINGERPRINT_NAMES = {"codebook_size": "num_codes"}  # the name this field had when the first caches were made

Encode = Callable[[np.ndarray], jax.Array]  # uint8 [B, S, S, 3] -> codes int32 [B, h, w]
WriteShard = Callable[[Shard, np.dtype, tqdm, Path], None]  # the shard, its records' type, the bar and the file


@dataclass(frozen=True)
class TokenizeJob:
    """The images to encode and how; `sources` and `views` are by split, "train" and "validation"."""

    sources: Mapping[str, ImageSource]
    views: Mapping[str, tuple[str, ...]]  # names of the crops
    image_size: int  # S
    resize: int  # pixels of the shorter side before cropping (antialiased)
    batch_size: int  # B, over this process's devices
    num_threads: int  # threads that decode images; each holds a batch
    precision: str = "float32"  # of all products between images and codes, one of `ibq_jax.base.precision.PRECISIONS`

    def crops(self, split: str) -> int:
        """Returns V, the number of crops of an image."""
        blank = np.zeros((self.image_size, self.image_size, 3), np.uint8)
        return len(views(blank, self.views[split], self.image_size))

    def load(self, split: str, index: int) -> dict[str, np.ndarray]:
        """Returns an image of a split: {"crops": uint8 [V, S, S, 3], "label": int32}."""
        source = self.sources[split]
        record = source[index]
        image = resize_shorter_side(decode_record(record, str(source)), self.resize)
        crops = views(image, self.views[split], self.image_size)
        return {"crops": crops, "label": np.asarray(record["label"], np.int32)}


class KnownCodes(Protocol):
    """Codes that need not be computed again, such as `ibq_jax.interop.renumber.RenumberedCodes`."""

    @property
    def manifest(self) -> Mapping:
        """The manifest of the token cache that has them."""
        ...

    def check_settings(self, settings: Mapping) -> None:
        """Raises UsageError unless a cache of these settings would hold the same images at the same precision."""
        ...

    def images(self, shard: Shard) -> Iterator[CodedImage]:
        """Yields the images of a shard, in order."""
        ...


def fingerprint(model: TokenizerModel, params: Mapping) -> str:
    """Returns a sha256 that is equal for tokenizers of equal codes: of the deciding fields and every parameter.

    The model's precision is one of those fields. The digest does not depend on the number of devices, nor on whether
    the tokenizer was trained here or imported. `params` must be readable from this process: whole on its devices or on
    the host, as `restore_run` returns them.
    """
    fields = {FINGERPRINT_NAMES.get(name, name): getattr(model, name) for name in DECIDING_FIELDS}
    fields["dtype"] = jnp.dtype(model.dtype).name
    if model.precision != "float32":  # left out otherwise, so that fingerprints in older token caches stay valid
        fields["precision"] = model.precision
    fields |= fingerprint_fields(model.quantizer, model.quantizer_settings)
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode())
    leaves, _ = jax.tree_util.tree_flatten_with_path(without(params, (PROJECTION,)))
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    for name in sorted(named):
        array = np.asarray(named[name])
        digest.update(f"{name} {array.shape} {array.dtype.name}\n".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def tokenize(
    model: TokenizerModel,
    params: Mapping,
    job: TokenizeJob,
    folder: Path,
    origin: Mapping,
    *,
    check: Check | None = None,
    known: KnownCodes | None = None,
    overwrite: bool,
    process_index: int,
    process_count: int,
) -> dict | None:
    """Encodes this process's shards into the token cache `folder`, except those that are there already.

    Args:
        model: the tokenizer.
        params: its parameters, as for `fingerprint`.
        job: what to encode.
        folder: the cache's folder, created if absent; the same for all processes.
        origin: the manifest's fields about the tokenizer besides its fingerprint: path, step, weights, config.
        check: as for `token_cache_writer.finish`; called by the process that completes the cache.
        known: the codes of all images, if they are known already; None to encode the images.
        overwrite: whether to empty the cache first.
        process_index: this process's index among process_count.
        process_count: the number of processes that share the shards.

    Returns:
        the manifest, if these shards complete the cache; None while other processes write theirs.

    Raises:
        UsageError: bad input, a precision that this machine lacks, or known codes of other images, with nothing
            written; or a record that is not an image, or a full disk, with whole shards kept.
    """
    check_job(job)
    check_overwrite(overwrite, process_count, folder)
    model, mesh = on_local_devices(model, job.precision)
    folder, params = Path(folder).resolve(), jax.device_get(params)
    settings = _settings(model, params, job, origin, mesh)
    if known is not None:
        known.check_settings(settings)
        settings["machine"] = known.manifest.get("machine", settings["machine"])  # the one that computed the codes
    with locked_cache(folder, settings, overwrite):
        if find_manifest(folder):
            print(f"{folder} is complete already; --overwrite makes it again")
            return read_manifest(folder)
        own = [shard for shard in list_shards(folder, settings) if shard.number % process_count == process_index]
        if known is None:
            _write_shards(own, settings, functools.partial(_encode_shard, job, _encoder(model, params, mesh)))
        else:
            _write_shards(own, settings, functools.partial(_copy_shard, known))
        return finish(folder, settings, check)


def on_local_devices(model: TokenizerModel, precision: str) -> tuple[TokenizerModel, jax.sharding.Mesh]:
    """Returns the model for encoding at a precision on this process's devices, and their mesh.

    Raises UsageError if the devices lack the precision.
    """
    mesh = make_mesh({"data": -1}, jax.local_devices())
    return model.clone(mesh=mesh).for_encoding(precision), mesh


def check_overwrite(overwrite: bool, process_count: int, folder: Path) -> None:
    """Raises UsageError if several processes are to overwrite a token cache."""
    if overwrite and process_count > 1:
        raise UsageError(f"--overwrite is for one process, not {process_count}: remove {folder} beforehand")


def check_job(job: TokenizeJob) -> None:
    """Raises UsageError for views, sizes or numbers that cannot be; needs no tokenizer."""
    check_batch(job.batch_size, make_mesh({"data": -1}, jax.local_devices()), 1, "--batch-size")
    check_sizes(job.image_size, job.resize)
    check_readers(job.num_threads)
    for names in job.views.values():
        _check_views(job, names)


def _check_views(job: TokenizeJob, names: tuple[str, ...]) -> None:
    for name in names:
        if name not in VIEWS:
            raise UsageError(f"there is no view {name!r}; the views are {', '.join(VIEWS)}")
    if len(set(names)) < len(names) or ("ten_crop" in names and len(names) > 1):
        raise UsageError(f"--views={','.join(names)} repeats a crop; ten_crop includes the centre and its flip")
    if "ten_crop" in names and job.resize < job.image_size + 2:  # with one spare pixel the centre is still a corner
        raise UsageError(
            f"ten_crop would store equal crops: images resized to {job.resize} pixels leave no room around crops of "
            f"{job.image_size}; give --resize={max(job.image_size + 2, round(1.1 * job.image_size))}, or more"
        )


def _settings(
    model: TokenizerModel, params: Mapping, job: TokenizeJob, origin: Mapping, mesh: jax.sharding.Mesh
) -> dict:
    """Returns the cache's settings (see `token_cache_writer`). Raises UsageError for a size the model cannot encode."""
    blank = jax.ShapeDtypeStruct((1, job.image_size, job.image_size, 3), jnp.uint8)
    [_, *grid] = jax.eval_shape(functools.partial(encode_crops, model.clone(mesh=None)), params, blank).shape
    source, device = job.sources["train"], mesh.devices.flat[0]
    return {
        "version": VERSION,
        "tokenizer": {"fingerprint": fingerprint(model, params), **origin},
        "data": {
            "name": source.name,
            "dir": os.path.abspath(source.data_dir),
            "class_names": list(source.class_names),
            "splits": {
                split: {
                    "source": source.split,
                    "images": len(source),
                    "views": list(job.views[split]),
                    "crops": job.crops(split),
                    "shards": shard_count(len(source)),
                }
                for split, source in job.sources.items()
            },
        },
        "preprocessing": {"image_size": job.image_size, "resize": job.resize, "antialias": True},
        "precision": model.precision,
        "machine": {"platform": device.platform, "device_kind": device.device_kind},
        "codebook_size": model.codebook_size,
        "grid": grid,
        "dtype": np.min_scalar_type(model.codebook_size - 1).name,
    }


def encode_crops(model: TokenizerModel, params: Mapping, crops: jax.Array) -> jax.Array:
    """Crops uint8 [B, S, S, 3] -> codes int32 [B, h, w], at the model's precision."""
    return model.apply({"params": params}, to_float(crops), method="encode")


def encoding_program(trainer: TokenizerTrainer) -> tuple[Callable, tuple]:
    """Returns what `tokenize` compiles for a trainer's model and mesh, and its abstract arguments: a batch of crops."""
    mesh, data = trainer.mesh, trainer.config.data
    params = abstract_everywhere(lambda: trainer.create_state(0).params, mesh)
    shape = (data.batch_size, data.image_size, data.image_size, 3)
    crops = jax.ShapeDtypeStruct(shape, jnp.uint8, sharding=batch_sharding(mesh))
    encode = jax.jit(functools.partial(encode_crops, trainer.encoding_model), out_shardings=batch_sharding(mesh))
    return encode, (params, crops)


def _encoder(model: TokenizerModel, params: Mapping, mesh: jax.sharding.Mesh) -> Encode:
    """Jits `encode_crops` itself: if a process writes a second cache, nothing is traced and compiled again."""
    params = jax.device_put(params, replicated(mesh))
    encode = jax.jit(encode_crops, static_argnums=0, out_shardings=batch_sharding(mesh))
    return lambda crops: encode(model, params, global_batch({"crops": crops}, mesh)["crops"])


def _write_shards(shards: list[Shard], settings: Mapping, write: WriteShard) -> None:
    """Writes the shards that are neither whole nor being written by another process."""
    missing = [shard for shard in shards if not shard.is_whole]
    total, left = (sum(len(shard.images) for shard in group) for group in (shards, missing))
    if left < total:
        print(f"continuing: {total - left:,} of {total:,} images are encoded")
    with tqdm(total=total, initial=total - left, unit=" images", disable=None, dynamic_ncols=True) as bar:
        for shard in missing:
            dtype = record_type(shard.split, settings)
            if not write_part(shard.path, functools.partial(write, shard, dtype, bar)):
                bar.update(len(shard.images))


def _copy_shard(known: KnownCodes, shard: Shard, dtype: np.dtype, bar: tqdm, path: Path) -> None:
    """Writes the shard's known codes to `path`."""
    records: Any = np.zeros(len(shard.images), dtype)
    for record, image in zip(records, known.images(shard), strict=True):
        record["index"], record["label"], record["codes"] = image["index"], image["label"], image["codes"]
    write_records(path, records)
    bar.update(len(records))


def _encode_shard(job: TokenizeJob, encode: Encode, shard: Shard, dtype: np.dtype, bar: tqdm, path: Path) -> None:
    """Encodes the shard's images and writes them to `path`; the next crops are decoded while B are encoded."""
    records: Any = np.zeros(len(shard.images), dtype)
    records["index"] = shard.images
    encoding, codes = deque(), []
    with contextlib.closing(_image_batches(shard, job)) as batches:
        for crops in padded_batches(_crops(batches, records, bar), job.batch_size):
            encoding.append(encode(crops))
            if len(encoding) > 1:
                codes.append(np.asarray(encoding.popleft()))
    codes.extend(np.asarray(array) for array in encoding)
    shape = records["codes"].shape
    records["codes"] = np.concatenate(codes)[: shape[0] * shape[1]].reshape(shape)
    write_records(path, records)


def _image_batches(shard: Shard, job: TokenizeJob) -> Generator[dict[str, np.ndarray]]:
    """Yields n of the shard's images at a time: {"crops": uint8 [n, V, S, S, 3], "label": int32 [n]}, n V >= B."""
    indices = grain.MapDataset.range(shard.images.start, shard.images.stop)
    load = functools.partial(job.load, shard.split)
    return iterate(indices.map(load).batch(-(-job.batch_size // job.crops(shard.split))), 0, job.num_threads)


def _crops(batches: Iterable[Mapping[str, np.ndarray]], records: np.ndarray, bar: tqdm) -> Iterator[np.ndarray]:
    """Yields every crop [S, S, 3], in order, and stores the labels in the records."""
    start = 0
    for batch in batches:
        stop = start + len(batch["label"])
        records["label"][start:stop] = batch["label"]
        yield from itertools.chain.from_iterable(batch["crops"])
        bar.update(stop - start)
        start = stop


def padded_batches(rows: Iterator[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """Yields `size` equal arrays (crops, or codes) at a time, stacked; arrays of zeros fill up the last batch."""
    while taken := list(itertools.islice(rows, size)):
        yield np.stack(taken + [np.zeros_like(taken[0])] * (size - len(taken)))
