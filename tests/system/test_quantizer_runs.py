"""Runs with the other quantizers, through the commands: from `train` to a token cache, a report and a generator."""

import json
import math

import jax
import numpy as np
import pytest
from support.small_runs import arguments, generator_arguments

from ibq_jax import Tokenizer
from ibq_jax.__main__ import main
from ibq_jax.base.config import load_config, read_config
from ibq_jax.base.errors import UsageError
from ibq_jax.base.sharding import create_sharded
from ibq_jax.data.token_cache import open_token_cache
from ibq_jax.tokenizer.quantizers import QUANTIZERS
from ibq_jax.tokenizer.restore import restore_run
from ibq_jax.tokenizer.tokenize import fingerprint
from ibq_jax.training.fit import check_same_run
from ibq_jax.training.tokenizer import FIELD_ROLES

pytestmark = pytest.mark.slow

OTHERS = tuple(name for name in QUANTIZERS if name != "ibq")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("quantizer.name=vqvae",), "quantizer.name=vqvae is not one of ibq, vq, simvq, lfq, fsq"),
        (("quantizer.name=lfq", "codebook.size=72"), "quantizer lfq takes powers of two, such as 64"),
        (("quantizer.name=fsq", "codebook.size=72"), "quantizer fsq knows no levels for it"),
        (("quantizer.name=fsq", "quantizer.levels=(8,5)"), "make 40 codes, codebook.size is 64"),
        (
            ("quantizer.name=simvq", "quantizer.l2_normalize=True"),
            "l2_normalize=True is a setting of quantizer.name=ibq and vq, not of simvq",
        ),
        (
            ("quantizer.name=vq", "quantizer.logit_temperature=0.1"),
            "logit_temperature=0.1 is a setting of quantizer.name=ibq, not of vq",
        ),
        (("quantizer.entropy_logits=cosine",), "quantizer.entropy_logits=cosine is not one of own, dot, distance"),
        (("quantizer.entropy_logits=distance",), "entropy_logits=distance is for vq and simvq; those of ibq are dot"),
        (
            ("quantizer.name=fsq", "quantizer.entropy_logits=dot"),
            "entropy_logits=dot is a setting of quantizer.name=ibq and vq and simvq, not of fsq",
        ),
        (
            ("quantizer.name=vq", "quantizer.entropy_logits=dot", "quantizer.entropy_group_tokens=100"),
            "does not divide the 512 tokens",
        ),
        (("quantizer.logit_temperature=0.0",), "quantizer.logit_temperature=0.0 is not positive"),
        (("quantizer.levels=(8,8)",), "quantizer.levels=(8, 8) is a setting of quantizer.name=fsq, not of ibq"),
        (("quantizer.name=lfq", "quantizer.entropy_group_tokens=100"), "does not divide the 512 tokens"),
    ],
)
def test_a_quantizer_that_cannot_be_is_one_line_and_writes_nothing(overrides, words, data_dir, tmp_path, capsys):
    assert main(arguments(tmp_path / "run", data_dir, *overrides)) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


TINY = (
    "data.image_size=8",
    "data.resize=8",
    "model.resolution=8",
    "model.channel_multipliers=(1,)",
    "loss.adversarial_weight=0.0",
    "log.images_every=100",
    "evaluate.every=4",
    "evaluate.examples=8",
    "checkpoint.every=2",
)


@pytest.fixture(scope="module")
def compiled_once(tmp_path_factory):
    """A run that goes on compiles what it did before."""
    fields = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"
    before = {field: getattr(jax.config, field) for field in fields}
    for field, value in zip(fields, (str(tmp_path_factory.mktemp("compiled")), 0.0), strict=True):
        jax.config.update(field, value)
    yield
    for field, value in before.items():
        jax.config.update(field, value)


@pytest.fixture(scope="module", params=OTHERS)
def trained(request, tmp_path_factory, data_dir, compiled_once):
    """(name, workdir) after two steps, and two more from the checkpoint."""
    workdir = tmp_path_factory.mktemp("runs") / request.param
    for steps in (2, 4):
        fields = f"quantizer.name={request.param}", f"train.steps={steps}"
        assert main(arguments(workdir, data_dir, *TINY, *fields)) == 0
    return request.param, workdir


