"""Makes XLA compile in less time in tests, whose programs run for a moment and are compiled again and again.

All settings hold for the commands that tests start as processes, too, unless the environment says otherwise:
`JAX_DISABLE_MOST_OPTIMIZATIONS=0 bash launch/test.sh` tests the very instructions that users run.
"""

import os
import tempfile

import jax

# LLVM's optimizations. XLA's own passes stay, and with them collectives, precisions and the sizes of arrays.
FEW_OPTIMIZATIONS = "JAX_DISABLE_MOST_OPTIMIZATIONS"
FLAGS = "XLA_FLAGS"
FASTER = (
    # XLA's older form of fused loops, which compiles in two thirds of the time and runs somewhat longer.
    "--xla_cpu_use_fusion_emitters=false",
    # One LLVM module a program instead of up to 32 that threads compile beside each other: the cores are busy anyway,
    # and what is done for each module, not for each function, is an eighth of a small train step's compilation.
    "--xla_cpu_parallel_codegen_split_count=1",
)
FOLDER, SECONDS = "JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"


def compile_in_less_time() -> tempfile.TemporaryDirectory | None:
    """Sets the environment, and JAX before it compiles; returns the cache's folder, which lives as long as the object.

    The workers of a pytest session have the environment of the process that started them, and so they share its cache.
    """
    folder = None
    if FOLDER not in os.environ:
        folder = tempfile.TemporaryDirectory(prefix="ibq_jax_compiled")
        os.environ[FOLDER] = folder.name
    os.environ.setdefault(SECONDS, "0.2")
    os.environ.setdefault(FEW_OPTIMIZATIONS, "1")
    if os.environ[FEW_OPTIMIZATIONS] != "0":
        given = os.environ.get(FLAGS, "").split()
        os.environ[FLAGS] = " ".join([*given, *(flag for flag in FASTER if flag not in given)])
    jax.config.update("jax_compilation_cache_dir", os.environ[FOLDER])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", float(os.environ[SECONDS]))
    optimize(os.environ[FEW_OPTIMIZATIONS] == "0")
    return folder


def optimize(fully: bool) -> None:
    """Sets for this process, from now on, whether LLVM optimizes fully or little."""
    jax.config.update("jax_disable_most_optimizations", not fully)
