"""A run made of a file of weights: what the authors published, and what `convert` writes.

Tensors are read one after another, straight to where they lie on the mesh. The run's only checkpoint holds weights
alone, with the averages and the discriminator where the file has them; training begins there with new moments.

run/imported.json       where the weights come from, and what the file says of itself
run/carried.safetensors what the file holds beside them, under its published names: handed on when the run is exported
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from ibq_jax.autoregressive.restore import CODES
from ibq_jax.autoregressive.step import GeneratorTrainer
from ibq_jax.base.checkpoint import WEIGHTS_ONLY, Checkpoints
from ibq_jax.base.config import save_config
from ibq_jax.base.files import atomic_folder
from ibq_jax.base.saved_run import IMPORTED
from ibq_jax.base.sharding import abstract_state, make_mesh
from ibq_jax.data.token_cache import VERSION
from ibq_jax.interop import generator_names, tokenizer_names
from ibq_jax.interop.recognize import GENERATOR, TOKENIZER, Contents, architecture, check, recognize, run_config
from ibq_jax.interop.tokenizer_names import Put, Read
from ibq_jax.pretrained.tensor_files import TensorFile, open_tensors, write_tensors
from ibq_jax.tokenizer.restore import restore_run as restore_tokenizer
from ibq_jax.tokenizer.step import TokenizerTrainer
from ibq_jax.tokenizer.tokenize import fingerprint

CARRIED = "carried.safetensors"
OF_TOKENIZER = generator_names.TOKENIZER_PREFIX


def import_file(
    path: Path, out: Path, spec: str = "", overrides: Sequence[str] = (), tokenizer: Path | None = None
) -> str:
    """Makes the run `out` of a file; returns what it holds, in words.

    `spec` and `overrides`: of what the file does not tell, as `load_config` takes them. `tokenizer`: for a generator,
    the run that decodes its codes; a file that holds a tokenizer beside it becomes two runs, the second in
    `out`/tokenizer. Raises UsageError naming every tensor that is missing, unknown or misshapen, and for whatever else
    is wrong with the file; nothing is written then.
    """
    file = open_tensors(path)
    contents = recognize(file.shapes, file.about, str(path))
    config, words = run_config(contents, path.stem, spec, overrides, file.about.get("config", ""))
    contents = Contents(contents.stage, architecture(config))
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
            manifest = _manifest(config, path, _decoder(carried, partial, out, tokenizer))
            (partial / CODES).write_text(json.dumps(manifest, indent=2) + "\n")
        checkpoints = Checkpoints(partial / "checkpoints")
        checkpoints.save(0, state, {"config": config.to_dict(), WEIGHTS_ONLY: True})
        checkpoints.close()
    return words


def _trainer(config: ConfigDict) -> TokenizerTrainer | GeneratorTrainer:
    kind = TokenizerTrainer if config.stage == TOKENIZER else GeneratorTrainer
    return kind(config, make_mesh({"data": -1}), steps_per_epoch=1)


@contextmanager
def _reading(file: TensorFile) -> Iterator[Read]:
    """`file.read`, with a progress bar."""
    elements = sum(int(np.prod(shape)) for shape in file.shapes.values())
    with tqdm(total=elements, unit=" numbers", unit_scale=True, disable=None, dynamic_ncols=True) as bar:

        def read(name: str) -> np.ndarray:
            tensor = file.read(name)
            bar.update(tensor.size)
            return tensor

        yield read


def _state(read: Read, shapes: Mapping, contents: Contents, trainer) -> dict:
    """The weights of a train state, as nested dictionaries of arrays on the trainer's mesh."""
    like, _ = abstract_state(trainer.create_state, trainer.mesh, trainer.config.seed)
    if contents.stage == GENERATOR:
        model = generator_names.build(contents.architecture)
        params = generator_names.read_generator(read, generator_names.name_prefix(shapes), model, _placing(like.params))
        return {"step": np.int32(0), "params": params} | ({} if like.ema is None else {"ema": params})
    published, put = contents.architecture, _placing(like.params)
    params = tokenizer_names.read_tokenizer(read, published, put=put)
    averaged = (
        tokenizer_names.read_tokenizer(read, published, averaged=True, put=put)
        if tokenizer_names.has_averages(shapes)
        else params
    )
    state = {"step": np.int32(0), "params": params, "ema": averaged}
    if tokenizer_names.has_discriminator(shapes) and like.discriminator is not None:
        variables = {"params": like.discriminator.params, "batch_stats": like.discriminator.batch_stats}
        state["discriminator"] = tokenizer_names.read_discriminator(read, published, put=_placing(variables))
    return state


def _placing(like: Mapping) -> Put:
    """Puts a leaf where `like` has it."""

    def put(path: tuple[str, ...], array: np.ndarray) -> jax.Array:
        leaf = like
        for part in path:
            leaf = leaf[part]
        return jax.block_until_ready(jax.device_put(array, leaf.sharding))

    return put


def _decoder(carried: dict, partial: Path, out: Path, tokenizer: Path | None) -> dict:
    """What the manifest of a generator's codes says of the tokenizer that made them, as far as it is known."""
    beside = {
        name.removeprefix(OF_TOKENIZER): array for name, array in carried.items() if name.startswith(OF_TOKENIZER)
    }
    if tokenizer is None and beside:
        write_tensors(partial / "tokenizer.safetensors", beside, {})
        import_file(partial / "tokenizer.safetensors", partial / "tokenizer")
        (partial / "tokenizer.safetensors").unlink()
        return _describe_tokenizer(partial / "tokenizer", (out / "tokenizer").resolve())
    if tokenizer is not None:
        return _describe_tokenizer(tokenizer, tokenizer.resolve())
    return {"tokenizer": {"path": "", "step": None, "weights": "ema", "fingerprint": ""}, "preprocessing": {}}


def _describe_tokenizer(run: Path, path: Path) -> dict:
    trainer, restored = restore_tokenizer(run)
    digest, data = fingerprint(trainer.model, restored.state.ema), trainer.config.data
    return {
        "tokenizer": {"path": str(path), "step": restored.step, "weights": "ema", "fingerprint": digest},
        "preprocessing": {"image_size": data.image_size, "resize": data.resize},
    }


def _manifest(config: ConfigDict, path: Path, decoder: dict) -> dict:
    """As far as it is known, what `codes.json` says in a run that was trained here."""
    return {
        "version": VERSION,
        "imported": str(path.resolve()),
        **decoder,
        "data": {"class_names": [str(label) for label in range(config.model.num_classes)]},
        "codes": config.model.vocab_size,
        "grid": list(config.model.grid),
    }
