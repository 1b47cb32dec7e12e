"""Every program of both stages compiles for GPUs, and launches what tests/golden/gpu_kernels_*.json say.

A change that costs a GPU something is seen here: another convolution, product, transpose or copy a step. The golden
files are this project's own: `pytest --update-golden` in .venv-compilers rewrites them, and the diff says what changed.
"""

import functools
import json
import os
from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest
from support.compilers import needs_gpu_compiler
from support.compiling import FEW_OPTIMIZATIONS, optimize
from support.small_runs import ROOT, SMALL

from ibq_jax.autoregressive import step as autoregressive
from ibq_jax.autoregressive.sample_codes import sampling_program
from ibq_jax.base.config import load_config
from ibq_jax.base.sharding import abstract_everywhere, batch_sharding, make_mesh, replicated
from ibq_jax.data.preprocess import to_uint8
from ibq_jax.evaluate.feature_nets import LPIPS_NETS, features_of
from ibq_jax.evaluate.protocols import PROTOCOLS
from ibq_jax.plan.compiled import compile_plan
from ibq_jax.plan.gpus import gpu_devices
from ibq_jax.plan.hlo import Module
from ibq_jax.plan.kernels import (
    ATTENTIONS,
    CONVOLUTIONS,
    COPIES,
    CUBLAS_PRODUCTS,
    TRANSPOSES,
    TRITON_PRODUCTS,
    by_kind,
    read_kernels,
)
from ibq_jax.pretrained import efficientnet, lpips
from ibq_jax.pretrained.inception import Inception
from ibq_jax.tokenizer import step as tokenizer
from ibq_jax.tokenizer.tokenize import encoding_program

pytestmark = pytest.mark.slow
MESHES = ({"data": 8}, {"data": 2, "codebook": 4}, {"data": 2, "fsdp": 2, "codebook": 2})
DTYPES = "bfloat16", "float32"
# GPUs train in bfloat16; the three steps of float32 take the compiler as long again.
TRAINED_DTYPES = "bfloat16", pytest.param("float32", marks=pytest.mark.long)
COUNTED = CONVOLUTIONS, ATTENTIONS, CUBLAS_PRODUCTS, TRITON_PRODUCTS, TRANSPOSES, COPIES
TOKENIZER = (*SMALL, "loss.perceptual_weight=0.0", "quantizer.entropy_group_tokens=0")
GENERATOR = (
    "data.batch_size=8",
    "model.vocab_size=64",
    "model.grid=(4, 4)",
    "model.num_classes=5",
    "model.num_layers=2",
    "model.num_heads=2",
    "model.num_kv_heads=2",
    "model.embed_dim=32",
    "model.remat=dots",
    "sample.cfg_scale=2.0",
)


@pytest.fixture(autouse=True)
def few_optimizations():
    """Compiles with few of LLVM's optimizations, which saves a sixth of the time; they change no kernel's kind."""
    optimize(fully=False)
    yield
    optimize(fully=os.environ[FEW_OPTIMIZATIONS] == "0")


def trainer(stage: str, mesh: jax.sharding.Mesh, *fields: str):
    file, make, small = {
        "tokenizer": ("tokenizer", tokenizer.TokenizerTrainer, TOKENIZER),
        "generator": ("autoregressive", autoregressive.GeneratorTrainer, GENERATOR),
    }[stage]
    config = load_config(f"{ROOT}/configs/{file}.py:openmoji32", [f"--config.{field}" for field in (*small, *fields)])
    return make(config, mesh, steps_per_epoch=1)


def decoding_program(made: tokenizer.TokenizerTrainer) -> tuple[Callable, tuple]:
    """Returns what `sample` compiles to turn codes into images, and its abstract arguments."""
    mesh, model = made.mesh, made.model.clone(mesh=None)
    params = abstract_everywhere(lambda: made.create_state(0).params, mesh)
    codes = jax.ShapeDtypeStruct((8, 8, 8), jnp.int32, sharding=batch_sharding(mesh))

    def decode(params, codes):
        return to_uint8(model.apply({"params": params}, codes, method="decode"))

    return jax.jit(decode, out_shardings=batch_sharding(mesh)), (params, codes)


