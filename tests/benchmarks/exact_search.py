"""The exact search for codes: is it right, and what does it cost?

    python tests/benchmarks/exact_search.py --check=10000000     right or wrong, on random and adversarial tokens
    python tests/benchmarks/exact_search.py                      time on this machine, and of a plain float32 search
    python tests/benchmarks/exact_search.py --topology=v5e:2x2   time that XLA's compiler for TPUs expects (an estimate)

The last one needs the environment of `VENV=.venv-tpu bash launch/setup.sh tpu`.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding
from tqdm import tqdm

from ibq_jax.ops import nearest_codes
from ibq_jax.ops.block_scan import BlockScan
from ibq_jax.ops.exact_search import FOR_FEW, exact_nearest_codes
from ibq_jax.ops.streamed import streamed_nearest_codes
from ibq_jax.plan.chips import topology_devices
from ibq_jax.plan.clock import read_clock
from ibq_jax.plan.hlo import Module

DIMENSIONS = 256
SIZES = (16_384, 131_072, 262_144)
BLOCK = 1024  # codes, as `nearest_codes` chooses for at least 1,024 tokens of 256 dimensions


def batches(rng: np.random.Generator, tokens: int, codes: int, dimensions: int):
    """Yields (kind, latents, codebook) of random and of adversarial numbers, for ever."""
    while True:
        normal = rng.standard_normal((codes, dimensions), np.float32)
        latents = rng.standard_normal((tokens, dimensions), np.float32)
        yield "random", latents, normal
        yield "latents near codes", normal[rng.integers(0, codes, tokens)] + 0.1 * latents, normal
        pairs = np.repeat(normal[: codes // 2], 2, axis=0)
        column = rng.integers(0, dimensions)
        pairs[1::2, column] = np.nextafter(pairs[1::2, column], np.float32(np.inf))
        yield "rows one unit in the last place apart", latents, pairs
        yield "equal rows", latents, np.tile(normal[: codes // 2], (2, 1))
        yield "rows that bfloat16 cannot tell apart", latents, normal[:1] + 1e-3 * normal
        yield "huge norms", 1e30 * latents, 1e8 * normal
        yield "tiny norms", 1e-30 * latents, 1e-8 * normal
        opposite = np.concatenate([normal[:, ::2], -normal[:, ::2]], axis=1) + 1e-4 * normal
        yield "cancelling terms", np.tile(latents[:, ::2], (1, 2)), opposite


def largest(z: np.ndarray, codebook: np.ndarray) -> np.ndarray:
    """Returns the first code of the largest product; in 80-bit numbers where float64 may not tell."""
    products = z.astype(np.float64) @ codebook.astype(np.float64).T
    codes, top = products.argmax(axis=1), products.max(axis=1)
    lengths = np.linalg.norm(z.astype(np.float64), axis=1) * np.linalg.norm(codebook.astype(np.float64), axis=1).max()
    tokens, near = np.nonzero(products >= (top - 1e-12 * lengths)[:, None])
    shared = np.bincount(tokens, minlength=len(z))[tokens] > 1
    tokens, near = tokens[shared], near[shared]
    if len(tokens):
        exact = (z[tokens].astype(np.longdouble) * codebook[near].astype(np.longdouble)).sum(axis=1)
        order = np.lexsort((near, -exact, tokens))
        first = np.unique(tokens[order], return_index=True)[1]
        codes[tokens[order][first]] = near[order][first]
    return codes


def check(tokens: int, seed: int) -> None:
    """Prints by kind how many tokens, drawn from `seed`, get another code than the one with the largest product."""
    size, codes, dimensions = 20_000, 1024, 32
    searches = {
        fast: jax.jit(lambda z, codebook, fast=fast: exact_nearest_codes(z, codebook, BlockScan(128), fast))
        for fast in ("bfloat16", "float32")
    }
    counts: dict[str, list[int]] = {}
    bar = tqdm(total=tokens, unit=" tokens", unit_scale=True)
    for kind, z, codebook in batches(np.random.default_rng(seed), size, codes, dimensions):
        if sum(count for count, *_ in counts.values()) >= tokens:
            break
        expected, count = largest(z, codebook), counts.setdefault(kind, [0, 0, 0])
        count[0] += size
        bar.update(size)
        for index, search in enumerate(searches.values()):
            count[1 + index] += int((np.asarray(search(z, codebook)) != expected).sum())
    bar.close()
    print(
        f"| kind ({codes:,} codes of {dimensions}) | tokens | wrong, bfloat16 pass first | wrong, float32 pass first |"
    )
    print("|---|---|---|---|")
    for kind, count in counts.items():
        print("| " + " | ".join([kind, *(f"{number:,}" for number in count)]) + " |")


def measure(tokens: int) -> None:
    """Prints the seconds of both searches on this machine."""
    rng = np.random.default_rng(0)
    z = jnp.asarray(rng.standard_normal((tokens, DIMENSIONS), np.float32))
    print(f"| codes | exact, s for {tokens:,} tokens | plain float32, s | ratio |\n|---|---|---|---|")
    for codes in SIZES:
        codebook = jnp.asarray(rng.standard_normal((codes, DIMENSIONS), np.float32))
        plain = jax.jit(lambda z, codebook: streamed_nearest_codes(z, codebook, BlockScan(BLOCK), "float32"))
        seconds = []
        for search in (jax.jit(nearest_codes), plain):
            np.asarray(search(z, codebook))
            times = []
            for _ in range(3):
                start = time.perf_counter()
                np.asarray(search(z, codebook))
                times.append(time.perf_counter() - start)
            seconds.append(min(times))
        print(f"| {codes:,} | {seconds[0]:.3f} | {seconds[1]:.3f} | {seconds[0] / seconds[1]:.2f} |", flush=True)


def expect(topology: str, tokens: int) -> None:
    """Prints the milliseconds that the TPU's compiler expects of the exact search, and of plain ones."""
    chip, devices = topology_devices(topology)
    sharding = SingleDeviceSharding(devices[0])
    print(
        f"| codes | exact, ms for {tokens:,} tokens | six passes, ms | one pass, ms | one pass's products at peak, ms |"
    )
    print("|---|---|---|---|---|")
    for codes in SIZES:
        z, codebook = (
            jax.ShapeDtypeStruct((rows, DIMENSIONS), jnp.float32, sharding=sharding) for rows in (tokens, codes)
        )
        programs = [lambda z, codebook: exact_nearest_codes(z, codebook, BlockScan(BLOCK), "bfloat16")] + [
            lambda z, codebook, precision=precision: streamed_nearest_codes(z, codebook, BlockScan(BLOCK), precision)
            for precision in ("float32", "bfloat16")
        ]
        milliseconds = []
        for program in programs:
            compiled = jax.jit(program, out_shardings=sharding).lower(z, codebook).compile()
            clock = read_clock(Module(compiled.as_text()), chip, without=FOR_FEW)
            assert clock is not None  # it is compiled for a TPU
            milliseconds.append(1e3 * clock.total)
        peak = 1e3 * 2 * tokens * codes * DIMENSIONS / chip.flops
        print(f"| {codes:,} | " + " | ".join(f"{number:.2f}" for number in (*milliseconds, peak)) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", type=int, default=0, metavar="N", help="Tokens to compare. Default: 0, none.")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="Of the tokens to compare. Default: 0.")
    parser.add_argument("--topology", metavar="CHIP:SHAPE", help="TPU to compile for, such as v5e:2x2. Default: none.")
    parser.add_argument("--tokens", type=int, default=4096, metavar="N", help="Tokens of a search. Default: 4096.")
    flags = parser.parse_args()
    if flags.check:
        check(flags.check, flags.seed)
    elif flags.topology:
        jax.config.update("jax_platforms", "cpu")
        expect(flags.topology, flags.tokens)
    else:
        measure(flags.tokens)


if __name__ == "__main__":
    main()
