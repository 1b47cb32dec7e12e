"""Times sampling from the generator of size B against PyTorch and against the memory, and prints tables in markdown.

    python tests/benchmarks/sampling.py --images 1 4
    python tests/benchmarks/sampling.py --check

Random weights, the head's included; float32, temperature 1.1, guidance 2.25, and 1, where no row without a class is
computed. Ours draws whole pictures, a device's program being as wide as `--images`; PyTorch (`torch_generator.py`)
draws the first `--codes` of each picture, and since it attends to the whole cache at every step, a picture takes that
many times longer. They take turns. The floor is a step that only reads every weight once, which a jitted sum over the
same arrays times. A step's parts are timed alone: the products as the program has them, its attention with the whole
cache, and the rest is what is left of a step.
"""

import argparse
import functools
import itertools
import os
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax import lax
from torch_generator import torch_generator

from ibq_jax.api import Generator
from ibq_jax.autoregressive import generate as decode
from ibq_jax.autoregressive.layers import rotary_angles
from ibq_jax.autoregressive.model import GeneratorModel
from ibq_jax.autoregressive.sample_codes import Guidance, Sampler
from ibq_jax.base.sharding import make_mesh
from ibq_jax.interop.generator_names import abstract_params

SIZE_B = GeneratorModel(
    vocab_size=16_384,
    grid=(16, 16),
    num_classes=1000,
    num_layers=16,
    num_heads=16,
    num_kv_heads=16,
    embed_dim=1024,
    gamma_init=1e-3,
)
TINY = GeneratorModel(
    vocab_size=64, grid=(4, 4), num_classes=5, num_layers=3, num_heads=4, num_kv_heads=2, embed_dim=64, gamma_init=1.0
)
GUIDANCE, TEMPERATURE = 2.25, 1.1
PART_STEPS = 16  # steps of a timed part
COLUMNS = (
    *("images", "guidance", "ours, codes/s", "PyTorch, codes/s", "ours / PyTorch", "ours, ms a step"),
    *("products", "attention", "rest", "floor", "step / floor", "compile, s"),
)


def random_params(model: GeneratorModel, deviation: float = 0.02) -> dict:
    """All of them normal, norms' scales among them."""
    rng = np.random.default_rng(0)
    shapes = abstract_params(model)
    return jax.tree.map(lambda leaf: jnp.asarray(deviation * rng.standard_normal(leaf.shape, np.float32)), shapes)


def check() -> None:
    """Raises AssertionError unless both write down the same model."""
    generator = Generator(TINY, random_params(TINY, deviation=0.1))
    module = torch_generator(TINY, generator.to_torch())
    labels = np.arange(4)
    codes = np.random.default_rng(0).integers(0, TINY.vocabulary, (4, TINY.positions))
    ours = np.asarray(generator.logits(codes, labels))
    theirs = module(torch.from_numpy(codes), torch.from_numpy(labels)).detach().numpy()
    difference = np.abs(ours - theirs).max()
    print(f"tiny size: logits up to {np.abs(ours).max():.3f} differ by up to {difference:.1e}")
    assert difference < 1e-5
    for scale in 1.0, GUIDANCE:
        ours = np.asarray(generator.sample(labels, scale, temperature=0)).reshape(4, -1)
        theirs = module.sample(torch.from_numpy(labels), scale, temperature=0).numpy().reshape(4, -1)
        assert np.array_equal(ours, theirs), f"the likeliest codes differ at guidance {scale}"
    print("tiny size: the likeliest codes are equal, with and without guidance")


def products(weights: decode.StepWeights, x: jax.Array) -> jax.Array:
    """Every product of a step, each with an input that needs the one before; x [C, R]."""

    def product(matrix, x):
        out = lax.optimization_barrier(jnp.einsum("oi,ir->or", matrix, lax.optimization_barrier(x)))
        return 1e-3 * out

    def step(x, _):
        for layer in weights.layers:
            x = x + product(layer.wo, product(layer.wqkv, x)[: len(x)])
            x = x + product(layer.w2, product(layer.w1, x) + product(layer.w3, x))
        return x + product(weights.head, x)[: len(x)], None

    return lax.scan(step, x, length=PART_STEPS)[0]


