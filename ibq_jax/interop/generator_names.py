"""The one table between the generator's parameter tree and the tensor names of the published PyTorch checkpoints.

A published generator file (arXiv 2412.02692, TencentARC/SEED-Voken) holds the transformer's tensors, each under
`transformer.`, and the tokenizer's under `first_stage_model.`, which are left alone here. A state dict of the
transformer alone may do without the prefix. Layers are stacked here and numbered there; matrices are [in, out] here and
[out, in] there.
"""

import math
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from ibq_jax.autoregressive.model import GeneratorModel
from ibq_jax.base.errors import UsageError
from ibq_jax.interop.names import Path, Shapes, check_tensors

PREFIX, TOKENIZER_PREFIX = "transformer.", "first_stage_model."

# Ours -> theirs; {} is the layer.
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
    """The fields of `GeneratorModel` for a published configuration ("vocab_size", "block_size", "n_layer", "n_head",
    "n_embd", and what differs from the released code's defaults).

    Raises UsageError for a key that is missing or a value that this architecture does not have.
    """
    missing = [key for key in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd") if key not in published]
    if missing:
        raise UsageError(f"configuration of the generator: {', '.join(missing)} missing")
    for key, supported in (SUPPORTED | {"cond_dim": published["n_embd"]}).items():
        if key in published and published[key] != supported:
            raise UsageError(f"configuration of the generator: {key} is {published[key]!r}, only {supported!r} exists")
    side = math.isqrt(published["block_size"])
    if side * side != published["block_size"]:
        raise UsageError(f"configuration of the generator: block_size is {published['block_size']}, which is no square")
    settings = DEFAULTS | dict(published)
    return {
        "vocabulary": settings["vocab_size"],
        "grid": (side, side),
        "num_classes": settings["class_num"],
        "layers": settings["n_layer"],
        "heads": settings["n_head"],
        "kv_heads": settings["n_kv_head"] or settings["n_head"],
        "width": settings["n_embd"],
        "gamma_init": settings["alng"],
        "use_pretrained_codebook": settings["use_pretrained_codebook"],
        "codebook_dim": settings["n_codebook_embd"],
    }


def generator_to_torch(params: Mapping, prefix: str = PREFIX) -> dict[str, np.ndarray]:
    """The parameters under their published names, in PyTorch's layouts."""
    tensors = {}
    for path, leaf in flatten_dict(params).items():
        array = np.asarray(leaf)
        array = array.swapaxes(-1, -2) if path[-1] == "kernel" else array
        layers = enumerate(array) if "{}" in TABLE[path] else [("", array)]
        tensors |= {prefix + TABLE[path].format(i): np.array(tensor, order="C") for i, tensor in layers}
    return tensors


def generator_from_torch(state_dict: Mapping[str, np.ndarray], model: GeneratorModel) -> dict:
    """The parameters of `model`, from tensors with or without the prefix `transformer.`.

    Raises UsageError naming every missing, unknown or misshapen tensor, and loads nothing then.
    """
    prefix = name_prefix(state_dict)
    own = {name: tensor for name, tensor in state_dict.items() if not _is_tokenizers(name)}
    like = flatten_dict(abstract_params(model))
    shapes = {prefix + name: shape for name, shape in _published_shapes(like).items()}
    check_tensors(own, {"generator": shapes}, wanted="generator")
    leaves = {}
    for path, leaf in like.items():
        name = prefix + TABLE[path]
        arrays = [np.asarray(own[name.format(i)]) for i in range(leaf.shape[0] if "{}" in name else 1)]
        array = np.stack(arrays) if "{}" in name else arrays[0]
        array = array.swapaxes(-1, -2) if path[-1] == "kernel" else array
        leaves[path] = np.array(array, dtype=leaf.dtype, order="C")
    return unflatten_dict(leaves)


def name_prefix(state_dict: Mapping[str, np.ndarray]) -> str:
    """What stands before the transformer's names: "transformer.", or nothing."""
    return PREFIX if any(name.startswith(PREFIX) for name in state_dict) else ""


def _is_tokenizers(name: str) -> bool:
    return name.startswith(TOKENIZER_PREFIX)


def _published_shapes(like: Mapping[Path, jax.ShapeDtypeStruct]) -> Shapes:
    shapes = {}
    for path, leaf in like.items():
        layers, shape = (leaf.shape[0], leaf.shape[1:]) if "{}" in TABLE[path] else (1, leaf.shape)
        shape = shape[::-1] if path[-1] == "kernel" else shape
        shapes |= {TABLE[path].format(i): tuple(shape) for i in range(layers)}
    return shapes


def has_no_class(state_dict: Mapping[str, np.ndarray], num_classes: int) -> bool:
    """Whether the class table has a row more than there are classes."""
    table = state_dict.get(name_prefix(state_dict) + TABLE["class_emb",])
    return table is None or len(table) != num_classes


def abstract_params(model: GeneratorModel) -> dict:
    """Shapes and types of the model's parameters."""
    codes = jax.ShapeDtypeStruct((1, *model.grid), jnp.int32)
    labels = jax.ShapeDtypeStruct((1,), jnp.int32)
    return nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0), codes, labels))["params"]
