"""The mapping between the generator's parameter tree and the tensor names of the published PyTorch checkpoints.

A published generator file (arXiv 2412.02692, github.com/TencentARC/SEED-Voken) holds the transformer's tensors under
`transformer.` and the tokenizer's under `first_stage_model.`, which this module ignores. A file of the transformer
alone may omit the prefix. Layers are stacked here and numbered there; matrices are [in, out] here and [out, in] there.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from ibq_jax.autoregressive.model import GeneratorModel
from ibq_jax.base.errors import UsageError
from ibq_jax.interop.tokenizer_names import (
    Path,
    PlaceLeaf,
    ReadTensor,
    Shapes,
    check_tensors,
    keep_on_host,
    shapes_of,
    to_torch_arrays,
)

PREFIX, TOKENIZER_PREFIX = "transformer.", "first_stage_model."

# Our paths -> the published names; {} is the layer's number.
TABLE: dict[Path, str] = {
    ("tok_emb", "embedding"): "tok_emb.weight",
    ("tok_emb", "fc1", "kernel"): "embedding_projection.fc1.weight",
    ("tok_emb", "fc1", "bias"): "embedding_projection.fc1.bias",
    ("tok_emb", "fc2", "kernel"): "embedding_projection.fc2.weight",
    ("tok_emb", "fc2", "bias"): "embedding_projection.fc2.bias",
    ("class_emb",): "class_emb.embedding_table.weight",
    ("blocks", "attention", "wqkv", "kernel"): "blocks.{}.attention.wqkv.weight",
    ("blocks", "attention", "wo", "kernel"): "blocks.{}.attention.wo.weight",
    ("blocks", "feed_forward", "w1", "kernel"): "blocks.{}.feed_forward.w1.weight",
    ("blocks", "feed_forward", "w3", "kernel"): "blocks.{}.feed_forward.w3.weight",
    ("blocks", "feed_forward", "w2", "kernel"): "blocks.{}.feed_forward.w2.weight",
    ("blocks", "attention_norm", "scale"): "blocks.{}.attention_norm.weight",
    ("blocks", "ffn_norm", "scale"): "blocks.{}.ffn_norm.weight",
    ("modulation", "ada_lin", "kernel"): "blocks.{}.ada_lin.1.weight",
    ("modulation", "ada_lin", "bias"): "blocks.{}.ada_lin.1.bias",
    ("head_norm", "scale"): "head_nm.rmsnorm.weight",
    ("head_modulation", "kernel"): "head_nm.ada_lin.1.weight",
    ("head_modulation", "bias"): "head_nm.ada_lin.1.bias",
    ("head",): "head.weight",
}
DEFAULTS = {
    "class_num": 1000,
    "n_kv_head": None,
    "use_pretrained_codebook": False,
    "n_codebook_embd": 256,
    "alng": 1e-3,
}
SUPPORTED = {
    "shared_aln": False,
    "cls_token_num": 1,
    "rope_base": 10000,
    "ffn_dim_multiplier": None,
    "multiple_of": 256,
}


def model_fields(published: Mapping) -> dict:
    """Returns the fields of `GeneratorModel` for a published configuration.

    Args:
        published: the configuration, with "vocab_size", "block_size", "n_layer", "n_head", "n_embd", and whatever
            differs from the released code's defaults.

    Raises:
        UsageError: a key is missing, or a value is one that this architecture does not support.
    """
    missing = [key for key in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd") if key not in published]
    if missing:
        raise UsageError(f"configuration of the generator: {', '.join(missing)} missing")
    for key, supported in (SUPPORTED | {"cond_dim": published["n_embd"]}).items():
        if key in published and published[key] != supported:
            raise UsageError(
                f"configuration of the generator: {key} is {published[key]!r}, only {supported!r} is supported"
            )
    side = math.isqrt(published["block_size"])
    grid = tuple(published.get("grid", (side, side)))
    if math.prod(grid) != published["block_size"]:
        raise UsageError(f"configuration of the generator: block_size is {published['block_size']}, not a square")
    settings = DEFAULTS | dict(published)
    return {
        "vocab_size": settings["vocab_size"],
        "grid": grid,
        "num_classes": settings["class_num"],
        "num_layers": settings["n_layer"],
        "num_heads": settings["n_head"],
        "num_kv_heads": settings["n_kv_head"] or settings["n_head"],
        "embed_dim": settings["n_embd"],
        "gamma_init": settings["alng"],
        "use_pretrained_codebook": settings["use_pretrained_codebook"],
        "codebook_dim": settings["n_codebook_embd"],
    }


def build(published: Mapping, no_class: bool = True) -> GeneratorModel:
    """Returns the model of a published configuration.

    `no_class` says whether the class table has a row for "no class", if the configuration does not.
    """
    return GeneratorModel(**model_fields(published), no_class=published.get("no_class", no_class))


def published_architecture(config: Mapping) -> dict:
    """Returns the architecture of a generator's config in the format of the published configurations.

    "grid" and "no_class" are additions: published grids are square, and published class tables always have a row for
    "no class".
    """
    model = config["model"]
    return {
        "vocab_size": model["vocab_size"],
        "block_size": math.prod(model["grid"]),
        "n_layer": model["num_layers"],
        "n_head": model["num_heads"],
        "n_kv_head": model["num_kv_heads"],
        "n_embd": model["embed_dim"],
        "class_num": model["num_classes"],
        "alng": model["gamma_init"],
        "use_pretrained_codebook": model["use_pretrained_codebook"],
        "n_codebook_embd": model["codebook_dim"],
        "grid": list(model["grid"]),
        "no_class": config["loss"]["class_dropout"] > 0 or not model["num_classes"],
    }


def published_tensors(params: Mapping, prefix: str = PREFIX) -> dict:
    """Returns the parameters by published name, layer by layer, in PyTorch's layout; any kind of array is accepted."""
    tensors = {}
    for path, leaf in flatten_dict(params).items():
        leaf = leaf.swapaxes(-1, -2) if path[-1] == "kernel" else leaf
        layers = [leaf[i] for i in range(leaf.shape[0])] if "{}" in TABLE[path] else [leaf]
        tensors |= {prefix + TABLE[path].format(i): layer for i, layer in enumerate(layers)}
    return tensors


