"""`python injected.py FAULT ARGUMENTS...`: the command, with a fault in its own process."""

import itertools
import sys
import time

import numpy as np

from ibq_jax.__main__ import main
from ibq_jax.base import loop

STEP = 10  # that the fault comes with
HOUR = 3600.0


def nan_batch() -> None:
    """Sets every pixel of one batch to NaN."""
    steps, plain = itertools.count(1), loop.global_batch

    def global_batch(batch, mesh):
        if next(steps) == STEP:
            batch = batch | {"image": np.full(batch["image"].shape, np.nan, np.float32)}
        return plain(batch, mesh)

    loop.global_batch = global_batch


def clock_jumps() -> None:
    """The wall clock, as Python reads it, jumps back by an hour, and later on by a day."""
    steps, plain_batch, plain_time = itertools.count(1), loop.global_batch, time.time
    offset = 0.0

    def global_batch(batch, mesh):
        nonlocal offset
        offset = {STEP: -HOUR, 2 * STEP: 24 * HOUR}.get(next(steps), offset)
        return plain_batch(batch, mesh)

    loop.global_batch = global_batch
    time.time = lambda: plain_time() + offset


if __name__ == "__main__":
    {"nan_batch": nan_batch, "clock_jumps": clock_jumps}[sys.argv[1]]()
    sys.exit(main(sys.argv[2:]))
