"""Generator, the class, and its table of names: the released code's weights give the released code's numbers."""

import json
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from support import released

from ibq_jax import Generator
from ibq_jax.autoregressive.model import GeneratorModel
from ibq_jax.autoregressive.step import GeneratorTrainer
from ibq_jax.base.config import load_config
from ibq_jax.base.errors import UsageError
from ibq_jax.base.sharding import AXES, make_mesh
from ibq_jax.interop import generator_names

CONFIG = Path(__file__).parents[2] / "configs" / "autoregressive.py"
PUBLISHED = json.loads((released.GOLDEN / "published_generators.json").read_text())
SMALL = {"vocab_size": 64, "block_size": 16, "n_layer": 2, "n_head": 2, "n_embd": 32, "class_num": 10}
QUICK = {"xla_backend_optimization_level": 0}  # compiles twice as fast
OVERRIDES = (
    "model.vocab_size=64",
    "model.grid=(4, 4)",
    "model.num_classes=10",
    "model.num_layers=2",
    "model.num_heads=2",
    "model.num_kv_heads=2",
    "model.embed_dim=32",
    "model.dropout=0.0",
)


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    return released.load("ar")


@pytest.fixture(scope="module")
def state_dict(golden) -> dict[str, np.ndarray]:
    return {name.removeprefix("sd/"): array for name, array in golden.items() if name.startswith("sd/")}


@pytest.fixture(scope="module")
def published(golden) -> dict:
    return json.loads(str(golden["config"]))


@pytest.fixture(scope="module")
def generator(state_dict, published) -> Generator:
    return Generator.from_torch(state_dict, published)


