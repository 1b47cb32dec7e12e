"""What a file of tensors holds, told by their names and shapes, and the config that makes the same networks here.

Configurations ("architectures") are written as the published ones are. Two things leave no trace in shapes: how many
heads a generator has, and for how large pictures a network was made. Where neither the file nor the caller says them, a
picture has 16x16 codes and heads 64 channels, or there are as many as layers: all of that holds for all published ones.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ml_collections import ConfigDict

from ibq_jax.base.config import PREFIX, flatten, load_config, preset_folder, preset_names
from ibq_jax.base.errors import UsageError
from ibq_jax.interop import generator_names, tokenizer_names

TOKENIZER, GENERATOR = "tokenizer", "autoregressive"
STAGES = {TOKENIZER: "a tokenizer", GENERATOR: "a generator"}
CONFIGS = preset_folder()
CODES_A_SIDE, HEAD_CHANNELS = 16, 64
ANYWHERE = {TOKENIZER: "encoder.conv_in.weight", GENERATOR: "blocks.0.attention.wqkv.weight"}

PRESETS = {
    TOKENIZER: ("imagenet256_16384", "tokenizer.py"),
    GENERATOR: ("imagenet256_B", "autoregressive.py"),
}  # whose other fields a network of sizes of its own gets

UNTOLD = frozenset(("model.num_heads", "model.num_kv_heads", "model.grid"))

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Contents:
    """Of what `stage` the networks of a file are, and how large."""

    stage: str
    architecture: dict


def recognize(shapes: Mapping[str, Shape], about: Mapping[str, str], where: str) -> Contents:
    """From names and shapes, and from what a file of `convert` says `about` itself.

    Raises UsageError for a file that holds neither network.
    """
    prefix = generator_names.name_prefix(shapes)
    if prefix + ANYWHERE[GENERATOR] in shapes:
        stage, infer = GENERATOR, _generator
        shapes = {name.removeprefix(prefix): shape for name, shape in shapes.items()}
    elif ANYWHERE[TOKENIZER] in shapes:
        stage, infer = TOKENIZER, _tokenizer
    else:
        raise UsageError(
            f"{where} holds neither a tokenizer ({ANYWHERE[TOKENIZER]}) nor a generator ({ANYWHERE[GENERATOR]})"
        )
    try:
        architecture = json.loads(about["architecture"]) if "architecture" in about else infer(shapes)
    except KeyError as error:
        raise UsageError(f"{where} holds {STAGES[stage]} without its tensor {error.args[0]}") from error
    except (ValueError, IndexError) as error:
        raise UsageError(f"{where}: its sizes cannot be told ({error})") from error
    return Contents(stage, architecture)


def check(shapes: Mapping[str, tuple[int, ...]], contents: Contents) -> None:
    """Raises UsageError naming every tensor that is missing, unknown or misshapen."""
    if contents.stage == TOKENIZER:
        tokenizer_names.check_tokenizer(shapes, contents.architecture)
    else:
        generator_names.check_generator(shapes, generator_names.build(contents.architecture))


def _tokenizer(shapes: Mapping[str, Shape]) -> dict:
    channels, levels = shapes[ANYWHERE[TOKENIZER]][0], _count(shapes, r"encoder\.down\.(\d+)\.")
    resolution = CODES_A_SIDE * 2 ** (levels - 1)
    widths = [shapes[f"encoder.down.{i}.block.0.conv1.weight"][0] for i in range(levels)]
    attending = [i for i in range(levels) if f"encoder.down.{i}.attn.0.norm.weight" in shapes]
    codes, dim = shapes["quantize.embedding.weight"]
    architecture = {
        "ddconfig": {
            **tokenizer_names.SUPPORTED,
            "z_channels": shapes["encoder.conv_out.weight"][0],
            "resolution": resolution,
            "ch": channels,
            "ch_mult": [width // channels for width in widths],
            "num_res_blocks": _count(shapes, r"encoder\.down\.0\.block\.(\d+)\."),
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


def _generator(shapes: Mapping[str, Shape]) -> dict:
    vocabulary, width = shapes["head.weight"]
    layers = _count(shapes, r"blocks\.(\d+)\.")
    architecture = {
        "vocab_size": vocabulary,
        "block_size": CODES_A_SIDE**2,
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
    """How many numbers the pattern's group takes in the names, which all begin with it."""
    return len({match[1] for match in (re.match(pattern, name) for name in tensors) if match})


