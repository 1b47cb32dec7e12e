"""Measures training, quantizing, sampling and encoding on one accelerator, next to what `plan` reads off the programs.

    python tests/benchmarks/accelerator.py --json=results.json          # 8 minutes at most
    python tests/benchmarks/accelerator.py --parts quantizer sampler    # some parts; --cache=DIR for the next time
    JAX_PLATFORMS=cpu python tests/benchmarks/accelerator.py --shrunk   # small sizes, to try it out

Weights, images and codes are random, and no data set is read: jax, flax, optax, orbax-checkpoint, ml_collections,
safetensors and tensorboardX are enough. Seconds are the median of three rounds of runs without waiting in between. What
`--seconds` has no time for is left out, and what does not fit into memory is reported. The quantizer's released form is
measured where PyTorch is installed, with its products in full float32.
"""

import os

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch and the part `start` need memory, too

import argparse
import dataclasses
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

sys.path.insert(0, str(Path(__file__).parents[2]))  # this checkout, which need not be installed

from accelerator_cases import FULL, PARTS, SHRUNK, Benchmark, Case, Row

ROUNDS, ROUND_SECONDS = 3, 0.3
OUT_OF_MEMORY = "RESOURCE_EXHAUSTED", "out of memory"


def seconds_of(run: Callable[[], Any]) -> float:
    """Returns the seconds of one run, after a first that is not counted."""
    jax.block_until_ready(run())
    start = time.perf_counter()
    jax.block_until_ready(run())
    times = max(1, round(ROUND_SECONDS / (time.perf_counter() - start)))
    rounds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(times):
            out = run()
        jax.block_until_ready(out)
        rounds.append((time.perf_counter() - start) / times)
    return statistics.median(rounds)


def measure(case: Case) -> Row:
    """Prepares and measures a case."""
    start = time.perf_counter()
    row = Row(case.part, case.name)
    try:
        prepared = case.prepare()
        if isinstance(prepared, Row):
            return prepared
        run, items, plan = prepared
        row.prepare_seconds = time.perf_counter() - start
        row.seconds = seconds_of(run)
    except RuntimeError as error:
        if not any(words in str(error) for words in OUT_OF_MEMORY):
            raise
        row.note = "does not fit into memory"
        return row
    row.rate, row.unit = items / row.seconds, case.unit
    row.process_peak_bytes = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    if plan is not None:
        row.peak_bytes, row.flops = plan.memory.peak, plan.flops
        if plan.chip is not None:
            row.bound_by, row.bound_seconds = max(plan.bounds.items(), key=lambda bound: bound[1])
            row.share_of_peak = plan.flops / plan.chip.flops / row.seconds
    return row


def in_turns(cases: list[Iterator[Case]]) -> Iterator[Case]:
    """Yields the first case of every part, then the second of every part, and so on."""
    while cases:
        for part in list(cases):
            try:
                yield next(part)
            except StopIteration:
                cases.remove(part)


def rows_of(cases: Iterator[Case], seconds: float) -> Iterator[Row]:
    """Yields the outcome of every case, until there may be no time for the next."""
    end, longest = time.monotonic() + seconds, 0.0
    for case in cases:
        start = time.monotonic()
        if start + longest > end:
            yield Row(case.part, case.name, "left out: no time")
            continue
        yield measure(case)
        gc.collect()
        longest = max(longest, time.monotonic() - start)


def table(rows: list[Row], part: str) -> str:
    """Returns the rows of a part as a table in Markdown."""
    lines = [
        f"\n## {part}\n",
        "| case | time | rate | memory | share of peak | bound | bound / time |",
        "|---" * 7 + "|",
    ]
    for row in rows:
        if row.seconds is None:
            lines.append(f"| {row.case} | {row.note} | | | | | |")
            continue
        cells = [row.case, f"{1e3 * row.seconds:,.2f} ms", f"{row.rate:,.0f} {row.unit}" if row.rate else ""]
        cells.append(f"{row.peak_bytes / 1e9:.2f} GB" if row.peak_bytes is not None else "")
        cells.append(f"{row.share_of_peak:.0%}" if row.share_of_peak is not None else "")
        bound = row.bound_seconds
        cells += (
            [f"{1e3 * bound:,.2f} ms, {row.bound_by}", f"{bound / row.seconds:.0%}"] if bound is not None else ["", ""]
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="Default: all, in this order.")
    parser.add_argument("--seconds", type=float, default=440, help="No case is begun that would end after so many.")
    parser.add_argument("--json", type=Path, help="Write the outcomes here, after every case.")
    parser.add_argument("--cache", type=Path, help="Keep compiled programs in this folder for the next time.")
    parser.add_argument("--shrunk", action="store_true", help="Small sizes, for a CPU.")
    parser.add_argument("--first-step", action="store_true", help="Train a single step, as the part `start` does.")
    flags = parser.parse_args()
    if flags.cache:
        jax.config.update("jax_compilation_cache_dir", str(flags.cache))
    benchmark = Benchmark(SHRUNK if flags.shrunk else FULL)
    if flags.first_step:
        benchmark.first_step()
        return
    device = jax.devices()[0]
    machine = {
        "device": device.device_kind,
        "platform": device.platform,
        "jax": jax.__version__,
        "size": benchmark.size,
    }
    print(f"{machine['size']} sizes on {machine['device']} ({machine['platform']}), jax {machine['jax']}")
    rows: list[Row] = []
    for row in rows_of(in_turns([getattr(benchmark, part)() for part in flags.parts]), flags.seconds):
        rows.append(row)
        print(f"{row.part}: {row.case}: {row.note or f'{1e3 * (row.seconds or 0):,.2f} ms'}", flush=True)
        if flags.json:
            flags.json.write_text(json.dumps({**machine, "rows": [dataclasses.asdict(row) for row in rows]}, indent=1))
    for part in flags.parts:
        print(table([row for row in rows if row.part == part], part))


if __name__ == "__main__":
    main()
