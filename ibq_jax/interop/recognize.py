"""Recognizes what a file of weights holds by the names and shapes of its tensors, and makes the config of a run of it.

An "architecture" is a configuration in the format of the published ones. Three facts leave no trace in the shapes: the
number of attention heads of a generator, the image size that a network was made for, and whether a quantizer divides
vectors by their lengths. If neither the file nor the caller gives them, an image has 16x16 codes, a head has 64
channels or there are as many heads as layers, and vectors stay as they are. That is right for all published files.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ml_collections import ConfigDict

from ibq_jax.autoregressive.token_sizes import load_preset
from ibq_jax.base.config import flatten, load_config, overridden_names, preset_folder, preset_names, upgraded
from ibq_jax.base.errors import UsageError
from ibq_jax.interop import generator_names, tokenizer_names

TOKENIZER, GENERATOR = "tokenizer", "autoregressive"
STAGES = {TOKENIZER: "a tokenizer", GENERATOR: "a generator"}
CONFIGS = preset_folder()
GRID_SIDE, HEAD_CHANNELS = 16, 64
EVIDENCE = {TOKENIZER: "encoder.conv_in.weight", GENERATOR: "blocks.0.attention.wqkv.weight"}

DEFAULT_PRESETS = {
    TOKENIZER: ("imagenet256_16384", "tokenizer.py"),
    GENERATOR: ("imagenet256_B", "autoregressive.py"),
}  # give the other fields of a network that has no preset's size

NOT_IN_SHAPES = frozenset(("model.num_heads", "model.num_kv_heads", "model.grid", "quantizer.l2_normalize"))

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Contents:
    """The networks of a file or a run: their stage, and their sizes in the format of the published configurations."""

    stage: str
    architecture: dict

    @classmethod
    def from_config(cls, config: ConfigDict) -> "Contents":
        """Returns the networks of a run. Raises UsageError for a tokenizer whose quantizer is not IBQ's."""
        names = tokenizer_names if config.stage == TOKENIZER else generator_names
        return cls(config.stage, names.published_architecture(config))


def recognize(shapes: Mapping[str, Shape], about: Mapping[str, str], where: str) -> Contents:
    """Returns what a file holds.

    Args:
        shapes: the shape of every tensor, by name.
        about: the file's metadata; a file of `convert` has its architecture there.
        where: the file's name, for error messages.

    Raises:
        UsageError: the file holds neither a tokenizer nor a generator, or not all of one.
    """
    prefix = generator_names.name_prefix(shapes)
    if prefix + EVIDENCE[GENERATOR] in shapes:
        stage, infer = GENERATOR, _generator_architecture
        shapes = {name.removeprefix(prefix): shape for name, shape in shapes.items()}
    elif EVIDENCE[TOKENIZER] in shapes:
        stage, infer = TOKENIZER, _tokenizer_architecture
    else:
        raise UsageError(
            f"{where} holds neither a tokenizer ({EVIDENCE[TOKENIZER]}) nor a generator ({EVIDENCE[GENERATOR]})"
        )
    try:
        architecture = json.loads(about["architecture"]) if "architecture" in about else infer(shapes)
    except KeyError as error:
        raise UsageError(f"{where} holds {STAGES[stage]} without its tensor {error.args[0]}") from error
    except (ValueError, IndexError) as error:
        raise UsageError(f"{where}: the sizes of its networks cannot be determined ({error})") from error
    return Contents(stage, architecture)


def check(shapes: Mapping[str, tuple[int, ...]], contents: Contents) -> None:
    """Checks a file's tensors; raises UsageError that names every one that is missing, unknown or misshapen."""
    if contents.stage == TOKENIZER:
        tokenizer_names.check_tokenizer(shapes, contents.architecture)
    else:
        generator_names.check_generator(shapes, generator_names.build(contents.architecture))