# ---- the config ------------------------------------------------------------------------------------------------------


def run_config(
    contents: Contents, source: str, spec: str = "", overrides: Sequence[str] = (), own: str = ""
) -> tuple[ConfigDict, str]:
    """The config of a run with these networks, and in words what they are.

    Sizes are the networks'. All else is of the preset `spec`, FILE.py:PRESET; where that is empty, as the file's `own`
    config (JSON) has it; without one, of the first preset of the same sizes (of several, one that has as much of
    "pretrain" in its name as `source`), or if there is none of a usual one. `overrides`, as `load_config` takes them,
    also say what leaves no trace in shapes. Raises UsageError where there is no such file or preset.
    """
    what, sizes = STAGES[contents.stage], describe(contents)
    said = {override.removeprefix(PREFIX).partition("=")[0] for override in overrides}
    fields = {name: value for name, value in _fields(contents).items() if name not in said & UNTOLD}
    usual, file = PRESETS[contents.stage]
    if spec:
        words = f"{what}, {sizes}; other fields as in {spec}"
    elif own:
        spec, words = f"{CONFIGS / file}:{usual}", f"{what}, {sizes}; other fields as in the run that it was made of"
        fields = _known(own, load_config(spec)) | fields
        fields = {name: value for name, value in fields.items() if name not in said}
    else:
        same = sorted(same_presets(contents), key=lambda name: ("pretrain" in name) != ("pretrain" in source.lower()))
        spec = f"{CONFIGS / file}:{(same or [usual])[0]}"
        others = f" (or {' or '.join(same[1:])})" if same[1:] else ""
        words = f"{what}, preset {same[0]}{others}, {sizes}" if same else f"{what} of no preset's size, {sizes}"
    config = load_config(spec, overrides)
    if config.stage != contents.stage:
        raise UsageError(f"--config={spec} is of stage {config.stage!r}, the file holds {what}")
    return _with(config, fields), words


def _known(own: str, like: ConfigDict) -> dict[str, object]:
    """Of a config as JSON, the fields that `like` has too, with values of the same types."""
    try:
        fields, known = flatten(json.loads(own)), flatten(like)
    except (ValueError, AttributeError):
        return {}
    return {name: value for name, value in fields.items() if name in known and type(value) is type(known[name])}


def architecture(config: ConfigDict) -> dict:
    """Of a run's networks, as the published configurations are written."""
    return tokenizer_names.architecture(config) if config.stage == TOKENIZER else generator_names.architecture(config)


def same_presets(contents: Contents) -> list[str]:
    """The presets of these sizes; none where the presets' file is not there."""
    file, fields = CONFIGS / PRESETS[contents.stage][1], _fields(contents)
    named = preset_names(str(file)) if file.is_file() else ()
    return [name for name in named if _agrees(load_config(f"{file}:{name}"), fields)]


def _fields(contents: Contents) -> dict[str, object]:
    """Names of config fields that the networks fix, and their values."""
    if contents.stage == GENERATOR:
        fields = generator_names.model_fields(contents.architecture)
        del fields["gamma_init"]  # of the first step only
        no_class = contents.architecture.get("no_class", True)
        return {f"model.{name}": value for name, value in fields.items()} | (
            {} if no_class else {"loss.class_dropout": 0.0}
        )
    fields = tokenizer_names.model_fields(contents.architecture)
    codebook = {"codebook.size": fields.pop("codebook_size"), "codebook.dim": fields.pop("code_dim")}
    sizes = {f"model.{name}": value for name, value in fields.items()} | codebook
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
    """The sizes, in words."""
    sizes = contents.architecture
    if contents.stage == TOKENIZER:
        factor = 2 ** (len(sizes["ddconfig"]["ch_mult"]) - 1)
        return f"{sizes['n_embed']:,} codes of {sizes['embed_dim']} dimensions, one for {factor}x{factor} pixels"
    return (
        f"{sizes['n_layer']} layers of width {sizes['n_embd']}, {sizes['n_head']} heads, "
        f"{sizes['vocab_size']:,} codes, {sizes['class_num']:,} classes"
    )
