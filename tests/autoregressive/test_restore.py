"""The tokenizer of a generator's codes is found again, whatever the precision of its codes."""

from pathlib import Path

import pytest
from support.small_runs import save_run

from ibq_jax.autoregressive.restore import find_tokenizer
from ibq_jax.base.errors import UsageError
from ibq_jax.tokenizer.restore import restore_run as restore_tokenizer
from ibq_jax.tokenizer.tokenize import fingerprint

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return save_run(folder / "tok", folder)


@pytest.fixture(scope="module")
def restored(tokenizer):
    """The trainer of that run, and its state."""
    trainer, restored = restore_tokenizer(tokenizer)
    return trainer, restored.state


def manifest_of(run: Path, **fields) -> dict:
    return {"tokenizer": {"path": str(run), "step": 7, "weights": "ema"} | fields.pop("tokenizer"), **fields}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])  # with float32's type and with another
def test_the_tokenizer_is_found_whatever_the_precision_of_its_codes(precision, tokenizer, restored):
    trainer, state = restored
    made = trainer.model.for_encoding(precision)
    digest = {"fingerprint": fingerprint(made, state.ema)}
    machine = {"platform": "tpu", "device_kind": "TPU v5e"}
    found = find_tokenizer("", manifest_of(tokenizer, tokenizer=digest, precision=precision, machine=machine), True)
    assert found is not None and found[0] == made
    other = {"fingerprint": fingerprint(made, state.params)}
    with pytest.raises(UsageError, match=r"tokenizer.fingerprint: [^\n]* the tokenizer in [^\n]* asks for"):
        find_tokenizer("", manifest_of(tokenizer, tokenizer=other, precision=precision, machine=machine), True)


def test_the_tokenizer_of_an_earlier_versions_codes_is_found(tmp_path):
    """They were computed at the type of training, by whose name the manifest calls their precision."""
    run = save_run(tmp_path / "tok", tmp_path, "dtype=bfloat16")
    trainer, restored = restore_tokenizer(run)
    digest = {"fingerprint": fingerprint(trainer.model, restored.state.ema)}
    for fields, precision in (({"precision": "bfloat16"}, "bfloat16"), ({}, "float32")):  # imported runs had no field
        found = find_tokenizer("", manifest_of(run, tokenizer=digest, **fields), True)
        assert found is not None and found[0].precision == precision


def test_a_precision_that_this_machine_lacks_is_replaced_by_float32_to_decode(tokenizer, restored, monkeypatch):
    trainer, state = restored
    digest = {"fingerprint": fingerprint(trainer.model.for_encoding("bfloat16_3x"), state.ema)}
    machine = {"platform": "tpu", "device_kind": "TPU v5e"}
    monkeypatch.setattr("ibq_jax.tokenizer.model.platform", lambda mesh: "gpu")
    manifest = manifest_of(tokenizer, tokenizer=digest, precision="bfloat16_3x", machine=machine)
    found = find_tokenizer("", manifest, True)
    assert found is not None and found[0].precision == "float32"
