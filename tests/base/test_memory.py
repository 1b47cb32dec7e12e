"""Freed memory that stays in the process."""

import subprocess
import sys

MEASURE = """
import ctypes
from ibq_jax.base.memory import keep_freed_memory

if {keep} and not keep_freed_memory():
    raise SystemExit("no mallopt")
library = ctypes.CDLL(None)
library.malloc.restype, library.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]

def faults():
    return int(open("/proc/self/stat").read().rsplit(")", 1)[1].split()[7])

def use():
    block = library.malloc(2**28)
    ctypes.memset(block, 1, 2**28)
    library.free(block)

use()
before = faults()
use()
print(faults() - before)
"""


def page_faults(keep: bool) -> int:
    """Returns how many page faults it takes to use 256 MiB again that were freed before."""
    out = subprocess.run([sys.executable, "-c", MEASURE.format(keep=keep)], capture_output=True, text=True, check=True)
    return int(out.stdout)


def test_freed_memory_is_used_again_without_page_faults():
    assert page_faults(keep=True) < 100 < page_faults(keep=False)


def test_a_command_looks_for_garbage_rarely():
    code = "import gc, runpy, sys; sys.argv[1:] = ['--help']\ntry: runpy.run_module('ibq_jax', run_name='__main__')\n"
    code += "finally: print(gc.get_threshold())"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "(50000, 10, 10)"