def test_a_run_trains_goes_on_and_logs_what_there_is(trained):
    name, workdir = trained
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    logged = [row for row in rows if "loss/total" in row]
    assert [row["step"] for row in logged] == [1, 2, 3, 4]
    assert [row["step"] for row in rows if "validation/psnr" in row] == [2, 4]  # the end of either run
    assert "codebook/max_probability" not in logged[0] and "codebook/max_logit" not in logged[0]
    assert ("codebook/batch_entropy" in logged[0]) == (name == "lfq")
    assert ("codebook/max_norm" in logged[0]) == (name == "vq")
    assert all(math.isfinite(value) for row in logged for value in row.values() if isinstance(value, float))
    trainer, restored = restore_run(workdir)
    assert restored.step == 4
    if name == "simvq":
        start = create_sharded(trainer.create_state, trainer.mesh, trainer.config.seed).params["quantize"]
        for tree in (restored.state.params["quantize"], restored.state.ema["quantize"]):
            np.testing.assert_array_equal(tree["codebook"], start["codebook"])
            assert np.any(tree["projection"]["kernel"] != start["projection"]["kernel"])


def test_its_codes_are_cached(trained, tmp_path):
    _, workdir = trained
    splits = "--splits=train[:16],validation[:8]"
    assert main(["tokenize", f"--tokenizer={workdir}", f"--out={tmp_path / 'codes'}", splits]) == 0
    tokenizer, codes = Tokenizer.load(workdir), open_token_cache(tmp_path / "codes", "train")
    assert codes.codebook_size == tokenizer.codebook_size == 64
    every = np.arange(64).reshape(1, 8, 8)
    assert np.asarray(tokenizer.decode(every)).shape == (1, 8, 8, 3)
    assert len({fingerprint(tokenizer.model.clone(quantizer=name), tokenizer.params) for name in QUANTIZERS}) == 5


@pytest.mark.long
@pytest.mark.parametrize("trained", ["fsq"], indirect=True)  # the furthest from IBQ: no parameter, no loss
def test_it_is_evaluated_and_reported_and_a_generator_learns_its_codes(trained, tmp_path):
    _, workdir = trained
    assert main(["evaluate", f"--run={workdir}", "--examples=16"]) == 0
    assert main(["report", f"--workdir={workdir}"]) == 0
    assert "tokenizer of 64 codes of 2 dimensions (fsq)" in (workdir / "report.html").read_text()
    codes, run = tmp_path / "codes", tmp_path / "ar"
    splits = "--splits=train[:32],validation[:16]"
    assert main(["tokenize", f"--tokenizer={workdir}", f"--out={codes}", splits]) == 0
    fields = "model.use_pretrained_codebook=True", "model.codebook_dim=2", "train.steps=1"
    assert main(generator_arguments(run, codes, *fields)) == 0
    assert main(["sample", f"--run={run}", f"--out={tmp_path / 'out.png'}", "--labels=0", "--per-class=1"]) == 0


@pytest.mark.parametrize("trained", ["vq"], indirect=True)
def test_vq_s_codebook_grows_as_ibq_s_does(trained, tmp_path):
    assert main(["convert", f"--in={trained[1]}", f"--out={tmp_path / 'grown'}", "--codebook-size=128"]) == 0
    before, after = (Tokenizer.load(run).params["quantize"]["codebook"] for run in (trained[1], tmp_path / "grown"))
    np.testing.assert_array_equal(after[:64], before)


def test_published_names_are_ibq_s_alone(trained, tmp_path, capsys):
    name, workdir = trained
    resize = "--codebook-size=128"
    for out, *flags in (("out.safetensors",), ("out", "--hub"), ("out", resize))[: 2 if name == "vq" else 3]:
        assert main(["convert", f"--in={workdir}", f"--out={tmp_path / out}", *flags]) == 2
        error = capsys.readouterr().err
        assert name in error and error.count("\n") == 1 and not (tmp_path / out).exists()
    with pytest.raises(UsageError, match=f"IBQ's tokenizer has published names .*; the quantizer here is {name}"):
        Tokenizer.load(workdir).to_torch()


def test_a_run_of_before_there_were_others_is_ibq_s_and_goes_on(data_dir, tmp_path):
    config = load_config(arguments(tmp_path, data_dir)[1].removeprefix("--config="))
    saved = config.to_dict()
    for field in ("name", "double_loss", "l2_normalize", "levels", "logit_temperature", "entropy_logits"):
        del saved["quantizer"][field]
    (tmp_path / "config.json").write_text(json.dumps(saved))
    other = load_config(arguments(tmp_path, data_dir)[1].removeprefix("--config="), ["--config.quantizer.name=vq"])
    with pytest.raises(UsageError, match=r"another config \(quantizer.name: 'ibq' -> 'vq'\)"):
        check_same_run(tmp_path, other, FIELD_ROLES)
    check_same_run(tmp_path, config, FIELD_ROLES)
    assert read_config(tmp_path / "config.json").to_dict() == config.to_dict()
