"""Times the quantizer's forward and backward pass in several forms, and prints a table in markdown.

    python tests/benchmarks/index_backprop.py --codebook-size 16384 262144
    python tests/benchmarks/index_backprop.py --devices 8
    python tests/benchmarks/index_backprop.py --codebook-size 131072 --value-width 1024

Forms: the formulas written down in PyTorch, as the released code has them (where torch is installed), the same in JAX
("dense"), and streamed. They take turns, and a cell is the median of their repeats, so that a machine that slows down
slows all of them. The yardstick is eight times one streamed product z E^T over the same blocks. With --devices, the
streamed form alone, on so many simulated devices, 2 for tokens and the others for codes. Temporaries are a device's, by
XLA's memory analysis. With --value-width, `soft_lookup` with values of that width is timed, streamed and dense; the
yardstick is its seven products: five over the keys, two over the values.
"""

import argparse
import importlib.util
import os
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ibq_jax.base.sharding import AXES, CODEBOOK, make_mesh
from ibq_jax.ops import index_backprop, soft_lookup

MIB = 2**20
COLUMNS = (
    *("codes", "torch", "dense", "streamed", "torch / streamed", "dense / streamed", "streamed / 8 products"),
    *("dense temp.", "streamed temp."),
)
LOOKUP_COLUMNS = (
    *("codes", "dense", "streamed", "dense / streamed", "streamed / 7 products", "dense temp.", "streamed temp."),
)
SPLIT_COLUMNS = ("codes", "streamed", "temp. of a device")


def training_step(cotangent: jax.Array, **arguments) -> Callable:
    """Gradients of a loss through all three differentiable outputs."""

    def loss(z, codebook):
        out = index_backprop(z, codebook, **arguments)
        return (out.z_q * cotangent).sum() + 0.05 * (out.sample_entropy - out.batch_entropy)

    return jax.value_and_grad(loss, argnums=(0, 1))


def streamed_product(block_size: int) -> Callable:
    """Every logit is computed, and one code of a block is kept."""

    def run(z, codebook):
        def step(total, rows):
            return total + jnp.einsum("kd,nd->kn", rows, z)[0], None

        return lax.scan(step, jnp.zeros(len(z)), codebook.reshape(-1, block_size, codebook.shape[1]))[0]

    return run


def torch_step(z: np.ndarray, codebook: np.ndarray, cotangent: np.ndarray, device: str = "cpu") -> Callable:
    """The same loss and gradients in PyTorch, by arrays of [tokens, codes]."""
    import torch

    z, codebook = (torch.from_numpy(array).to(device).requires_grad_() for array in (z, codebook))
    cotangent = torch.from_numpy(cotangent).to(device)

    def run():
        z.grad = codebook.grad = None
        logits = z @ codebook.T
        soft = torch.softmax(logits, dim=1)
        hard = torch.zeros_like(soft).scatter_(1, logits.argmax(dim=1, keepdim=True), 1.0)
        z_q = (hard - soft.detach() + soft) @ codebook
        q, log_q = torch.softmax(logits / 0.01, dim=1), torch.log_softmax(logits / 0.01, dim=1)
        mean = q.mean(dim=0)
        entropies = -(q * log_q).sum(dim=1).mean() + (mean * torch.log(mean + 1e-5)).sum()
        ((z_q * cotangent).sum() + 0.05 * entropies).backward()

    return run


def inputs(codes: int, tokens: int, width: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """z, codebook, and a cotangent for z_q."""
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (tokens, width), (codes, width), (tokens, width)
    return tuple(jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))


def medians(runs: dict[str, Callable], repeats: int) -> dict[str, float]:
    """Seconds of each, in turns."""
    seconds = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(repeats):
        runs["streamed"]()  # meanwhile the dense forms' gigabytes are freed
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def temporaries(compiled) -> str:
    return f"{compiled.memory_analysis().temp_size_in_bytes / MIB:,.0f} MiB"