def generator_to_torch(params: Mapping, prefix: str = PREFIX) -> dict[str, np.ndarray]:
    """Returns the parameters under their published names, in PyTorch's layouts."""
    return to_torch_arrays(published_tensors(params, prefix))


def generator_from_torch(state_dict: Mapping[str, np.ndarray], model: GeneratorModel) -> dict:
    """Returns the parameters of `model` from tensors with or without the prefix `transformer.`.

    Raises UsageError that names every missing, unknown or misshapen tensor; nothing is loaded then.
    """
    shapes = shapes_of(state_dict)
    check_generator(shapes, model)
    return read_generator(state_dict.__getitem__, name_prefix(shapes), model)


def check_generator(shapes: Shapes, model: GeneratorModel) -> None:
    """Checks the tensors of a file against `model`; the tokenizer's tensors are ignored.

    Raises UsageError that names every tensor that is missing, unknown or of the wrong shape.
    """
    prefix = name_prefix(shapes)
    own = {name: shape for name, shape in shapes.items() if not name.startswith(TOKENIZER_PREFIX)}
    known = {prefix + name: shape for name, shape in published_shapes(model).items()}
    check_tensors(own, {"generator": known}, wanted="generator")


def read_generator(read: ReadTensor, prefix: str, model: GeneratorModel, place: PlaceLeaf = keep_on_host) -> dict:
    """Reads the parameters of `model` from a checked file, one leaf at a time, and places each with `place`.

    The largest leaves come first: a leaf is in memory twice while it is placed, and then little else is.
    """
    leaves = {}
    like = flatten_dict(abstract_params(model))
    for path, leaf in sorted(like.items(), key=lambda item: -math.prod(item[1].shape)):
        leaves[path] = place(path, _stacked(read, prefix + TABLE[path], leaf, transposed=path[-1] == "kernel"))
    return unflatten_dict(leaves)


def _stacked(read: ReadTensor, name: str, leaf: jax.ShapeDtypeStruct, transposed: bool) -> np.ndarray:
    """Returns one leaf, stacked from one tensor per layer if its name is numbered."""
    array = np.empty(leaf.shape, leaf.dtype)
    layers: Any = array if "{}" in name else [array]
    for i, layer in enumerate(layers):
        tensor = read(name.format(i))
        layer[...] = tensor.T if transposed else tensor
    return array


def name_prefix(names: Iterable[str]) -> str:
    """Returns the prefix of the transformer's tensor names: "transformer." or nothing."""
    return PREFIX if any(name.startswith(PREFIX) for name in names) else ""


def published_shapes(model: GeneratorModel) -> Shapes:
    """Returns {name without prefix: PyTorch shape} of every tensor of the model's file."""
    shapes = {}
    for path, leaf in flatten_dict(abstract_params(model)).items():
        layers, shape = (leaf.shape[0], leaf.shape[1:]) if "{}" in TABLE[path] else (1, leaf.shape)
        shape = shape[::-1] if path[-1] == "kernel" else shape
        shapes |= {TABLE[path].format(i): tuple(shape) for i in range(layers)}
    return shapes


def has_no_class(state_dict: Mapping[str, np.ndarray], num_classes: int) -> bool:
    """Returns whether the class table has a row for "no class" after those of the classes."""
    table = state_dict.get(name_prefix(state_dict) + TABLE["class_emb",])
    return table is None or len(table) != num_classes


def abstract_params(model: GeneratorModel) -> dict:
    """Returns the shapes and types of the model's parameters."""
    codes = jax.ShapeDtypeStruct((1, *model.grid), jnp.int32)
    labels = jax.ShapeDtypeStruct((1,), jnp.int32)
    return nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0), codes, labels))["params"]
