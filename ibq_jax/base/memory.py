"""Keeps the memory that a step frees in the process, for the next step."""

import ctypes

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