def evaluation_program(mesh: jax.sharding.Mesh) -> tuple[Callable, tuple]:
    """Returns the frozen networks of evaluation on one batch, and the abstract arguments."""
    protocol = PROTOCOLS["clean"]
    variables = jax.eval_shape(Inception().init, jax.random.key(0), jnp.zeros((1, 299, 299, 3)))
    weights = {"inception": variables, "efficientnet": efficientnet.weight_shapes()}
    weights |= {net: lpips.weight_shapes(net) for net in LPIPS_NETS}
    images = jax.ShapeDtypeStruct((8, 64, 64, 3), jnp.float32, sharding=batch_sharding(mesh))

    def measure(weights, images, reconstructions):
        distances = {net: lpips.lpips(weights[net], images, reconstructions, net=net) for net in LPIPS_NETS}
        return distances, features_of(weights, images, protocol)

    placed = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated(mesh)), weights)
    return jax.jit(measure), (placed, images, images)


def training_program(stage: str, made) -> tuple[Callable, tuple]:
    module = tokenizer if stage == "tokenizer" else autoregressive
    return module.jit_train_step(made), module.abstract_arguments(made)


def counts(step: Callable, arguments: tuple) -> dict[str, int]:
    return counted(by_kind(read_kernels(Module(step.lower(*arguments).compile().as_text()))))


def counted(kinds: dict[str, tuple[int, float]]) -> dict[str, int]:
    return {kind: kinds[kind][0] for kind in COUNTED if kind in kinds}


@functools.cache
def devices() -> list:
    return gpu_devices("h100:8")[1]


@needs_gpu_compiler
@pytest.mark.parametrize("dtype", TRAINED_DTYPES)
@pytest.mark.parametrize("stage", ["tokenizer", "generator"])
def test_a_training_step_launches_what_it_did(stage, dtype, check_golden):
    found = {}
    for sizes in MESHES:
        made = trainer(stage, make_mesh(sizes, devices()), f"dtype={dtype}")
        name = ", ".join(f"{axis} {size}" for axis, size in sizes.items())
        found[name] = counts(*training_program(stage, made))
        assert found[name][TRITON_PRODUCTS] and (stage == "generator" or found[name][CONVOLUTIONS] > 50)
        assert (ATTENTIONS in found[name]) == (stage == "generator" and dtype == "bfloat16")
    check_golden(f"gpu_kernels_{stage}_{dtype}.json", json.dumps(found, indent=1) + "\n")


@needs_gpu_compiler
@pytest.mark.parametrize("dtype", DTYPES)
def test_encoding_decoding_and_sampling_launch_what_they_did(dtype, check_golden):
    mesh, precision = make_mesh({"data": 8}, devices()), f"encode.precision={dtype}"
    codec = trainer("tokenizer", mesh, f"dtype={dtype}", precision)
    found = {
        "encode": counts(*encoding_program(codec)),
        "decode": counts(*decoding_program(codec)),
        "sample": counts(*sampling_program(trainer("generator", mesh, f"dtype={dtype}"))),
    }
    assert found["encode"][CONVOLUTIONS] and found["decode"][CONVOLUTIONS]
    assert found["sample"][TRITON_PRODUCTS] >= 16 * 2 * 4  # of each of 16 codes, in each of two layers
    check_golden(f"gpu_kernels_inference_{dtype}.json", json.dumps(found, indent=1) + "\n")


@needs_gpu_compiler
def test_the_networks_of_evaluation_launch_what_they_did(check_golden):
    mesh = make_mesh({"data": 8}, devices())
    plan = compile_plan(*evaluation_program(mesh), mesh, None)  # which knows what to do where XLA finds no tiles
    found = counted(by_kind(plan.kernels))
    assert found[CONVOLUTIONS] >= 94 + 2 * (13 + 5)  # Inception's, and those of VGG16 and AlexNet for two images
    check_golden("gpu_kernels_evaluation.json", json.dumps(found, indent=1) + "\n")
