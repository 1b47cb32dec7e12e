"""The one table between our parameter trees and the tensor names of the published PyTorch checkpoints.

A published tokenizer file (arXiv 2412.02692, TencentARC/SEED-Voken) has up to five groups of tensors:

    encoder.* decoder.* quantize.* quant_conv.* post_quant_conv.*    the generator
    loss.discriminator.main.N.*                                      the discriminator with its BatchNorm buffers
    loss.perceptual_loss.*                                           LPIPS, frozen
    model_ema.*                                                      averages of both networks, names without their dots
    model_ema.decay, model_ema.num_updates                           the averages' settings

Each group but the wanted one may be absent as a whole. Loading is strict in all of them: every missing, unknown or
misshapen tensor is named, and then nothing is loaded. Convolutions are [out, in, h, w] there and [h, w, in, out] here.
"""

import re
from collections.abc import Callable, Iterable, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from ibq_jax.base.errors import UsageError
from ibq_jax.pretrained.lpips import TRUNKS
from ibq_jax.tokenizer.discriminator import PatchDiscriminator
from ibq_jax.tokenizer.model import TokenizerModel

Path = tuple[str, ...]
Shapes = Mapping[str, tuple[int, ...]]
Read = Callable[[str], np.ndarray]  # a tensor by its published name
Put = Callable[[Path, np.ndarray], object]  # a leaf by its path in our tree, to where it will lie

# Our module and parameter names, where the published ones differ; {} is the number after the underscore.
NAMES = {
    "middle": "mid",
    "first_block": "block_1",
    "second_block": "block_2",
    "attention": "attn_1",
    "query": "q",
    "key": "k",
    "value": "v",
    "out": "proj_out",
    "shortcut": "nin_shortcut",
    "kernel": "weight",
    "scale": "weight",
    "codebook": "embedding.weight",
    "mean": "running_mean",
    "var": "running_var",
}
NUMBERED_NAMES = {
    "down": "down.{}",
    "up": "up.{}",
    "block": "block.{}",
    "attention": "attn.{}",
    "downsample": "down.{}.downsample.conv",
    "upsample": "up.{}.upsample.conv",
}
GENERATOR_CONFIG = {
    "channels": "ch",
    "channel_multipliers": "ch_mult",
    "num_res_blocks": "num_res_blocks",
    "attention_resolutions": "attn_resolutions",
    "z_channels": "z_channels",
    "resolution": "resolution",
}
SUPPORTED = {"double_z": False, "in_channels": 3, "out_ch": 3, "dropout": 0.0}
RELEASED_DISCRIMINATOR = {"disc_ndf": 64, "disc_num_layers": 3}  # where a configuration is silent


def keep_on_host(path: Path, array: np.ndarray) -> np.ndarray:
    """A `Put` that leaves arrays on the host."""
    return array


# ---- configurations --------------------------------------------------------------------------------------------------


def model_fields(published: Mapping) -> dict:
    """The architecture fields of `TokenizerModel` for a published configuration ("ddconfig", "n_embed", "embed_dim").

    Raises UsageError for a key that is missing or a value that this architecture does not have.
    """
    layout = _value(published, "ddconfig")
    for key, supported in SUPPORTED.items():
        if key in layout and layout[key] != supported:
            raise UsageError(
                f"configuration of the tokenizer: ddconfig.{key} is {layout[key]!r}, only {supported!r} exists"
            )
    fields = {ours: _value(layout, theirs, "ddconfig.") for ours, theirs in GENERATOR_CONFIG.items()}
    fields |= {"codebook_size": _value(published, "n_embed"), "code_dim": _value(published, "embed_dim")}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}


def check_quantizer(name: str) -> None:
    """Raises UsageError where no published file could hold such a tokenizer."""
    if name != "ibq":
        raise UsageError(f"published names and PyTorch's model are IBQ's tokenizer; the quantizer here is {name}")


def architecture(config: Mapping) -> dict:
    """The configuration, as the published ones are written, of a tokenizer's config from configs/tokenizer.py.

    Raises UsageError for one of another quantizer.
    """
    check_quantizer(config["quantizer"]["name"])
    layout = {theirs: config["model"][ours] for ours, theirs in GENERATOR_CONFIG.items()}
    return {
        "ddconfig": SUPPORTED
        | {key: list(value) if isinstance(value, tuple) else value for key, value in layout.items()},
        "n_embed": config["codebook"]["size"],
        "embed_dim": config["codebook"]["dim"],
        "loss": {
            "disc_ndf": config["discriminator"]["channels"],
            "disc_num_layers": config["discriminator"]["num_layers"],
        },
    }


