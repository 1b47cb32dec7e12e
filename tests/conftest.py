"""Eight simulated devices for every test, set here and nowhere else, and the fixtures that several rooms share."""

import gc
import os

import jax
import pytest
from absl import flags
from support import released
from support.compiling import FEW_OPTIMIZATIONS, compile_in_less_time, optimize
from support.jobs import Starter

from ibq_jax.__main__ import main

COMPILED = compile_in_less_time()  # a folder that lives as long as this process
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
flags.FLAGS.mark_as_parsed()  # Grain's worker processes read absl flags
gc.set_threshold(50_000, 20, 1_000)  # a session's traces and programs are millions of objects that live to its end


def pytest_addoption(parser):
    parser.addoption("--update-golden", action="store_true", help="Rewrite this project's own golden files.")


@pytest.fixture
def optimized(monkeypatch):
    """Lets LLVM optimize what a test and its commands compile: for programs that would run longer than that takes."""
    before = os.environ[FEW_OPTIMIZATIONS]
    monkeypatch.setenv(FEW_OPTIMIZATIONS, "0")
    optimize(fully=True)
    yield
    optimize(fully=before == "0")


@pytest.fixture(scope="session")
def check_golden(pytestconfig):
    """Compares a text with this project's own golden file `tests/golden/NAME`, or rewrites it under --update-golden.

    Files that hold what other people's code printed are never rewritten; tests/golden/README.md tells which is which.
    """

    def check(name: str, text: str) -> None:
        path = released.GOLDEN / name
        if pytestconfig.getoption("--update-golden"):
            path.write_text(text)
        assert text == path.read_text(), f"{name} differs; if that is meant: pytest --update-golden, and read the diff"

    return check


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """The embedded data set at 16 pixels; tests only read it."""
    folder = tmp_path_factory.mktemp("data")
    assert main(["prepare", "openmoji", "--size=16", f"--data-dir={folder}"]) == 0
    return folder


@pytest.fixture(scope="session")
def start():
    """Starts commands in processes of their own, and kills those that still run at the end."""
    starter = Starter()
    yield starter
    starter.close()
