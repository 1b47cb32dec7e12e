"""Opens weights: a file of them, or a folder as it is published on a hub.

A folder holds model.safetensors or model.ckpt, and may say how large its networks are, in one of two forms:

    config.json    Emu3.5's: model_type "Emu3p5VisionVQ" and flat fields, codebook_size, embed_dim, z_channels, ch, ...
    config.yaml    that of the authors' code: ddconfig, n_embed and embed_dim
"""

import json
from collections.abc import Mapping
from pathlib import Path

import yaml

from ibq_jax.base.errors import UsageError, one_line
from ibq_jax.interop.tokenizer_names import AUTOENCODER_FIELDS, SUPPORTED
from ibq_jax.pretrained.tensor_files import SUFFIXES, TensorFile, open_tensors

NAMES = ("model.safetensors", "model.ckpt")  # of the file of weights in a folder
FLAT_MODEL_TYPE = "Emu3p5VisionVQ"
FLAT_FIELDS = {"codebook_size": "n_embed", "embed_dim": "embed_dim"}  # config.json's names -> config.yaml's


def holds_weights(path: Path) -> bool:
    """Returns whether `path` is a file of weights, by its suffix, or a folder with one, and not a run's folder."""
    return _file_in(path) is not None if path.is_dir() else path.suffix in SUFFIXES


def open_weights(path: Path) -> TensorFile:
    """Opens a file of weights, or the one in a folder together with the folder's configuration.

    A configuration that the file itself holds comes first, then config.json, then config.yaml.

    Raises:
        UsageError: the file is absent, damaged or of another format, or the configuration cannot be read.
    """
    file = open_tensors((_file_in(path) if path.is_dir() else None) or path)
    if path.is_dir() and "architecture" not in file.about:
        architecture = _flat_configuration(path / "config.json") or _nested_configuration(path / "config.yaml")
        if architecture:
            file.about = file.about | {"architecture": json.dumps(architecture)}
    return file


def _file_in(folder: Path) -> Path | None:
    return next((folder / name for name in NAMES if (folder / name).is_file()), None)


def _flat_configuration(path: Path) -> dict:
    """Returns the architecture in Emu3.5's config.json; {} if there is no such file or it is of another network."""
    fields = _read(path, json.loads)
    if fields.get("model_type") != FLAT_MODEL_TYPE:
        return {}
    layout = {name: fields[name] for name in (*SUPPORTED, *AUTOENCODER_FIELDS.values()) if name in fields}
    sizes = {theirs: fields[name] for name, theirs in FLAT_FIELDS.items() if name in fields}
    return {"ddconfig": layout, **sizes}


def _nested_configuration(path: Path) -> dict:
    """Returns the architecture in a config.yaml of the authors' form; {} if there is no such file, or no ddconfig."""
    fields = _read(path, yaml.safe_load)
    known = ("ddconfig", *FLAT_FIELDS.values(), "l2_normalize")
    return {name: fields[name] for name in known if name in fields} if "ddconfig" in fields else {}


def _read(path: Path, parse) -> Mapping:
    if not path.is_file():
        return {}
    try:
        fields = parse(path.read_text())
    except (ValueError, yaml.YAMLError) as error:
        raise UsageError(f"{path}: not readable as a configuration ({one_line(error)})") from error
    if not isinstance(fields, Mapping):
        raise UsageError(f"{path}: not a configuration, which has named fields")
    return fields