def discriminator_fields(published: Mapping) -> dict:
    """The fields `channels` and `num_layers` of `PatchDiscriminator` for a published configuration."""
    sizes = RELEASED_DISCRIMINATOR | dict(published.get("loss", {}))
    return {"channels": sizes["disc_ndf"], "num_layers": sizes["disc_num_layers"]}


def _value(mapping: Mapping, key: str, where: str = ""):
    if key not in mapping:
        raise UsageError(f"configuration of the tokenizer: {where}{key} is missing")
    return mapping[key]


# ---- to the published names ------------------------------------------------------------------------------------------


def published_tensors(
    params: Mapping, ema: Mapping | None = None, discriminator: Mapping | None = None, stand_in: bool = True
) -> dict:
    """Every tensor that a published file has of these trees, under its name and turned as there, of any kind of array.

    `ema`: the averages of `params`. `discriminator`: {"params", "batch_stats"}; beside averages its weights `stand_in`
    for its own averages, of which none are kept here: nothing but a strict load looks for them.
    """
    tensors = _renamed(params, published_name)
    if ema is not None:
        tensors |= _renamed(ema, lambda path: _ema_name(published_name(path)))
    if discriminator is not None:
        tensors |= _renamed(discriminator, _discriminator_name)
        if ema is not None and stand_in:
            weights = {"params": discriminator["params"]}
            tensors |= _renamed(weights, lambda path: _ema_name(_discriminator_name(path)))
    return tensors


def tokenizer_to_torch(params: Mapping) -> dict[str, np.ndarray]:
    """The generator's parameters under their published names, in PyTorch's layouts."""
    return to_host_async(published_tensors(params))


def ema_to_torch(params: Mapping) -> dict[str, np.ndarray]:
    """The generator's averaged parameters as the published checkpoints keep them, beside the others."""
    return to_host_async(_renamed(params, lambda path: _ema_name(published_name(path))))


def discriminator_to_torch(variables: Mapping) -> dict[str, np.ndarray]:
    """The discriminator's {"params", "batch_stats"} under their published names, in PyTorch's layouts."""
    return to_host_async(_renamed(variables, _discriminator_name))


def to_host_async(tensors: Mapping) -> dict[str, np.ndarray]:
    """As contiguous NumPy arrays of the types that PyTorch has them in."""
    return {name: np.array(tensor, dtype=torch_type(tensor.dtype), order="C") for name, tensor in tensors.items()}


def torch_type(dtype: np.dtype) -> np.dtype:
    """Counts are 64 bits wide there."""
    return np.dtype(np.int64) if dtype == np.int32 else np.dtype(dtype)


def _renamed(tree: Mapping, name_of: Callable[[Path], str]) -> dict:
    return {
        name_of(path): leaf.transpose(3, 2, 0, 1) if leaf.ndim == 4 else leaf
        for path, leaf in flatten_dict(tree).items()
    }


# ---- from the published names ----------------------------------------------------------------------------------------


def tokenizer_from_torch(state_dict: Mapping[str, np.ndarray], published: Mapping, use_ema: bool) -> dict:
    """The generator's parameters, as stored or (`use_ema`) their averages, for the configuration `published`.

    Raises UsageError as described above, and for `use_ema` where there are no averages.
    """
    if use_ema and not has_averages(state_dict):
        raise UsageError("the checkpoint has no averaged weights (model_ema.*); load it with use_ema=False")
    check_tokenizer(shapes_of(state_dict), published, wanted="averages" if use_ema else "generator")
    return read_tokenizer(state_dict.__getitem__, published, averaged=use_ema)


def discriminator_from_torch(state_dict: Mapping[str, np.ndarray], published: Mapping) -> dict:
    """The discriminator's {"params", "batch_stats"} for the configuration `published`; raises UsageError likewise."""
    check_tokenizer(shapes_of(state_dict), published, wanted="discriminator")
    return read_discriminator(state_dict.__getitem__, published)


def check_tokenizer(shapes: Shapes, published: Mapping, wanted: str = "generator") -> None:
    """Raises UsageError naming whatever is missing, unknown or misshapen."""
    check_tensors(shapes, _published_shapes(published), wanted)


def has_averages(names: Iterable[str]) -> bool:
    return any(name.startswith("model_ema.") for name in names)


def has_discriminator(names: Iterable[str]) -> bool:
    return any(name.startswith("loss.discriminator.") for name in names)


def read_tokenizer(read: Read, published: Mapping, averaged: bool = False, put: Put = keep_on_host) -> dict:
    """The generator's parameters, one tensor after another from a file that has been checked, each `put` in place."""
    rename = _ema_name if averaged else str
    return _read(read, _abstract_generator(published), lambda path: rename(published_name(path)), put)


