"""A tokenizer's run, token caches and a generator's run, which tests only read."""

import pytest
from support.generator_runs import tokenized
from support.small_runs import generator_arguments, save_run
from support.tokenizing import command

from ibq_jax.__main__ import main


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """The embedded data set, larger than the tokenizer's crops."""
    folder = tmp_path_factory.mktemp("data")
    assert main(["prepare", "openmoji", "--size=24", f"--data_dir={folder}"]) == 0
    return folder


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory, pictures):
    return save_run(tmp_path_factory.mktemp("runs") / "tok", pictures)


@pytest.fixture(scope="session")
def whole_cache(tmp_path_factory, tokenizer):
    """A token cache that was written without interruption."""
    out = tmp_path_factory.mktemp("caches") / "whole"
    assert main(command(tokenizer, out)) == 0
    return out


@pytest.fixture(scope="session")
def codes(tmp_path_factory, tokenizer):
    return tokenized(tokenizer, tmp_path_factory.mktemp("caches") / "codes")


@pytest.fixture(scope="session")
def run(tmp_path_factory, codes):
    """A run that was never interrupted."""
    workdir = tmp_path_factory.mktemp("runs") / "ar"
    assert main(generator_arguments(workdir, codes)) == 0
    return workdir