def measure(codes: int, tokens: int, width: int, block_size: int, repeats: int) -> tuple[str, ...]:
    """One row of the table."""
    z, codebook, cotangent = inputs(codes, tokens, width)
    block_size = min(block_size, codes)
    forms = {
        "product": streamed_product(block_size),
        "streamed": training_step(cotangent, block_size=block_size),
        "dense": training_step(cotangent, implementation="dense"),
    }
    compiled = {name: jax.jit(form).lower(z, codebook).compile() for name, form in forms.items()}
    runs = {name: lambda run=run: jax.block_until_ready(run(z, codebook)) for name, run in compiled.items()}
    if importlib.util.find_spec("torch"):
        runs["torch"] = torch_step(*(np.array(array) for array in (z, codebook, cotangent)))
    median = {"torch": float("nan")} | medians(runs, repeats)
    return (
        f"{codes:,}",
        *(f"{median[name]:.3g} s" for name in ("torch", "dense", "streamed")),
        *(f"{median[name] / median['streamed']:.1f}" for name in ("torch", "dense")),
        f"{median['streamed'] / (8 * median['product']):.2f}",
        *(temporaries(compiled[name]) for name in ("dense", "streamed")),
    )


def lookup_step(cotangent: jax.Array, **arguments) -> Callable:
    """Gradients of a loss through the values and both entropies, in z, keys and values."""

    def loss(z, keys, values):
        out = soft_lookup(z, keys, values, **arguments)
        return (out.value * cotangent).sum() + 0.05 * (out.sample_entropy - out.batch_entropy)

    return jax.value_and_grad(loss, argnums=(0, 1, 2))


def measure_lookup(codes: int, tokens: int, width: int, value_width: int, block_size: int, repeats: int):
    """One row of the table for `soft_lookup`."""
    z, keys, _ = inputs(codes, tokens, width)
    cotangent, values, _ = inputs(codes, tokens, value_width)
    block_size = min(block_size, codes)
    of_values, arrays = streamed_product(block_size), (z, keys, values)
    forms = {
        "product": (streamed_product(block_size), (z, keys)),
        "product of values": (of_values, (cotangent, values)),
        "streamed": (lookup_step(cotangent, block_size=block_size), arrays),
        "dense": (lookup_step(cotangent, implementation="dense"), arrays),
    }
    compiled = {name: jax.jit(form).lower(*given).compile() for name, (form, given) in forms.items()}
    runs = {name: lambda name=name: jax.block_until_ready(compiled[name](*forms[name][1])) for name in forms}
    median = medians(runs, repeats)
    floor = 5 * median["product"] + 2 * median["product of values"]
    return (
        f"{codes:,}",
        *(f"{median[name]:.3g} s" for name in ("dense", "streamed")),
        f"{median['dense'] / median['streamed']:.1f}",
        f"{median['streamed'] / floor:.2f}",
        *(temporaries(compiled[name]) for name in ("dense", "streamed")),
    )


def measure_split(codes: int, tokens: int, width: int, devices: int, repeats: int) -> tuple[str, ...]:
    """One row of the table for many devices."""
    z, codebook, cotangent = inputs(codes, tokens, width)
    mesh = make_mesh({"data": 2, CODEBOOK: devices // 2})
    z = jax.device_put(z, NamedSharding(mesh, P(AXES)))
    codebook = jax.device_put(codebook, NamedSharding(mesh, P(CODEBOOK)))
    run = jax.jit(training_step(np.asarray(cotangent), mesh=mesh)).lower(z, codebook).compile()
    seconds = medians({"streamed": lambda: jax.block_until_ready(run(z, codebook))}, repeats)["streamed"]
    return f"{codes:,}", f"{seconds:.3g} s", temporaries(run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--codebook-size", type=int, nargs="+", default=[2**i for i in range(10, 19, 2)])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--width", type=int, default=256, help="dimensions of a code")
    parser.add_argument("--value-width", type=int, default=0, help="dimensions of a value; 0: the codes themselves")
    parser.add_argument("--block-size", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--devices", type=int, default=1)
    arguments = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", arguments.devices)
    tokens, width, repeats = arguments.tokens, arguments.width, arguments.repeats
    print(f"{tokens} tokens of {width} dimensions, float32; medians of {repeats};")
    print(f"{arguments.devices} {jax.devices()[0].device_kind} device(s), {os.cpu_count()} cores\n")
    value_width = arguments.value_width
    columns = LOOKUP_COLUMNS if value_width else COLUMNS if arguments.devices == 1 else SPLIT_COLUMNS
    print("| " + " | ".join(columns) + " |")
    print("|" + "---|" * len(columns))
    for codes in arguments.codebook_size:
        if value_width:
            row = measure_lookup(codes, tokens, width, value_width, arguments.block_size, repeats)
        elif arguments.devices == 1:
            row = measure(codes, tokens, width, arguments.block_size, repeats)
        else:
            row = measure_split(codes, tokens, width, arguments.devices, repeats)
        print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