def read_discriminator(read: Read, published: Mapping, put: Put = keep_on_host) -> dict:
    """The discriminator's {"params", "batch_stats"} likewise."""
    return _read(read, _abstract_discriminator(published), _discriminator_name, put)


def _read(read: Read, like: Mapping, name_of: Callable[[Path], str], put: Put) -> dict:
    leaves = {}
    for path, leaf in flatten_dict(like).items():
        array = np.asarray(read(name_of(path)))
        array = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array
        leaves[path] = put(path, np.array(array, dtype=leaf.dtype, order="C"))
    return unflatten_dict(leaves)


def shapes_of(state_dict: Mapping[str, np.ndarray]) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in state_dict.items()}


def check_tensors(shapes: Shapes, groups: Mapping[str, Shapes], wanted: str) -> None:
    """Raises UsageError unless every tensor is known and well-shaped, and `wanted` and every group present whole."""
    known = {name: shape for group in groups.values() for name, shape in group.items()}
    wrong = []
    for title, group in groups.items():
        if title == wanted or any(name in shapes for name in group):
            wrong += [f"{name} is missing" for name in group if name not in shapes]
    for name, shape in shapes.items():
        if name not in known:
            wrong.append(f"{name} is unknown")
        elif shape != known[name]:
            wrong.append(f"{name} has shape {shape} instead of {known[name]}")
    if wrong:
        raise UsageError(f"the checkpoint does not fit its configuration, nothing was loaded: {'; '.join(wrong)}")


def _published_shapes(published: Mapping) -> dict[str, Shapes]:
    """Name and PyTorch shape of every tensor that a published file may hold, by group."""

    def shapes(tree: Mapping, name_of: Callable[[Path], str]) -> Shapes:
        return {name_of(path): _torch_shape(leaf.shape) for path, leaf in flatten_dict(tree).items()}

    generator = shapes(_abstract_generator(published), published_name)
    discriminator = _abstract_discriminator(published)
    weights = shapes({"params": discriminator["params"]}, _discriminator_name)
    return {
        "generator": generator,
        "discriminator": shapes(discriminator, _discriminator_name),
        "perceptual": _perceptual_shapes(),
        "averages": {_ema_name(name): shape for name, shape in generator.items()},
        "discriminator's averages": {_ema_name(name): shape for name, shape in weights.items()},
        "averages' settings": {"model_ema.decay": (), "model_ema.num_updates": ()},
    }


def _torch_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[3], shape[2], shape[0], shape[1]) if len(shape) == 4 else tuple(shape)


def _perceptual_shapes() -> Shapes:
    prefix, in_channels = "loss.perceptual_loss.", 3
    shapes = {f"{prefix}scaling_layer.{name}": (1, 3, 1, 1) for name in ("shift", "scale")}
    for i, stage in enumerate(TRUNKS["vgg16"].stages):
        for index, channels, *_ in stage:
            shapes[f"{prefix}net.slice{i + 1}.{index}.weight"] = (channels, in_channels, 3, 3)
            shapes[f"{prefix}net.slice{i + 1}.{index}.bias"] = (channels,)
            in_channels = channels
        shapes[f"{prefix}lin{i}.model.1.weight"] = (1, in_channels, 1, 1)
    return shapes


# ---- the table -------------------------------------------------------------------------------------------------------


def published_name(path: Path) -> str:
    """Of a parameter or a module of the generator."""
    return ".".join(_published_part(part) for part in path)


def _published_part(part: str) -> str:
    numbered = re.fullmatch(r"([a-z]+)_(\d+)", part)
    if numbered:
        return NUMBERED_NAMES[numbered[1]].format(numbered[2])
    return NAMES.get(part, part)


def _discriminator_name(path: Path) -> str:
    """The published network is one sequence: convolution, activation, then (convolution, norm, activation) repeated."""
    _, module, leaf = path
    kind, number = module.split("_")
    position = 3 * int(number) if kind == "norm" else max(0, 3 * int(number) - 1)
    return f"loss.discriminator.main.{position}.{NAMES.get(leaf, leaf)}"


def _ema_name(name: str) -> str:
    return "model_ema." + name.replace(".", "")


def _abstract_generator(published: Mapping) -> dict:
    model = TokenizerModel(**model_fields(published))
    side = 2 ** (len(model.channel_multipliers) - 1)
    image = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    variables = jax.eval_shape(lambda key, x: model.init(key, x, method="initialize"), jax.random.key(0), image)
    return nn.meta.unbox(variables)["params"]


def _abstract_discriminator(published: Mapping) -> dict:
    model = PatchDiscriminator(**discriminator_fields(published), norm_group=0)
    side = 2 ** (model.num_layers + 2)
    image = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    return nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0), image))
