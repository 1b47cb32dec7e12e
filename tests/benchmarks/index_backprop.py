"""Times the quantizer's forward and backward pass, dense against streamed, and prints a table in markdown.

    python tests/benchmarks/index_backprop.py --codebook-size 16384 262144

The forms take turns, and a cell is the median of their repeats, so that a machine that slows down slows all of them.
The yardstick is eight times one streamed product z E^T over the same blocks.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from ibq_jax.ops import index_backprop

MIB = 2**20
COLUMNS = ("codes", "dense", "streamed", "dense / streamed", "streamed / 8 products", "dense temp.", "streamed temp.")


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


def measure(codes: int, tokens: int, width: int, block_size: int, repeats: int) -> tuple[str, ...]:
    """One row of the table."""
    keys = jax.random.split(jax.random.key(0), 3)
    z, cotangent = jax.random.normal(keys[0], (tokens, width)), jax.random.normal(keys[1], (tokens, width))
    codebook = jax.random.normal(keys[2], (codes, width))
    forms = {
        "product": streamed_product(block_size),
        "streamed": training_step(cotangent, block_size=block_size),
        "dense": training_step(cotangent, implementation="dense"),
    }
    compiled = {name: jax.jit(form).lower(z, codebook).compile() for name, form in forms.items()}
    seconds = {name: [] for name in compiled}
    for run in compiled.values():
        jax.block_until_ready(run(z, codebook))
    for _ in range(repeats):
        jax.block_until_ready(compiled["streamed"](z, codebook))  # meanwhile the dense form's gigabytes are freed
        for name, run in compiled.items():
            start = time.perf_counter()
            jax.block_until_ready(run(z, codebook))
            seconds[name].append(time.perf_counter() - start)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    temporaries = {name: run.memory_analysis().temp_size_in_bytes / MIB for name, run in compiled.items()}
    return (
        str(codes),
        f"{median['dense']:.2f} s",
        f"{median['streamed']:.2f} s",
        f"{median['dense'] / median['streamed']:.2f}",
        f"{median['streamed'] / (8 * median['product']):.2f}",
        f"{temporaries['dense']:.0f} MiB",
        f"{temporaries['streamed']:.0f} MiB",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--codebook-size", type=int, nargs="+", default=[16384, 262144])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--width", type=int, default=256, help="dimensions of a code")
    parser.add_argument("--block-size", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
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
