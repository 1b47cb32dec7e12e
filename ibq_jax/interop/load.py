"""Loads networks with their weights from a run's folder, a file or folder of weights, or the hub."""

from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from ibq_jax.autoregressive.model import GeneratorModel
from ibq_jax.autoregressive.restore import restore_run as restore_generator
from ibq_jax.base.errors import UsageError
from ibq_jax.interop import generator_names, tokenizer_names
from ibq_jax.interop.hub import download_if_hub
from ibq_jax.interop.recognize import GENERATOR, STAGES, TOKENIZER, check, recognize
from ibq_jax.interop.weights import holds_weights, open_weights
from ibq_jax.pretrained.tensor_files import TensorFile
from ibq_jax.tokenizer.model import TokenizerModel
from ibq_jax.tokenizer.parts import ALL, check_parts, modules_of, only
from ibq_jax.tokenizer.restore import restore_run as restore_tokenizer


def stage_of(path: Path) -> str:
    """Returns the stage of the network in a file of weights."""
    file = open_weights(path)
    return recognize(file.shapes, file.about, str(path)).stage


def load_tokenizer(
    source: str | Path, use_ema: bool, precision: str = "float32", parts: tuple[str, ...] = ALL
) -> tuple[TokenizerModel, Mapping]:
    """Loads a tokenizer.

    Args:
        source: a run's folder, one step's folder, a file of weights, a folder with one (`ibq_jax.interop.weights`), or
            hf://OWNER/NAME.
        use_ema: load the averaged weights, if there are any, instead of the raw ones.
        precision: of the products between images and codes, one of `ibq_jax.base.precision.PRECISIONS`.
        parts: those that are wanted, of `ibq_jax.tokenizer.parts.PARTS`.

    Returns:
        the model and the parameters of its `parts`.

    Raises:
        UsageError: there is no such source, or it holds no tokenizer, or not all of one; or there is no such part.
    """
    check_parts(parts, f"parts={parts}")
    path = download_if_hub(source)
    if not holds_weights(path):
        trainer, restored = restore_tokenizer(path)
        params = restored.state.weights("ema" if use_ema else "raw")
        return trainer.model.for_encoding(precision), only(params, modules_of(parts))
    file, published = _open(path, TOKENIZER)
    averaged = use_ema and tokenizer_names.has_averages(file.shapes)
    params = tokenizer_names.read_tokenizer(file.read, published, averaged, _on_device, parts)
    return TokenizerModel(**tokenizer_names.model_fields(published)).for_encoding(precision), params


def load_generator(source: str | Path, use_ema: bool) -> tuple[GeneratorModel, Mapping, str]:
    """Loads a generator: the model, its parameters, and the prefix of its published tensor names.

    Arguments and errors are those of `load_tokenizer`.
    """
    path = download_if_hub(source)
    if not holds_weights(path):
        trainer, restored, _ = restore_generator(path)
        params = restored.state.weights("ema" if use_ema else "raw")
        return trainer.model.clone(mesh=None), params, generator_names.PREFIX
    file, published = _open(path, GENERATOR)
    model, prefix = generator_names.build(published), generator_names.name_prefix(file.shapes)
    return model, generator_names.read_generator(file.read, prefix, model, _on_device), prefix


def load_weights(source: str | Path, stage: str) -> Mapping:
    """Loads the parameters of a stage's network from `source`, as above; the averaged ones if there are any."""
    return load_tokenizer(source, use_ema=True)[1] if stage == TOKENIZER else load_generator(source, use_ema=True)[1]


def _on_device(path: tuple[str, ...], array: np.ndarray) -> jax.Array:
    """Places a leaf as soon as it is read, so that the weights are not in memory twice."""
    return jnp.asarray(array)


def _open(path: Path, stage: str) -> tuple[TensorFile, dict]:
    file = open_weights(path)
    contents = recognize(file.shapes, file.about, str(path))
    if contents.stage != stage:
        raise UsageError(f"{path} holds {STAGES[contents.stage]}; this needs {STAGES[stage]}")
    check(file.shapes, contents)
    return file, contents.architecture
