"""Times the loss of a large vocabulary and its gradients in several forms, and prints a table in markdown.

    python tests/benchmarks/cross_entropy.py --vocabulary 16384 262144
    python tests/benchmarks/cross_entropy.py --tokens 8192 --block-size 512

Forms of the mean loss: the formula with all logits, differentiated by JAX ("dense"); the mean of `cross_entropy`
("streamed"), whose floor is four products of tokens, vocabulary and width; and `weighted_cross_entropy` ("weighted"),
with three. They take turns, and a cell is the median of their repeats, so that a machine that slows down slows all of
them. The yardstick is one streamed product x head^T over the same blocks. Temporaries are by XLA's memory analysis.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from ibq_jax.ops import cross_entropy, weighted_cross_entropy

MIB = 2**20
COLUMNS = (
    *("vocabulary", "dense", "streamed", "weighted", "dense / streamed", "dense / weighted"),
    *("streamed / 4 products", "weighted / 3 products", "dense temp.", "streamed temp.", "weighted temp."),
    *("dense / streamed temp.", "dense / weighted temp."),
)


def mean_loss(x: jax.Array, head: jax.Array, targets: jax.Array, **arguments) -> jax.Array:
    return cross_entropy(x, head, targets, **arguments).mean()


def weighted_mean_loss(x: jax.Array, head: jax.Array, targets: jax.Array, **arguments) -> jax.Array:
    return weighted_cross_entropy(x, head, targets, jnp.full(len(x), 1 / len(x)), **arguments)


def streamed_product(x: jax.Array, head: jax.Array, targets: jax.Array, block_size: int) -> jax.Array:
    """Every logit is computed, and one row of a block is kept."""

    def step(total, rows):
        return total + jnp.einsum("vc,nc->vn", rows, x)[0], None

    return lax.scan(step, jnp.zeros(len(x)), head.reshape(-1, block_size, head.shape[1]))[0]


def inputs(vocabulary: int, tokens: int, width: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """x, head, and targets."""
    keys = jax.random.split(jax.random.key(0), 3)
    x, head = jax.random.normal(keys[0], (tokens, width)), jax.random.normal(keys[1], (vocabulary, width))
    return x, head * width**-0.5, jax.random.randint(keys[2], (tokens,), 0, vocabulary)


def medians(runs: dict[str, Callable], repeats: int) -> dict[str, float]:
    """Seconds of each, in turns, after one of each that does not count."""
    seconds = {name: [] for name in runs}
    for _ in range(1 + repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}


def measure(vocabulary: int, tokens: int, width: int, block_size: int, repeats: int) -> tuple[str, ...]:
    """One row of the table."""
    arrays = inputs(vocabulary, tokens, width)
    losses = {
        "dense": partial(mean_loss, implementation="dense"),
        "streamed": partial(mean_loss, block_size=block_size),
        "weighted": partial(weighted_mean_loss, block_size=block_size),
    }
    forms = {name: jax.value_and_grad(loss, argnums=(0, 1)) for name, loss in losses.items()}
    forms["product"] = partial(streamed_product, block_size=min(1024, vocabulary))
    compiled = {name: jax.jit(form).lower(*arrays).compile() for name, form in forms.items()}
    runs = {name: lambda run=run: jax.block_until_ready(run(*arrays)) for name, run in compiled.items()}
    seconds = medians(runs, repeats)
    temporaries = {name: compiled[name].memory_analysis().temp_size_in_bytes for name in losses}
    return (
        f"{vocabulary:,}",
        *(f"{seconds[name]:.3g} s" for name in losses),
        *(f"{seconds['dense'] / seconds[name]:.2f}" for name in ("streamed", "weighted")),
        *(f"{seconds[name] / (n * seconds['product']):.2f}" for name, n in (("streamed", 4), ("weighted", 3))),
        *(f"{size / MIB:,.0f} MiB" for size in temporaries.values()),
        *(f"{temporaries['dense'] / temporaries[name]:.1f}" for name in ("streamed", "weighted")),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[2**14, 2**16, 2**18])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--width", type=int, default=1024, help="dimensions of a hidden state")
    parser.add_argument("--block-size", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    print(f"{arguments.tokens} tokens of {arguments.width} dimensions, float32; medians of {arguments.repeats};")
    print(f"1 {jax.devices()[0].device_kind} device, {os.cpu_count()} cores\n")
    print("| " + " | ".join(COLUMNS) + " |")
    print("|" + "---|" * len(COLUMNS))
    for vocabulary in arguments.vocabulary:
        row = measure(vocabulary, arguments.tokens, arguments.width, arguments.block_size, arguments.repeats)
        print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
