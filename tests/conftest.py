"""Eight simulated devices for every test, set here and nowhere else, and the fixtures that several rooms share."""

import jax
import pytest
from absl import flags
from support import released
from support.jobs import Starter

from ibq_jax.__main__ import main

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
flags.FLAGS.mark_as_parsed()  # Grain's worker processes read absl flags


def pytest_addoption(parser):
    parser.addoption("--update-golden", action="store_true", help="Rewrite this project's own golden files.")


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
def start(tmp_path_factory):
    """Starts commands in processes of their own, and kills those that still run at the end."""
    starter = Starter(tmp_path_factory.mktemp("compiled"))
    yield starter
    starter.close()
