"""XLA's compilers for TPUs and GPUs, which need neither, and come with the extras "tpu" and "cuda"."""

import importlib.util

import pytest

NEEDED = {"tpu": "libtpu", "gpu": "jax_cuda13_plugin"}  # platform -> the package that has its compiler


def installed(platform: str) -> bool:
    """Returns whether the compiler for "tpu" or "gpu" is installed here."""
    return importlib.util.find_spec(NEEDED[platform]) is not None


def needs_libtpu(test):
    """Marks a test that compiles for TPUs: it is skipped without their compiler."""
    return pytest.mark.compiler(pytest.mark.skipif(not installed("tpu"), reason="needs requirements-tpu.txt")(test))


def needs_gpu_compiler(test):
    """Marks a test that compiles for GPUs: it is skipped without their compiler."""
    return pytest.mark.compiler(pytest.mark.skipif(not installed("gpu"), reason="needs requirements-cuda.txt")(test))
