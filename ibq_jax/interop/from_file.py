"""Makes a run of a file of weights: one that the authors published, or one that `convert` wrote.

Tensors are read one at a time, directly to their devices. The run's only checkpoint holds weights, including the
averages and the discriminator if the file has them, but no optimizer state: training continues with new moments.

run/imported.json        where the weights come from, and the file's metadata
run/carried.safetensors  the file's other tensors under their published names; exporting the run hands them on
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from ibq_jax.autoregressive.step import GeneratorTrainer
from ibq_jax.base.checkpoint import WEIGHTS_ONLY, Checkpoints
from ibq_jax.base.config import save_config
from ibq_jax.base.files import atomic_folder
from ibq_jax.base.saved_run import IMPORTED
from ibq_jax.base.sharding import abstract_state, make_mesh
from ibq_jax.data.token_cache import VERSION, write_run_manifest
from ibq_jax.interop import generator_names, tokenizer_names
from ibq_jax.interop.recognize import GENERATOR, TOKENIZER, Contents, check, recognize, run_config
from ibq_jax.interop.tokenizer_names import PlaceLeaf, ReadTensor
from ibq_jax.interop.weights import open_weights
from ibq_jax.pretrained.tensor_files import TensorFile, write_tensors
from ibq_jax.tokenizer.parts import without
from ibq_jax.tokenizer.restore import restore_run as restore_tokenizer
from ibq_jax.tokenizer.step import TokenizerTrainer
from ibq_jax.tokenizer.tokenize import fingerprint

CARRIED = "carried.safetensors"


def import_file(
    path: Path, out: Path, spec: str = "", overrides: Sequence[str] = (), tokenizer: Path | None = None
) -> str:
    """Makes the run `out` of a file and returns a description of what it holds.

    A file that holds a tokenizer and a generator becomes two runs, the tokenizer's in `out`/tokenizer.

    Args:
        path: the file of weights, or a folder with one (`ibq_jax.interop.weights`).
        out: the folder of the new run, which must not exist.
        spec: a preset, FILE.py:PRESET, for what the file does not say; "" picks one (`recognize.run_config`).
        overrides: `--config.NAME=VALUE`, as `load_config` takes them.
        tokenizer: for a generator, the run that decodes its codes.

    Raises:
        UsageError: the file is not of weights, or a tensor is missing, unknown or of the wrong shape (all are named);
            nothing is written then.
    """
    file = open_weights(path)
    contents = recognize(file.shapes, file.about, str(path))
    config, words = run_config(contents, path.stem, spec, overrides, file.about.get("config", ""))
    contents = Contents.from_config(config)
    trainer = _trainer(config)
    check(file.shapes, contents)
    with atomic_folder(out) as partial:
        with _reading(file) as read:
            unread = dict.fromkeys(file.shapes)

            def read_once(name: str) -> np.ndarray:
                del unread[name]
                return read(name)

            state = _state(read_once, file.shapes, contents, trainer)
            carried = {name: read(name) for name in unread}
        save_config(config, partial / "config.json")
        origin = {
            "file": str(path.resolve()),
            "about": file.about,
            "prefix": generator_names.name_prefix(file.shapes),
            "averages": tokenizer_names.has_averages(file.shapes),
        }
        (partial / IMPORTED).write_text(json.dumps(origin, indent=2) + "\n")
        if carried:
            write_tensors(partial / CARRIED, carried, {})
        if contents.stage == GENERATOR:
            write_run_manifest(partial, _manifest(config, path, _decoder(carried, partial, out, tokenizer)))
        checkpoints = Checkpoints(partial / "checkpoints")
        checkpoints.save(0, state, {"config": config.to_dict(), WEIGHTS_ONLY: True})
        checkpoints.close()
    return words


def _trainer(config: ConfigDict) -> TokenizerTrainer | GeneratorTrainer:
    kind = TokenizerTrainer if config.stage == TOKENIZER else GeneratorTrainer
    return kind(config, make_mesh({"data": -1}), steps_per_epoch=1)


@contextmanager
def _reading(file: TensorFile) -> Iterator[ReadTensor]:
    """Gives `file.read` with a progress bar."""
    elements = sum(int(np.prod(shape)) for shape in file.shapes.values())
    with tqdm(total=elements, unit=" numbers", unit_scale=True, disable=None, dynamic_ncols=True) as bar:

        def read(name: str) -> np.ndarray:
            tensor = file.read(name)
            bar.update(tensor.size)
            return tensor

        yield read


def _state(read: ReadTensor, shapes: Mapping, contents: Contents, trainer) -> dict:
    """Returns the weights of a training state as nested dictionaries of arrays on the trainer's mesh."""
    like, _ = abstract_state(trainer.create_state, trainer.mesh, trainer.config.seed)
    if contents.stage == GENERATOR:
        model = generator_names.build(contents.architecture)
        params = generator_names.read_generator(read, generator_names.name_prefix(shapes), model, _placing(like.params))
        return {"step": np.int32(0), "params": params} | ({} if like.ema is None else {"ema": params})
    published, place = contents.architecture, _placing(like.params)
    params = tokenizer_names.read_tokenizer(read, published, place=place)
    averaged = (
        tokenizer_names.read_tokenizer(read, published, averaged=True, place=place)
        if tokenizer_names.has_averages(shapes)
        else params
    )
    if trainer.frozen:  # what stays as it is has no average of its own
        params, averaged = averaged, without(averaged, trainer.frozen)
    state = {"step": np.int32(0), "params": params, "ema": averaged}
    published_kind = tokenizer_names.has_published_discriminator(trainer.config)
    if tokenizer_names.has_discriminator(shapes) and like.discriminator is not None and published_kind:
        variables = {"params": like.discriminator.params, "batch_stats": like.discriminator.batch_stats}
        state["discriminator"] = tokenizer_names.read_discriminator(read, published, place=_placing(variables))
    return state


