"""Eight simulated devices for every test, set here and nowhere else; what the tests of commands share."""

import jax
import pytest
from absl import flags
from support.jobs import Starter

from ibq_jax.__main__ import main

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
flags.FLAGS.mark_as_parsed()  # Grain's worker processes read absl flags


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """Pictures of 16 pixels, to be read only."""
    folder = tmp_path_factory.mktemp("data")
    assert main(["prepare", "openmoji", "--size=16", f"--data_dir={folder}"]) == 0
    return folder


@pytest.fixture(scope="session")
def start(tmp_path_factory):
    """Starts commands in processes of their own, which are killed in the end."""
    starter = Starter(tmp_path_factory.mktemp("compiled"))
    yield starter
    starter.close()
