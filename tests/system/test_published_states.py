"""Training states of the sizes of every published file, in every way of freezing parts; only shapes are computed."""

import itertools
import json
import math

import flax.linen as nn
import jax
import numpy as np
import pytest
from support import released
from support.small_runs import ROOT

from ibq_jax.autoregressive.step import GeneratorTrainer
from ibq_jax.autoregressive.token_sizes import load_preset
from ibq_jax.base.config import load_config
from ibq_jax.base.errors import UsageError
from ibq_jax.base.sharding import make_mesh
from ibq_jax.interop import generator_names, tokenizer_names
from ibq_jax.tokenizer.check import check_config
from ibq_jax.tokenizer.parts import PARTS
from ibq_jax.tokenizer.step import TokenizerTrainer

TOKENIZERS = json.loads((released.GOLDEN / "published_tokenizers.json").read_text())
GENERATORS = json.loads((released.GOLDEN / "published_generators.json").read_text())
PRESETS = {
    "IBQ-Tokenizer-1024": "imagenet256_1024",
    "IBQ-Tokenizer-8192": "imagenet256_8192",
    "IBQ-Tokenizer-16384": "imagenet256_16384",
    "IBQ-Tokenizer-262144": "imagenet256_262144",
    "IBQ-Tokenizer-16384-Pretrain": "pretrain256_16384",
    "IBQ-Tokenizer-262144-Pretrain": "pretrain256_262144",
    "Emu3.5-VisionTokenizer": "emu35_131072",
}
FROZEN = [names for count in range(len(PARTS)) for names in itertools.combinations(PARTS, count)]
PUBLISHED_PARTS = {
    "encoder": ("encoder.", "quant_conv."),
    "codebook": ("quantize.",),
    "decoder": ("decoder.", "post_quant_conv."),
}
NOT_IN_A_STATE = ("model_ema.decay", "model_ema.num_updates")  # settings of the averages


def tensors_of(name: str) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of a published tokenizer's tensors."""
    if name in TOKENIZERS["others"]:
        return {tensor: tuple(shape) for tensor, shape in TOKENIZERS["others"][name]["tensors"].items()}
    codes = TOKENIZERS["codebook_sizes"][name]
    shapes = TOKENIZERS["tensors"].items()
    return {tensor: tuple(codes if size == "n_embed" else size for size in shape) for tensor, shape in shapes}


def trainer_of(preset: str, frozen: tuple[str, ...]) -> TokenizerTrainer:
    config = load_config(f"{ROOT}/configs/tokenizer.py:{preset}", [f"--config.finetune.freeze={','.join(frozen)}"])
    mesh = make_mesh({}, jax.devices()[:1])
    check_config(config, mesh)
    return TokenizerTrainer(config, mesh, steps_per_epoch=1)


def shapes_of(tree) -> dict:
    return {path: leaf.shape for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def numbers(shapes) -> int:
    return sum(math.prod(shape) for shape in shapes)


def published_shapes(state) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of what a state exports: weights, averages and discriminator, under published names."""
    discriminator = {"params": state.discriminator.params, "batch_stats": state.discriminator.batch_stats}
    exported = jax.eval_shape(
        tokenizer_names.published_tensors, state.params, state.weights("ema"), discriminator=discriminator
    )
    averaged = jax.tree.leaves((state.params, state.weights("ema"), discriminator, discriminator["params"]))
    assert len(exported) == len(averaged)  # no two have one name
    return {name: leaf.shape for name, leaf in exported.items()}


@pytest.mark.parametrize("name", PRESETS)
def test_a_tokenizers_state_keeps_memory_of_what_is_trained_only(name):
    assert set(PRESETS) == {*TOKENIZERS["codebook_sizes"], *TOKENIZERS["others"]}
    published, whole = tensors_of(name), trainer_of(PRESETS[name], ())
    traced = nn.meta.unbox(jax.eval_shape(whole.create_state, 0))
    for frozen in FROZEN:
        trainer = trainer_of(PRESETS[name], frozen)
        state = nn.meta.unbox(jax.eval_shape(trainer.first_state, traced.params, traced.discriminator))
        if not frozen:
            assert jax.tree.structure(state) == jax.tree.structure(traced)

        trained = {module for part in PARTS.keys() - frozen for module in PARTS[part]}
        adam = state.optimizer[0]
        expected = shapes_of({module: state.params[module] for module in trained})
        assert set(state.ema) == set(adam.mu) == set(adam.nu) == trained
        assert shapes_of(state.ema) == shapes_of(adam.mu) == shapes_of(adam.nu) == expected
        assert {leaf.dtype for leaf in jax.tree.leaves((state.params, state.ema, adam.mu, adam.nu))} == {
            np.dtype(np.float32)
        }

        ours, parts = published_shapes(state), [PUBLISHED_PARTS[part] for part in PARTS.keys() - frozen]
        assert {tensor: ours.get(tensor) for tensor in published.keys() - NOT_IN_A_STATE} == {
            tensor: shape for tensor, shape in published.items() if tensor not in NOT_IN_A_STATE
        }
        assert not [
            tensor for tensor in ours.keys() - published.keys() if not tensor.startswith(("loss.", "model_ema."))
        ]
        of_parts = [shape for tensor, shape in published.items() if tensor.startswith(tuple(itertools.chain(*parts)))]
        assert numbers(expected.values()) == numbers(of_parts)


def test_all_parts_are_not_frozen_at_once():
    with pytest.raises(UsageError, match="leaves nothing to train"):
        trainer_of("imagenet256_1024", tuple(PARTS))


@pytest.mark.parametrize("name", GENERATORS)
def test_a_generators_state_has_a_place_for_every_tensor(name):
    config = load_preset(f"{ROOT}/configs/autoregressive.py:imagenet256_{name.removeprefix('IBQ-AR-')}")
    trainer = GeneratorTrainer(config, make_mesh({}, jax.devices()[:1]), steps_per_epoch=1)
    state = nn.meta.unbox(jax.eval_shape(trainer.create_state, 0))
    layers, published = config.model.num_layers, {}
    for tensor, shape in GENERATORS[name]["tensors"].items():
        published |= {tensor.format(layer): tuple(shape) for layer in range(layers if "{}" in tensor else 1)}
    exported = jax.eval_shape(generator_names.published_tensors, state.params)
    assert {tensor: leaf.shape for tensor, leaf in exported.items()} == published
    assert numbers(published.values()) == GENERATORS[name]["parameters"]
    moments = [part for part in jax.tree.leaves(state.optimizer, is_leaf=has_moments) if has_moments(part)]
    assert len(moments) == 1
    kept = [moments[0].mu, moments[0].nu, *([] if state.ema is None else [state.ema])]
    assert all(shapes_of(tree) == shapes_of(state.params) for tree in kept)
    assert (state.ema is None) == (config.optimizer.ema_decay == 0)


def has_moments(part) -> bool:
    return hasattr(part, "mu")
