"""The names of fields in errors about a part of a joint config."""

import pytest
from support.small_runs import ROOT

from ibq_jax.base.config import load_config
from ibq_jax.base.errors import UsageError
from ibq_jax.base.loop import TrainingStopped
from ibq_jax.joint.parts import naming_fields_of


@pytest.fixture(scope="module")
def config():
    return load_config(f"{ROOT}/configs/joint.py:openmoji32")


@pytest.mark.parametrize(
    ("group", "words", "named"),
    [
        ("tokenizer", "quantizer.name=x is wrong", "tokenizer.quantizer.name=x is wrong"),
        ("tokenizer", "dtype=x; the dtype is wrong", "tokenizer.dtype=x; the dtype is wrong"),
        ("tokenizer", "set codebook.size, or data.batch_size.", "set tokenizer.codebook.size, or data.batch_size."),
        ("tokenizer", "8 does not divide mesh.codebook=3", "8 does not divide mesh.codebook=3"),
        ("tokenizer", "runs/codebook.size is a folder", "runs/codebook.size is a folder"),
        ("generator", "model.num_heads=3 (model.grid)", "generator.model.num_heads=3 (generator.model.grid)"),
        ("generator", "quantizer.name=x, seed=-1", "quantizer.name=x, seed=-1"),
    ],
)
def test_fields_of_a_part_get_its_group(config, group, words, named):
    for kind in (UsageError, TrainingStopped):
        with pytest.raises(kind) as caught, naming_fields_of(group, config):
            raise kind(words)
        assert str(caught.value) == named


def test_other_errors_pass(config):
    with pytest.raises(KeyError, match=r"^'quantizer.name'$"), naming_fields_of("tokenizer", config):
        raise KeyError("quantizer.name")
