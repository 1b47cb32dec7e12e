"""Times the quantizer's forward and backward pass in several forms, and prints a table in markdown.

    python tests/benchmarks/index_backprop.py --codebook-size 16384 262144

Forms: the formulas written down in PyTorch, as the released code has them (where torch is installed), the same in JAX
("dense"), streamed, and streamed over 8 simulated devices, 2 for tokens and 4 for codes. They take turns, and a cell is
the median of their repeats, so that a machine that slows down slows all of them. The yardstick is eight times one
streamed product z E^T over the same blocks. Temporaries are a device's, by XLA's memory analysis.
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
from ibq_jax.ops import index_backprop

MIB = 2**20
DEVICES = 8
COLUMNS = (
    *("codes", "torch", "dense", "streamed", "on 8 devices", "torch / streamed", "dense / streamed"),
    *("streamed / 8 products", "dense temp.", "streamed temp.", "temp. of 1 in 8"),
)


def training_step(cotangent: jax.Array, **arguments) -> Callable:
    """Gradients of a loss through all three differentiable outputs."""

    def loss(z, codebook):
        out = index_backprop(z, codebook, **arguments)
        return (out.z_q * cotangent).sum() + 0.05 * (out.sample_entropy - out.avg_entropy)

    return jax.value_and_grad(loss, argnums=(0, 1))


def streamed_product(block_size: int) -> Callable:
    """Every logit is computed, and one code of a block is kept."""

    def run(z, codebook):
        def step(total, rows):
            return total + jnp.einsum("kd,nd->kn", rows, z)[0], None

        return lax.scan(step, jnp.zeros(len(z)), codebook.reshape(-1, block_size, codebook.shape[1]))[0]

    return run


def torch_step(z: np.ndarray, codebook: np.ndarray, cotangent: np.ndarray) -> Callable:
    """The same loss and gradients in PyTorch, by arrays of [tokens, codes]."""
    import torch

    z, codebook = (torch.from_numpy(array).requires_grad_() for array in (z, codebook))
    cotangent = torch.from_numpy(cotangent)

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


def measure(codes: int, tokens: int, width: int, block_size: int, repeats: int) -> tuple[str, ...]:
    """One row of the table."""
    keys = jax.random.split(jax.random.key(0), 3)
    z, cotangent = jax.random.normal(keys[0], (tokens, width)), jax.random.normal(keys[1], (tokens, width))
    codebook, block_size = jax.random.normal(keys[2], (codes, width)), min(block_size, codes)
    mesh = make_mesh({"data": 2, CODEBOOK: DEVICES // 2})
    split = jax.device_put(z, NamedSharding(mesh, P(AXES))), jax.device_put(codebook, NamedSharding(mesh, P(CODEBOOK)))
    forms = {
        "product": (streamed_product(block_size), (z, codebook)),
        "streamed": (training_step(cotangent, block_size=block_size), (z, codebook)),
        "dense": (training_step(cotangent, implementation="dense"), (z, codebook)),
        "split": (training_step(np.asarray(cotangent), mesh=mesh), split),
    }
    compiled = {name: jax.jit(form).lower(*arrays).compile() for name, (form, arrays) in forms.items()}
    runs = {name: lambda name=name: jax.block_until_ready(compiled[name](*forms[name][1])) for name in forms}
    if importlib.util.find_spec("torch"):
        runs["torch"] = torch_step(*(np.array(array) for array in (z, codebook, cotangent)))
    seconds = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(repeats):
        runs["streamed"]()  # meanwhile the dense forms' gigabytes are freed
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    temporaries = {name: run.memory_analysis().temp_size_in_bytes / MIB for name, run in compiled.items()}
    torch_seconds = median.get("torch", float("nan"))
    return (
        f"{codes:,}",
        *(f"{median.get(name, float('nan')):.3g} s" for name in ("torch", "dense", "streamed", "split")),
        f"{torch_seconds / median['streamed']:.1f}",
        f"{median['dense'] / median['streamed']:.1f}",
        f"{median['streamed'] / (8 * median['product']):.2f}",
        *(f"{temporaries[name]:,.0f} MiB" for name in ("dense", "streamed", "split")),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--codebook-size", type=int, nargs="+", default=[2**i for i in range(10, 19, 2)])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--width", type=int, default=256, help="dimensions of a code")
    parser.add_argument("--block-size", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", DEVICES)
    device = jax.devices()[0]
    print(
        f"{arguments.tokens} tokens of {arguments.width} dimensions, float32, blocks of {arguments.block_size} codes,"
    )
    print(f"medians of {arguments.repeats}; {device.device_kind} device, {os.cpu_count()} cores\n")
    print("| " + " | ".join(COLUMNS) + " |")
    print("|" + "---|" * len(COLUMNS))
    for codes in arguments.codebook_size:
        row = measure(codes, arguments.tokens, arguments.width, arguments.block_size, arguments.repeats)
        print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
