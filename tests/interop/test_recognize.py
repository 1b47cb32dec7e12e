"""A file's contents follow from names and shapes alone: all eleven published ones, and files that hold neither."""

import json

import jax
import numpy as np
import pytest
from support import released

from ibq_jax.autoregressive.step import GeneratorTrainer
from ibq_jax.base.errors import UsageError
from ibq_jax.base.sharding import abstract_state, make_mesh
from ibq_jax.interop import generator_names, tokenizer_names
from ibq_jax.interop.recognize import Contents, check, recognize, run_config, same_presets
from ibq_jax.tokenizer.step import TokenizerTrainer

TOKENIZERS = json.loads((released.GOLDEN / "published_tokenizers.json").read_text())
OTHERS = TOKENIZERS["others"]  # with tensors of their own, and neither averages nor a discriminator
GENERATORS = json.loads((released.GOLDEN / "published_generators.json").read_text())
FILES = {
    "IBQ-Tokenizer-1024": ("imagenet256_1024", "imagenet256_1024"),
    "IBQ-Tokenizer-8192": ("imagenet256_8192", "imagenet256_8192"),
    "IBQ-Tokenizer-16384": ("imagenet256_16384", "imagenet256_16384"),
    "IBQ-Tokenizer-262144": ("imagenet256_262144", "imagenet256_262144"),
    "IBQ-Tokenizer-16384-Pretrain": ("IBQ_pretrain_16384", "pretrain256_16384"),
    "IBQ-Tokenizer-262144-Pretrain": ("IBQ_pretrain_262144", "pretrain256_262144"),
    "Emu3.5-VisionTokenizer": ("model", "emu35_131072"),
    "IBQ-AR-B": ("AR_256_B", "imagenet256_B"),
    "IBQ-AR-L": ("AR_256_L", "imagenet256_L"),
    "IBQ-AR-XL": ("AR_256_XL", "imagenet256_XL"),
    "IBQ-AR-XXL": ("AR_256_XXL", "imagenet256_XXL"),
}


def published_shapes(name: str) -> dict[str, tuple[int, ...]]:
    if name in GENERATORS:
        layers = GENERATORS[name]["config"]["n_layer"]
        return {
            tensor.format(layer): tuple(shape)
            for tensor, shape in GENERATORS[name]["tensors"].items()
            for layer in range(layers if "{}" in tensor else 1)
        }
    if name in OTHERS:
        return {tensor: tuple(shape) for tensor, shape in OTHERS[name]["tensors"].items()}
    codes = TOKENIZERS["codebook_sizes"][name]
    return {
        tensor: tuple(codes if size == "n_embed" else size for size in shape)
        for tensor, shape in TOKENIZERS["tensors"].items()
    }


def published_architecture(name: str) -> dict:
    if name in GENERATORS:
        return GENERATORS[name]["config"]
    if name in OTHERS:
        return OTHERS[name]["config"]
    return TOKENIZERS["config"] | {"n_embed": TOKENIZERS["codebook_sizes"][name]}


@pytest.mark.parametrize("name", FILES)
def test_each_published_file_is_known_by_its_shapes(name):
    file, preset = FILES[name]
    shapes, published = published_shapes(name), published_architecture(name)
    contents = recognize(shapes, {}, "a file")
    module = generator_names if name in GENERATORS else tokenizer_names
    ours, theirs = module.model_fields(contents.architecture), module.model_fields(published)
    theirs["gamma_init"] = ours.get("gamma_init")  # matters before the first step only and leaves no trace
    assert {**ours, "gamma_init": None} == {**theirs, "gamma_init": None}
    config, words = run_config(contents, file)
    assert f"preset {preset}" in words and preset in same_presets(contents)
    check(shapes, Contents.from_config(config))
    with pytest.raises(UsageError, match="is missing"):
        check(dict(list(shapes.items())[1:]), contents)


@pytest.mark.parametrize("name", FILES)
def test_the_abstract_state_of_a_preset_has_exactly_the_published_names_shapes_and_types(name):
    config, _ = run_config(recognize(published_shapes(name), {}, "a file"), FILES[name][0])
    mesh = make_mesh({"data": -1})
    trainer = (GeneratorTrainer if name in GENERATORS else TokenizerTrainer)(config, mesh, 1)
    state, _ = abstract_state(trainer.create_state, mesh, 0)

    def export(state):
        if name in GENERATORS:
            return generator_names.published_tensors(state.params)
        if name in OTHERS:
            return tokenizer_names.published_tensors(state.params)
        discriminator = {"params": state.discriminator.params, "batch_stats": state.discriminator.batch_stats}
        settings = {"model_ema.decay": state.discriminator.lecam.real, "model_ema.num_updates": state.step}
        return settings | tokenizer_names.published_tensors(state.params, state.ema, discriminator)

    exported = jax.eval_shape(export, state)  # nothing is allocated
    assert {tensor: leaf.shape for tensor, leaf in exported.items()} == published_shapes(name)
    counts = {tensor for tensor, leaf in exported.items() if tokenizer_names.torch_type(leaf.dtype) == np.int64}
    assert {tensor.rpartition(".")[2] for tensor in counts} <= {"num_batches_tracked", "num_updates"}
    assert {leaf.dtype for tensor, leaf in exported.items() if tensor not in counts} == {np.dtype(np.float32)}


@pytest.mark.parametrize(
    ("shapes", "complaint"),
    [
        ({"a": (1,)}, "neither a tokenizer .* nor a generator"),
        ({}, "neither a tokenizer"),
        ({"encoder.conv_in.weight": (128, 3, 3, 3)}, "holds a tokenizer without its tensor"),
        (
            {"encoder.conv_in.weight": (128, 3, 3, 3), "encoder.down.0.block.0.conv1.weight": (128, 128, 3, 3)},
            r"holds a tokenizer without its tensor decoder.up.0.block.0.conv1.weight",
        ),
        ({"transformer.blocks.0.attention.wqkv.weight": (96, 32)}, "holds a generator without its tensor head.weight"),
        (
            {"blocks.0.attention.wqkv.weight": (96, 32), "head.weight": (1,)},
            "the sizes of its networks cannot be determined",
        ),
    ],
)
def test_what_is_neither_is_refused(shapes, complaint):
    with pytest.raises(UsageError, match=complaint):
        recognize(shapes, {}, "a file")


def test_what_a_file_says_of_itself_comes_first():
    said = {"architecture": json.dumps(GENERATORS["IBQ-AR-B"]["config"] | {"n_head": 8})}
    assert recognize(published_shapes("IBQ-AR-B"), said, "a file").architecture["n_head"] == 8
    with pytest.raises(UsageError, match="cannot be determined"):
        recognize(published_shapes("IBQ-AR-B"), {"architecture": "{"}, "a file")


def test_a_preset_that_is_named_gives_the_other_fields():
    contents = recognize(published_shapes("IBQ-AR-B"), {}, "a file")
    config, words = run_config(contents, "x", "configs/autoregressive.py:openmoji32", ["--config.data.batch_size=3"])
    assert (config.model.num_layers, config.optimizer.learning_rate, config.data.batch_size) == (16, 2e-3, 3)
    assert "other fields as in" in words
    with pytest.raises(UsageError, match="is of stage 'tokenizer', the file holds a generator"):
        run_config(contents, "x", "configs/tokenizer.py:openmoji32")
