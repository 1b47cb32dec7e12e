"""The mapping between the tokenizer's parameter tree and the tensor names of the published PyTorch checkpoints.

A published tokenizer file (arXiv 2412.02692, github.com/TencentARC/SEED-Voken) has up to five groups of tensors:

    encoder.* decoder.* quantize.* quant_conv.* post_quant_conv.*    the autoencoder and the codebook
    loss.discriminator.main.N.*                                      the discriminator with its BatchNorm buffers
    loss.perceptual_loss.*                                           LPIPS, frozen
    model_ema.*                                                      averages of both networks, names without their dots
    model_ema.decay, model_ema.num_updates                           the settings of the averages

Every group except the one asked for may be absent as a whole. Loading is strict in all groups: an error names every
tensor that is missing, unknown or of the wrong shape, and nothing is loaded. Convolution kernels are [out, in, h, w]
there and [h, w, in, out] here.
"""

import re
from collections.abc import Callable, Iterable, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from ibq_jax.base.errors import UsageError
from ibq_jax.pretrained.lpips import TRUNKS
from ibq_jax.tokenizer.discriminator import PatchDiscriminator
from ibq_jax.tokenizer.model import PROJECTION, TokenizerModel
from ibq_jax.tokenizer.parts import ALL, modules_of, only, without

Path = tuple[str, ...]
Shapes = Mapping[str, tuple[int, ...]]
ReadTensor = Callable[[str], np.ndarray]  # reads a tensor by its published name
PlaceLeaf = Callable[[Path, np.ndarray], object]  # moves a leaf, given by its path in our tree, to where it will stay

# Our names of modules and parameters -> the published ones, if they differ; {} is the number after the underscore.
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
AUTOENCODER_FIELDS = {  # ours -> the published ones, in "ddconfig"
    "channels": "ch",
    "channel_multipliers": "ch_mult",
    "num_res_blocks": "num_res_blocks",
    "attention_resolutions": "attn_resolutions",
    "z_channels": "z_channels",
    "resolution": "resolution",
}
SUPPORTED = {"double_z": False, "in_channels": 3, "out_ch": 3, "dropout": 0.0}
L2_NORMALIZE = "l2_normalize"
RELEASED_DISCRIMINATOR = {"disc_ndf": 64, "disc_num_layers": 3}  # if the configuration does not say


def keep_on_host(path: Path, array: np.ndarray) -> np.ndarray:
    """Leaves an array where it is (a `PlaceLeaf`)."""
    return array


# ---- configurations --------------------------------------------------------------------------------------------------


def model_fields(published: Mapping) -> dict:
    """Returns the architecture fields of `TokenizerModel` for a published configuration.

    Args:
        published: the configuration, with "ddconfig", "n_embed" and "embed_dim", and "l2_normalize" (the name in
            Emu3.5's code) if the quantizer divides latents and codes by their lengths.

    Raises:
        UsageError: a key is missing, or a value is one that this architecture does not support.
    """
    layout = _value(published, "ddconfig")
    for key, supported in SUPPORTED.items():
        if key in layout and layout[key] != supported:
            raise UsageError(
                f"configuration of the tokenizer: ddconfig.{key} is {layout[key]!r}, only {supported!r} is supported"
            )
    fields = {ours: _value(layout, theirs, "ddconfig.") for ours, theirs in AUTOENCODER_FIELDS.items()}
    fields |= {"codebook_size": _value(published, "n_embed"), "code_dim": _value(published, "embed_dim")}
    if published.get(L2_NORMALIZE):
        fields["quantizer_settings"] = FrozenDict({L2_NORMALIZE: True})
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}


def check_quantizer(name: str) -> None:
    """Checks that the quantizer `name` has published tensor names; raises UsageError otherwise."""
    if name != "ibq":
        raise UsageError(
            f"only IBQ's tokenizer has published names and a model in PyTorch; the quantizer here is {name}"
        )