def _placing(like: Mapping) -> PlaceLeaf:
    """Returns a function that moves each leaf to the devices where `like` has it."""

    def place(path: tuple[str, ...], array: np.ndarray) -> jax.Array:
        leaf: Any = like
        for part in path:
            leaf = leaf[part]
        return jax.block_until_ready(jax.device_put(array, leaf.sharding))

    return place


def _decoder(carried: dict, partial: Path, out: Path, tokenizer: Path | None) -> dict:
    """Returns what is known about the tokenizer of a generator's codes, for the run's manifest."""
    prefix = generator_names.TOKENIZER_PREFIX
    enclosed = {name.removeprefix(prefix): array for name, array in carried.items() if name.startswith(prefix)}
    if tokenizer is None and enclosed:
        write_tensors(partial / "tokenizer.safetensors", enclosed, {})
        import_file(partial / "tokenizer.safetensors", partial / "tokenizer")
        (partial / "tokenizer.safetensors").unlink()
        return _describe_tokenizer(partial / "tokenizer", (out / "tokenizer").resolve())
    if tokenizer is not None:
        return _describe_tokenizer(tokenizer, tokenizer.resolve())
    return {"tokenizer": {"path": "", "step": None, "weights": "ema", "fingerprint": ""}, "preprocessing": {}}


def _describe_tokenizer(run: Path, path: Path) -> dict:
    trainer, restored = restore_tokenizer(run)
    digest, data = fingerprint(trainer.model, restored.state.weights("ema")), trainer.config.data
    return {
        "tokenizer": {"path": str(path), "step": restored.step, "weights": "ema", "fingerprint": digest},
        "preprocessing": {"image_size": data.image_size, "resize": data.resize},
    }


def _manifest(config: ConfigDict, path: Path, decoder: dict) -> dict:
    """Returns what is known of the manifest's fields in a run that was trained here."""
    return {
        "version": VERSION,
        "imported": str(path.resolve()),
        **decoder,
        "data": {"class_names": [str(label) for label in range(config.model.num_classes)]},
        "codebook_size": config.model.vocab_size,
        "grid": list(config.model.grid),
    }
