"""How a command's process treats memory: what a step frees stays for the next, and garbage is looked for rarely."""

import ctypes
import gc

# Parameters of glibc's mallopt, see mallopt(3).
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
NEVER = -1


def keep_freed_memory() -> bool:
    """Makes the C library keep freed memory instead of returning it to the system; returns whether it can.

    XLA for CPUs allocates the temporaries of every step again. By default glibc returns such large blocks to the system
    at once, which clears each page again at its first use: a seventh of a large step's CPU time (docs/speed.md). The
    process then stays as large as its largest step.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        return False
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, NEVER))


def collect_garbage_rarely() -> None:
    """Makes Python look for unreachable cycles of objects once in 50,000 new ones instead of 700.

    Tracing a step makes millions of objects that live on, each of which Python would look at several times: a twelfth
    of the CPU time until the first step. What is freed without such cycles, as arrays are, is still freed at once.
    """
    gc.set_threshold(50_000, 10, 10)