def published_architecture(config: Mapping) -> dict:
    """Returns the architecture of a tokenizer's config in the format of the published configurations.

    Raises UsageError for a quantizer other than IBQ's.
    """
    check_quantizer(config["quantizer"]["name"])
    layout = {theirs: config["model"][ours] for ours, theirs in AUTOENCODER_FIELDS.items()}
    directions = {L2_NORMALIZE: True} if config["quantizer"][L2_NORMALIZE] else {}
    return directions | {
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
    """Returns the fields `channels` and `num_layers` of `PatchDiscriminator` for a published configuration."""
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
    """Returns the tensors of a published file, {name: array}, in PyTorch's layout; any kind of array is accepted.

    Args:
        params: the autoencoder's parameters.
        ema: their averages.
        discriminator: the discriminator's {"params", "batch_stats"}.
        stand_in: together with `ema`, also write the discriminator's weights under the names of its averages. No such
            averages are kept here, but PyTorch's strict loading looks for them.
    """
    tensors = _renamed(without(params, (PROJECTION,)), published_name)
    if ema is not None:
        tensors |= _renamed(without(ema, (PROJECTION,)), lambda path: ema_name(published_name(path)))
    if discriminator is not None:
        tensors |= _renamed(discriminator, _discriminator_name)
        if ema is not None and stand_in:
            weights = {"params": discriminator["params"]}
            tensors |= _renamed(weights, lambda path: ema_name(_discriminator_name(path)))
    return tensors


def tokenizer_to_torch(params: Mapping) -> dict[str, np.ndarray]:
    """Returns the autoencoder's parameters under their published names, in PyTorch's layouts."""
    return to_torch_arrays(published_tensors(params))


def to_torch_arrays(tensors: Mapping) -> dict[str, np.ndarray]:
    """Returns tensors as contiguous NumPy arrays of the types that PyTorch gives them."""
    return {name: np.array(tensor, dtype=torch_type(tensor.dtype), order="C") for name, tensor in tensors.items()}


def torch_type(dtype: np.dtype) -> np.dtype:
    """Returns the type that PyTorch gives such a tensor: counts are int64 there and int32 here."""
    return np.dtype(np.int64) if dtype == np.int32 else np.dtype(dtype)


def _renamed(tree: Mapping, name_of: Callable[[Path], str]) -> dict:
    return {
        name_of(path): leaf.transpose(3, 2, 0, 1) if leaf.ndim == 4 else leaf
        for path, leaf in flatten_dict(tree).items()
    }


# ---- from the published names ----------------------------------------------------------------------------------------


def tokenizer_from_torch(state_dict: Mapping[str, np.ndarray], published: Mapping, use_ema: bool) -> dict:
    """Returns the autoencoder's parameters for the configuration `published`, raw or (`use_ema`) averaged.

    Raises UsageError if a tensor is missing, unknown or of the wrong shape, or there are no averages to use.
    """
    if use_ema and not has_averages(state_dict):
        raise UsageError("the checkpoint has no averaged weights (model_ema.*); load it with use_ema=False")
    check_tokenizer(shapes_of(state_dict), published, wanted="averages" if use_ema else "autoencoder")
    return read_tokenizer(state_dict.__getitem__, published, averaged=use_ema)


def check_tokenizer(shapes: Shapes, published: Mapping, wanted: str = "autoencoder") -> None:
    """Checks the tensors of a file against the configuration `published`.

    Raises UsageError that names every tensor that is missing, unknown or of the wrong shape. Every group of tensors
    except `wanted` (see `_published_shapes`) may be absent as a whole.
    """
    check_tensors(shapes, _published_shapes(published), wanted)


def has_averages(names: Iterable[str]) -> bool:
    """Returns whether a file with these tensors holds averaged weights."""
    return any(name.startswith("model_ema.") for name in names)


def has_published_discriminator(config: ConfigDict) -> bool:
    """Returns whether a config's discriminator, if it has one, is of the kind that published files hold."""
    return config.discriminator.name == "patch" and not config.discriminator.spectral_norm


def has_discriminator(names: Iterable[str]) -> bool:
    """Returns whether a file with these tensors holds the discriminator."""
    return any(name.startswith("loss.discriminator.") for name in names)


def read_tokenizer(
    read: ReadTensor,
    published: Mapping,
    averaged: bool = False,
    place: PlaceLeaf = keep_on_host,
    parts: tuple[str, ...] = ALL,
) -> dict:
    """Reads the parameters of the autoencoder's `parts` from a checked file, tensor by tensor, and places each."""
    rename = ema_name if averaged else str
    like = only(_abstract_autoencoder(published), modules_of(parts))
    return _read(read, like, lambda path: rename(published_name(path)), place)


def read_discriminator(read: ReadTensor, published: Mapping, place: PlaceLeaf = keep_on_host) -> dict:
    """Reads the discriminator's {"params", "batch_stats"} in the same way."""
    return _read(read, _abstract_discriminator(published), _discriminator_name, place)


def _read(read: ReadTensor, like: Mapping, name_of: Callable[[Path], str], place: PlaceLeaf) -> dict:
    leaves = {}
    for path, leaf in flatten_dict(like).items():
        array = np.asarray(read(name_of(path)))
        array = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array
        leaves[path] = place(path, np.array(array, dtype=leaf.dtype, order="C"))
    return unflatten_dict(leaves)


def shapes_of(state_dict: Mapping[str, np.ndarray]) -> Shapes:
    """Returns the shape of every tensor."""
    return {name: tuple(tensor.shape) for name, tensor in state_dict.items()}


def check_tensors(shapes: Shapes, groups: Mapping[str, Shapes], wanted: str) -> None:
    """Checks the shapes of a file's tensors against those of `groups`.

    Raises UsageError that names every tensor that is unknown or of the wrong shape, and every one that is missing from
    the group `wanted` or from a group that is present in part.
    """
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
    """Returns {group: {name: PyTorch shape}} of every tensor that a published file may hold."""

    def shapes(tree: Mapping, name_of: Callable[[Path], str]) -> Shapes:
        return {name_of(path): _torch_shape(leaf.shape) for path, leaf in flatten_dict(tree).items()}

    autoencoder = shapes(_abstract_autoencoder(published), published_name)
    discriminator = _abstract_discriminator(published)
    weights = shapes({"params": discriminator["params"]}, _discriminator_name)
    return {
        "autoencoder": autoencoder,
        "discriminator": shapes(discriminator, _discriminator_name),
        "perceptual": _perceptual_shapes(),
        "averages": {ema_name(name): shape for name, shape in autoencoder.items()},
        "discriminator's averages": {ema_name(name): shape for name, shape in weights.items()},
        "averages' settings": {"model_ema.decay": (), "model_ema.num_updates": ()},
    }


def _torch_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[3], shape[2], shape[0], shape[1]) if len(shape) == 4 else tuple(shape)