def _tokenizer_architecture(shapes: Mapping[str, Shape]) -> dict:
    # Sizes are read off the decoder, which has a block at each level even where the encoder has none. Levels are
    # counted in both, and one is taken for granted: then the first tensor that is missing is named.
    channels = shapes[EVIDENCE[TOKENIZER]][0]
    levels = max(1, _count(shapes, r"(?:encoder\.down|decoder\.up)\.(\d+)\."))
    resolution = GRID_SIDE * 2 ** (levels - 1)
    widths = [shapes[f"decoder.up.{i}.block.0.conv1.weight"][0] for i in range(levels)]
    attending = [i for i in range(levels) if f"decoder.up.{i}.attn.0.norm.weight" in shapes]
    codes, dim = shapes["quantize.embedding.weight"]
    architecture = {
        "ddconfig": {
            **tokenizer_names.SUPPORTED,
            "z_channels": shapes["encoder.conv_out.weight"][0],
            "resolution": resolution,
            "ch": channels,
            "ch_mult": [width // channels for width in widths],
            "num_res_blocks": _count(shapes, r"decoder\.up\.0\.block\.(\d+)\.") - 1,
            "attn_resolutions": [resolution // 2**i for i in attending],
        },
        "n_embed": codes,
        "embed_dim": dim,
    }
    first = shapes.get("loss.discriminator.main.0.weight")
    if first:
        norms = sum(bool(re.fullmatch(r"loss\.discriminator\.main\.\d+\.running_mean", name)) for name in shapes)
        architecture["loss"] = {"disc_ndf": first[0], "disc_num_layers": norms}
    return architecture


def _generator_architecture(shapes: Mapping[str, Shape]) -> dict:
    vocabulary, width = shapes["head.weight"]
    layers = _count(shapes, r"blocks\.(\d+)\.")
    architecture = {
        "vocab_size": vocabulary,
        "block_size": GRID_SIDE**2,
        "n_layer": layers,
        "n_head": _heads(width, layers),
        "n_embd": width,
        "class_num": shapes["class_emb.embedding_table.weight"][0] - 1,
    }
    if "embedding_projection.fc1.weight" in shapes:
        architecture |= {"use_pretrained_codebook": True, "n_codebook_embd": shapes["tok_emb.weight"][1]}
    return architecture


def _heads(width: int, layers: int) -> int:
    if width % HEAD_CHANNELS == 0:
        return width // HEAD_CHANNELS
    return layers if width % (4 * layers) == 0 else 1


def _count(tensors: Iterable[str], pattern: str) -> int:
    """Returns how many different numbers the pattern's group matches at the beginnings of the names."""
    return len({match[1] for match in (re.match(pattern, name) for name in tensors) if match})


# ---- the config ------------------------------------------------------------------------------------------------------


def run_config(
    contents: Contents, source: str, spec: str = "", overrides: Sequence[str] = (), own: str = ""
) -> tuple[ConfigDict, str]:
    """Returns the config of a run with these networks, and a description of them.

    The fields that decide the networks' sizes come from the file. All other fields come from the first of these that
    exists:

    1. `spec`, a preset as FILE.py:PRESET;
    2. `own`, the config (JSON) that the file stores;
    3. the preset of the same sizes; of several, one for pretraining if and only if `source` contains "pretrain";
    4. the stage's default preset.

    `overrides` (`--config.NAME=VALUE`) then replace those fields, and give what the shapes do not show.

    Raises:
        UsageError: there is no such file or preset, or a field or a value is wrong.
    """
    what, sizes = STAGES[contents.stage], describe(contents)
    given = overridden_names(overrides, contents.stage)
    fields = {name: value for name, value in _fields(contents).items() if name not in given & NOT_IN_SHAPES}
    default, file = DEFAULT_PRESETS[contents.stage]
    if spec:
        words = f"{what}, {sizes}; other fields as in {spec}"
    elif own:
        spec, words = f"{CONFIGS / file}:{default}", f"{what}, {sizes}; other fields as in the run that it was made of"
        fields = _known_fields(own, load_config(spec)) | fields
        fields = {name: value for name, value in fields.items() if name not in given}
    else:
        same = sorted(same_presets(contents), key=lambda name: ("pretrain" in name) != ("pretrain" in source.lower()))
        spec = f"{CONFIGS / file}:{(same or [default])[0]}"
        others = f" (or {' or '.join(same[1:])})" if same[1:] else ""
        words = f"{what}, preset {same[0]}{others}, {sizes}" if same else f"{what} of no preset's size, {sizes}"
    config = load_config(spec, overrides)
    if config.stage != contents.stage:
        raise UsageError(f"--config={spec} is of stage {config.stage!r}, the file holds {what}")
    return _with(config, fields), words


def _known_fields(own: str, like: ConfigDict) -> dict[str, object]:
    """Returns the fields of a config (JSON, of any version) that `like` has too, with values of the same types."""
    try:
        fields, known = flatten(upgraded(json.loads(own))), flatten(like)
    except (ValueError, TypeError, AttributeError):  # not a config
        return {}
    return {name: value for name, value in fields.items() if name in known and type(value) is type(known[name])}


def same_presets(contents: Contents) -> list[str]:
    """Returns the names of the presets of these sizes; none if the file of presets is absent."""
    file, fields = CONFIGS / DEFAULT_PRESETS[contents.stage][1], _fields(contents)
    named = preset_names(str(file)) if file.is_file() else ()
    load = load_preset if contents.stage == GENERATOR else load_config
    return [name for name in named if _agrees(load(f"{file}:{name}"), fields)]


def _fields(contents: Contents) -> dict[str, object]:
    """Returns the config fields that the networks decide, with their values."""
    if contents.stage == GENERATOR:
        fields = generator_names.model_fields(contents.architecture)
        del fields["gamma_init"]  # matters before the first step only
        no_class = contents.architecture.get("no_class", True)
        named: dict[str, object] = {f"model.{name}": value for name, value in fields.items()}
        return named if no_class else named | {"loss.class_dropout": 0.0}
    fields = tokenizer_names.model_fields(contents.architecture)
    quantizer = {"codebook.size": fields.pop("codebook_size"), "codebook.dim": fields.pop("code_dim")}
    quantizer["quantizer.l2_normalize"] = bool(fields.pop("quantizer_settings", {}))
    sizes = {f"model.{name}": value for name, value in fields.items()} | quantizer
    if "loss" in contents.architecture:
        discriminator = tokenizer_names.discriminator_fields(contents.architecture)
        sizes |= {f"discriminator.{name}": value for name, value in discriminator.items()}
    return sizes


def _agrees(config: ConfigDict, fields: Mapping[str, object]) -> bool:
    own = flatten(config)
    return all(own[name] == value for name, value in fields.items())


def _with(config: ConfigDict, fields: Mapping[str, object]) -> ConfigDict:
    config.unlock()
    config.update_from_flattened_dict(dict(fields))
    if config.stage == TOKENIZER and not _agrees(config, {"data.image_size": config.model.resolution}):
        config.data.image_size = config.data.resize = config.model.resolution
    return config.lock()


def describe(contents: Contents) -> str:
    """Returns the sizes in words."""
    sizes = contents.architecture
    if contents.stage == TOKENIZER:
        factor = 2 ** (len(sizes["ddconfig"]["ch_mult"]) - 1)
        return f"{sizes['n_embed']:,} codes of {sizes['embed_dim']} dimensions, one code per {factor}x{factor} pixels"
    return (
        f"{sizes['n_layer']} layers of width {sizes['n_embd']}, {sizes['n_head']} heads, "
        f"{sizes['vocab_size']:,} codes, {sizes['class_num']:,} classes"
    )