def attention(model: GeneratorModel, qkv: jax.Array) -> jax.Array:
    """The program's attention of all layers, over the picture's last positions; qkv [(H + 2 G) D, R]."""
    shape = qkv.shape[1], model.num_kv_heads, model.positions, model.head_channels
    caches = tuple((jnp.zeros(shape), jnp.zeros(shape)) for _ in range(model.num_layers))
    cos, sin = rotary_angles(model.grid, model.head_channels)

    def step(carry, position):
        qkv, caches = carry
        turn = cos[position][None, None], sin[position][None, None]
        moved = []
        for cache in caches:
            out, cache = decode._attend(model, qkv, cache, position, turn)
            qkv = qkv + 1e-3 * jnp.tile(out, (len(qkv) // len(out), 1))
            moved.append(cache)
        return (qkv, tuple(moved)), None

    return lax.scan(step, (qkv, caches), model.positions - PART_STEPS + jnp.arange(PART_STEPS))[0][0]


def read(arrays: list[jax.Array]) -> jax.Array:
    return sum(jnp.sum(array) for array in arrays)


def seconds_in_turns(functions: dict[str, Callable], repeats: int) -> dict[str, list[float]]:
    """Seconds of each repeat of each; the first run of all is not counted."""
    for function in functions.values():
        jax.block_until_ready(function())
    seconds = {name: [] for name in functions}
    for _, (name, function) in itertools.product(range(repeats), functions.items()):
        start = time.perf_counter()
        jax.block_until_ready(function())
        seconds[name].append(time.perf_counter() - start)
    return seconds


def measure(params: dict, module: torch.nn.Module, images: int, scale: float, codes: int, repeats: int, pick: Callable):
    """One row of the table."""
    model, labels = SIZE_B, np.arange(images)
    sampler = Sampler(model, params, make_mesh({"data": 1}, jax.devices()[:1]), per_device_batch=images)

    def ours():
        return sampler(
            labels, guidance=Guidance(scale), logit_filter=decode.LogitFilter(), temperature=TEMPERATURE, seed=0
        )

    def theirs():
        return module.sample(torch.from_numpy(labels), scale, TEMPERATURE, length=codes)

    start = time.perf_counter()
    ours()
    first = time.perf_counter() - start
    module.sample(torch.from_numpy(labels), scale, TEMPERATURE, length=2)
    seconds = {"ours": [], "torch": []}
    for _, (name, run) in itertools.product(range(repeats), (("ours", ours), ("torch", theirs))):
        start = time.perf_counter()
        run()
        seconds[name].append(time.perf_counter() - start)
    ours_step, theirs_step = pick(seconds["ours"]) / model.positions, pick(seconds["torch"]) / codes
    rows = images * (1 + (scale != 1))
    weights = jax.jit(decode.step_weights, static_argnums=0)(model, params)
    qkv = jnp.ones(((model.num_heads + 2 * model.num_kv_heads) * model.head_channels, rows))
    run_products, run_read = jax.jit(products), jax.jit(read)
    run_attention = jax.jit(functools.partial(attention, model))
    parts = {
        "products": lambda: run_products(weights, jnp.ones((model.embed_dim, rows))),
        "attention": lambda: run_attention(qkv),
        "floor": lambda: run_read(jax.tree.leaves(weights)),
    }
    part = {name: pick(times) for name, times in seconds_in_turns(parts, 2 * repeats + 1).items()}
    multiply, attend = part["products"] / PART_STEPS, part["attention"] / PART_STEPS
    return (
        *(str(images), f"{scale:g}", f"{images / ours_step:.1f}", f"{images / theirs_step:.1f}"),
        f"{theirs_step / ours_step:.2f}",
        *(f"{1e3 * t:.1f}" for t in (ours_step, multiply, attend, ours_step - multiply - attend, part["floor"])),
        *(f"{ours_step / part['floor']:.2f}", f"{first - statistics.median(seconds['ours']):.1f}"),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare with PyTorch on a tiny size, and no more")
    parser.add_argument("--images", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--guidance", type=float, nargs="+", default=[GUIDANCE, 1.0])
    parser.add_argument("--codes", type=int, default=SIZE_B.positions, help="of a picture that PyTorch draws")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--fastest", action="store_true", help="minima of the repeats instead of medians")
    parser.add_argument("--torch-threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    check()
    if arguments.check:
        return
    torch.set_num_threads(arguments.torch_threads)
    params = random_params(SIZE_B)
    module = torch_generator(SIZE_B, Generator(SIZE_B, params).to_torch())
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(f"{size:,} parameters, float32; {'minima' if arguments.fastest else 'medians'} of {arguments.repeats};")
    print(f"PyTorch draws {arguments.codes} of {SIZE_B.positions} codes with {torch.get_num_threads()} threads;")
    print(f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, load before: {os.getloadavg()[0]:.1f}\n")
    print("| " + " | ".join(COLUMNS) + " |")
    print("|" + "---|" * len(COLUMNS))
    pick = min if arguments.fastest else statistics.median
    for images, scale in itertools.product(arguments.images, arguments.guidance):
        row = measure(params, module, images, scale, arguments.codes, arguments.repeats, pick)
        print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