def _perceptual_shapes() -> Shapes:
    prefix, in_channels = "loss.perceptual_loss.", 3
    shapes: dict[str, tuple[int, ...]] = {f"{prefix}scaling_layer.{name}": (1, 3, 1, 1) for name in ("shift", "scale")}
    for i, stage in enumerate(TRUNKS["vgg16"].stages):
        for index, channels, *_ in stage:
            shapes[f"{prefix}net.slice{i + 1}.{index}.weight"] = (channels, in_channels, 3, 3)
            shapes[f"{prefix}net.slice{i + 1}.{index}.bias"] = (channels,)
            in_channels = channels
        shapes[f"{prefix}lin{i}.model.1.weight"] = (1, in_channels, 1, 1)
    return shapes


# ---- the table -------------------------------------------------------------------------------------------------------


def published_name(path: Path) -> str:
    """Returns the published name of a parameter or a module of the autoencoder."""
    return ".".join(_published_part(part) for part in path)


def _published_part(part: str) -> str:
    numbered = re.fullmatch(r"([a-z]+)_(\d+)", part)
    if numbered:
        return NUMBERED_NAMES[numbered[1]].format(numbered[2])
    return NAMES.get(part, part)


def _discriminator_name(path: Path) -> str:
    """Returns the published name of a discriminator's parameter.

    The published network is one sequence: convolution, activation, then (convolution, norm, activation) repeated.
    """
    _, module, leaf = path
    kind, number = module.split("_")
    position = 3 * int(number) if kind == "norm" else max(0, 3 * int(number) - 1)
    return f"loss.discriminator.main.{position}.{NAMES.get(leaf, leaf)}"


def ema_name(name: str) -> str:
    """Returns the name under which a published file has the average of a tensor."""
    return "model_ema." + name.replace(".", "")


def _abstract_autoencoder(published: Mapping) -> dict:
    model = TokenizerModel(**model_fields(published))
    side = model.downsampling
    image = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    variables = jax.eval_shape(lambda key, x: model.init(key, x, method="initialize"), jax.random.key(0), image)
    return nn.meta.unbox(variables)["params"]


def _abstract_discriminator(published: Mapping) -> dict:
    model = PatchDiscriminator(**discriminator_fields(published), norm_group=0)
    side = 2 ** (model.num_layers + 2)
    image = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    return nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0), image))