def as_published(state_dict: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A file as the authors publish it: under "transformer.", with a tokenizer beside it."""
    tokenizer = {"first_stage_model.encoder.conv_in.weight": np.zeros((8, 3, 3, 3), np.float32)}
    return tokenizer | {f"transformer.{name}": array for name, array in state_dict.items()}


def assert_gradients(gradients: dict, golden: dict[str, np.ndarray]) -> None:
    ours = generator_names.generator_to_torch(gradients, prefix="grad/")
    assert ours.keys() == {name for name in golden if name.startswith("grad/")}
    for name, gradient in ours.items():
        released.assert_close(gradient, golden[name], 1e-4)


def test_logits_are_the_released_ones(golden, generator):
    logits = generator.logits(golden["tokens"], golden["labels"][:, 0])
    released.assert_close(logits, golden["logits"], 1e-4)
    in_rows = generator.logits(golden["tokens"].reshape(-1, 4, 4), golden["labels"][:, 0])
    np.testing.assert_array_equal(in_rows, logits)


def test_loss_and_every_gradient_are_the_released_ones(golden, generator):
    codes, labels = jnp.asarray(golden["tokens"]).reshape(-1, 4, 4), jnp.asarray(golden["labels"][:, 0])

    def loss(params):
        log_p = jax.nn.log_softmax(generator.model.apply({"params": params}, codes, labels))
        return -jnp.mean(jnp.take_along_axis(log_p, codes.reshape(len(codes), -1, 1), axis=-1))

    value, gradients = jax.jit(jax.value_and_grad(loss), compiler_options=QUICK)(generator.params)
    released.assert_close(value, golden["loss"], 1e-4)
    assert_gradients(gradients, golden)


@pytest.mark.parametrize(("sizes", "implementation"), [((1, 1, 1), "dense"), ((1, 2, 2), "streamed")])
def test_the_trainers_loss_and_gradients_are_the_released_ones(golden, generator, sizes, implementation):
    overrides = [f"--config.{field}" for field in (*OVERRIDES, f"loss.implementation={implementation}")]
    mesh = make_mesh(dict(zip(AXES, sizes, strict=True)), jax.devices()[: math.prod(sizes)])
    trainer = GeneratorTrainer(load_config(f"{CONFIG}:openmoji32", overrides), mesh, steps_per_epoch=1)
    codes, labels = jnp.asarray(golden["tokens"]).reshape(-1, 4, 4), jnp.asarray(golden["labels"][:, 0])

    losses = jax.jit(trainer.code_losses, compiler_options=QUICK)(generator.params, codes, labels)
    assert losses.shape == (4, 16)
    released.assert_close(losses.mean(), golden["loss"], 1e-4)
    gradient = jax.jit(trainer._gradient, compiler_options=QUICK)
    value, gradients = gradient(generator.params, codes, labels, jax.random.key(0))
    released.assert_close(value, golden["loss"], 1e-4)
    assert_gradients(gradients, golden)


@pytest.mark.parametrize("scale", [1.5, 2.25])
def test_the_likeliest_codes_under_guidance_are_the_released_ones(golden, published, generator, scale):
    labels, expected = golden["labels"][:3, 0], golden[f"greedy_cfg_{scale}"].reshape(-1, 4, 4)
    codes = generator.sample(labels, cfg_scale=scale, temperature=0)
    assert codes.dtype == np.int32
    np.testing.assert_array_equal(codes, expected)
    drawn = generator.sample(labels, cfg_scale=scale, temperature=published["temperature"], top_k=1)
    np.testing.assert_array_equal(drawn, expected)


def test_a_published_file_with_its_tokenizer_gives_the_same_generator(golden, state_dict, published, generator):
    file = as_published(state_dict)
    from_file = Generator.from_torch(file, published)
    jax.tree.map(np.testing.assert_array_equal, from_file.params, generator.params)
    codes = from_file.sample(golden["labels"][:3, 0], cfg_scale=1.5, temperature=0)
    np.testing.assert_array_equal(codes, golden["greedy_cfg_1.5"].reshape(-1, 4, 4))


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_weights_go_back_as_they_came(state_dict, published, prefix):
    given = as_published(state_dict) if prefix else state_dict
    returned = Generator.from_torch(given, published).to_torch()
    assert returned.keys() == {prefix + name for name in state_dict}
    for name, tensor in returned.items():
        assert tensor.flags.c_contiguous
        np.testing.assert_array_equal(tensor, state_dict[name.removeprefix(prefix)], strict=True, err_msg=name)


def test_half_precision_files_become_float32_parameters(state_dict, published):
    halves = {name: tensor.astype(np.float16) for name, tensor in state_dict.items()}
    params = Generator.from_torch(halves, published).params
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}


def test_layouts(state_dict, generator):
    wqkv = generator.params["blocks"]["attention"]["wqkv"]["kernel"]
    assert wqkv.shape == (2, 32, 96)
    assert wqkv[1, 5, 70] == state_dict["blocks.1.attention.wqkv.weight"][70, 5]
    np.testing.assert_array_equal(generator.params["head"], state_dict["head.weight"])


@pytest.mark.parametrize("prefix", ["", "transformer."])
@pytest.mark.parametrize(
    ("name", "tensor", "complaint"),
    [
        ("blocks.1.attention.wo.weight", None, "blocks.1.attention.wo.weight is missing"),
        ("head_nm.ada_lin.1.bias", None, "head_nm.ada_lin.1.bias is missing"),
        ("blocks.2.attention.wo.weight", np.zeros((32, 32)), "blocks.2.attention.wo.weight is unknown"),
        ("surplus", np.zeros(3), "surplus is unknown"),
        ("embedding_projection.fc1.bias", np.zeros(32), "embedding_projection.fc1.bias is unknown"),
        (
            "blocks.0.feed_forward.w2.weight",
            np.zeros((256, 32)),
            r"blocks.0.feed_forward.w2.weight has shape \(256, 32\) instead of \(32, 256\)",
        ),
        ("class_emb.embedding_table.weight", np.zeros((12, 32)), r"\(12, 32\) instead of \(11, 32\)"),
    ],
)
def test_whatever_does_not_fit_is_named(state_dict, published, prefix, name, tensor, complaint):
    changed = {key: value for key, value in (state_dict | {name: tensor}).items() if value is not None}
    with pytest.raises(UsageError, match=f"nothing was loaded: .*{complaint}"):
        Generator.from_torch(as_published(changed) if prefix else changed, published)


def test_everything_that_does_not_fit_is_named_at_once(state_dict, published):
    changed = state_dict | {"surplus": np.zeros(3), "head.weight": np.zeros((1, 32))}
    del changed["tok_emb.weight"]
    with pytest.raises(UsageError) as raised:
        Generator.from_torch(changed, published)
    for complaint in ("tok_emb.weight is missing", "surplus is unknown", "head.weight has shape (1, 32)"):
        assert complaint in str(raised.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"vocab_size": 128}, r"tok_emb.weight has shape \(64, 32\) instead of \(128, 32\)"),
        ({"n_layer": 3}, "blocks.2.attention.wqkv.weight is missing"),
        ({"n_kv_head": 1}, r"blocks.0.attention.wqkv.weight has shape \(96, 32\) instead of \(64, 32\)"),
        ({"use_pretrained_codebook": True}, "embedding_projection.fc1.weight is missing"),
        ({"block_size": 15}, "block_size is 15, not a square"),
        ({"cond_dim": 64}, "cond_dim is 64, only 32 is supported"),
        ({"shared_aln": True}, "shared_aln is True, only False is supported"),
        ({"cls_token_num": 2}, "cls_token_num is 2, only 1 is supported"),
        ({"rope_base": 500}, "rope_base is 500, only 10000 is supported"),
        (
            {"n_embd": 36, "cond_dim": 36},
            r"model.embed_dim=36 does not divide into model.num_heads=2 of a multiple of 4",
        ),
    ],
)
def test_configurations_of_other_models_are_refused(state_dict, published, change, words):
    with pytest.raises(UsageError, match=words):
        Generator.from_torch(state_dict, published | change)


def test_a_configuration_that_lacks_sizes_is_refused(state_dict):
    with pytest.raises(UsageError, match="n_layer, n_embd missing"):
        Generator.from_torch(state_dict, {"vocab_size": 64, "block_size": 16, "n_head": 2})


def test_a_class_table_without_a_row_for_no_class_makes_a_generator_without_guidance(golden, state_dict, published):
    table = state_dict["class_emb.embedding_table.weight"]
    generator = Generator.from_torch(state_dict | {"class_emb.embedding_table.weight": table[:10]}, published)
    assert not generator.model.no_class
    logits = generator.logits(golden["tokens"][:3], golden["labels"][:3, 0])
    released.assert_close(logits, golden["logits"][:3], 1e-4)
    with pytest.raises(UsageError, match=r"labels lie in 0..9; these reach from 10 to 10"):
        generator.logits(golden["tokens"][:1], [10])


def test_names_with_the_tokenizers_codebook_go_there_and_back():
    published = SMALL | {"use_pretrained_codebook": True, "n_codebook_embd": 8}
    model = GeneratorModel(**generator_names.model_fields(published))
    like = generator_names.abstract_params(model)
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: random.normal(size=leaf.shape).astype(np.float32), like)
    tensors = generator_names.generator_to_torch(params)
    shapes = {name: tensor.shape for name, tensor in tensors.items() if re.search("tok_emb|projection", name)}
    assert shapes == {
        "transformer.tok_emb.weight": (64, 8),
        "transformer.embedding_projection.fc1.weight": (32, 8),
        "transformer.embedding_projection.fc1.bias": (32,),
        "transformer.embedding_projection.fc2.weight": (32, 32),
        "transformer.embedding_projection.fc2.bias": (32,),
    }
    generator = Generator.from_torch(tensors, published)
    jax.tree.map(np.testing.assert_array_equal, generator.params, params)
    assert generator.logits(np.zeros((1, 16), np.int32), [0]).shape == (1, 16, 64)


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_generator_has_these_names_shapes_and_this_many_parameters(name):
    entry = PUBLISHED[name]
    model = GeneratorModel(**generator_names.model_fields(entry["config"]))
    assert (model.grid, model.num_classes, model.num_kv_heads) == ((16, 16), 1000, model.num_heads)
    assert model.gamma_init == entry["config"]["alng"]
    params = flatten_dict(generator_names.abstract_params(model))
    assert sum(leaf.size for leaf in params.values()) == entry["parameters"]
    expected = {
        tensor.format(layer): tuple(shape)
        for tensor, shape in entry["tensors"].items()
        for layer in range(entry["config"]["n_layer"] if "{}" in tensor else 1)
    }
    ours = generator_names.published_shapes(model)
    assert {f"transformer.{tensor}": shape for tensor, shape in ours.items()} == expected


def test_names_with_and_without_the_prefix_do_not_mix(state_dict, published):
    mixed = as_published(state_dict) | {"head.weight": state_dict["head.weight"] * 0}
    with pytest.raises(UsageError, match=r"head\.weight is unknown"):
        Generator.from_torch(mixed, published)
    del mixed["transformer.head.weight"]
    with pytest.raises(UsageError, match=r"transformer\.head\.weight is missing"):
        Generator.from_torch(mixed, published)
