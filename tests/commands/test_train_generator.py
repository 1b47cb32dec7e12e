"""Training a generator on a token cache, killed and resumed, on other codes and meshes; and wrong use."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from support.generator_runs import copied, logged, refused
from support.small_runs import ROOT, STEPS, generator_arguments, save_run

from ibq_jax import Generator, Tokenizer
from ibq_jax.__main__ import main
from ibq_jax.autoregressive.restore import restore_run
from ibq_jax.base.config import read_config

pytestmark = pytest.mark.slow

BRIEF = ("log.images_every=1000", "evaluate.every=1000")  # samples and validation at the end only


@pytest.fixture(scope="module")
def unpictured(codes, tmp_path_factory):
    """The token cache of a tokenizer that is gone, so that a run draws no samples, which take long to compile."""
    made = json.loads((codes / "token_cache.json").read_text())["tokenizer"]
    return copied(codes, tmp_path_factory.mktemp("caches") / "codes", tokenizer=made | {"path": "/gone"})


def test_a_run_logs_and_writes_what_it_should(run):
    rows = logged(run)
    assert [row["step"] for row in rows if "loss/total" in row] == list(range(1, STEPS + 1))
    measured = [row for row in rows if "validation/loss" in row]
    assert [row["step"] for row in measured] == [6, 12]
    assert measured[-1]["validation/perplexity"] == pytest.approx(np.exp(measured[-1]["validation/loss"]))
    by_position = np.array([row for row in rows if "validation/perplexity_by_position" in row][-1][
        "validation/perplexity_by_position"
    ])  # fmt: skip
    assert by_position.shape == (8, 8)
    assert np.log(by_position).mean() == pytest.approx(measured[-1]["validation/loss"], abs=1e-5)
    first, last = (rows[i]["loss/total"] for i in (0, STEPS - 1))
    assert first == pytest.approx(np.log(64), abs=1e-3) and last < first  # the head starts at zero
    assert json.loads((run / "token_cache.json").read_text())["codebook_size"] == 64
    assert any((run / "events").iterdir())


def test_a_complete_run_goes_on_when_it_is_made_longer(run, codes, tmp_path):
    workdir = tmp_path / "longer"
    shutil.copytree(run, workdir)
    sizes = "model.vocab_size=64", "model.grid=(8, 8)", "model.num_classes=9"  # the token cache's, given or not
    for given in ((), sizes):
        assert main(generator_arguments(workdir, codes, *given)) == 0
        assert logged(workdir) == logged(run)
        assert (workdir / "config.json").read_text() == (run / "config.json").read_text()
    model = read_config(workdir / "config.json").model
    assert (model.vocab_size, model.grid, model.num_classes) == (64, (8, 8), 9)
    assert main(generator_arguments(workdir, codes, f"train.steps={STEPS + 1}")) == 0
    assert logged(workdir)[-1]["step"] == STEPS + 1


def test_killed_and_restarted_it_ends_the_same_bit_for_bit(run, codes, tmp_path, capsys):
    workdir = tmp_path / "killed"
    command = [sys.executable, "-m", "ibq_jax", *generator_arguments(workdir, codes)]
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "8"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    while process.poll() is None and not (workdir / "checkpoints" / "4").is_dir():
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert logged(workdir)[-1]["step"] < STEPS
    assert main(generator_arguments(workdir, codes)) == 0
    assert "continuing from step" in capsys.readouterr().out
    assert logged(workdir) == logged(run)


def test_token_embeddings_start_at_the_tokenizers_codebook(codes, tokenizer, tmp_path):
    workdir = tmp_path / "pretrained"
    overrides = ("model.use_pretrained_codebook=True", "train.steps=1", "optimizer.learning_rate=1e-9")
    assert main(generator_arguments(workdir, codes, *overrides)) == 0
    codebook = Tokenizer.load(tokenizer).params["quantize"]["codebook"]
    embedding = restore_run(workdir)[1].state.params["tok_emb"]["embedding"]
    np.testing.assert_allclose(embedding, codebook, atol=1e-7)
    assert Generator.load(workdir).sample([0], seed=1).shape == (1, 8, 8)


def test_on_another_mesh_it_is_the_same_run(run, unpictured, tmp_path):
    workdir = tmp_path / "mesh"
    mesh = ("mesh.data=2", "mesh.fsdp=2", "mesh.codebook=2")
    assert main(generator_arguments(workdir, unpictured, *BRIEF, *mesh)) == 0
    losses = [[row["loss/total"] for row in logged(path) if "loss/total" in row] for path in (run, workdir)]
    np.testing.assert_allclose(*losses, rtol=1e-5)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("codes=",), "config.token_cache is empty"),
        (("codes=none",), "there is no token cache in"),
        (("model.vocab_size=128",), "model.vocab_size=128, the token cache has 64"),
        (("model.grid=(4, 16)",), "model.grid=(4, 16), the token cache has (8, 8)"),
        (("model.grid=(8, 0)",), "model.grid=(8, 0) is not the rows and columns"),
        (("model.num_classes=10",), "model.num_classes=10, the token cache has 9"),
        (("model.num_heads=3",), "model.embed_dim=32 does not divide into model.num_heads=3"),
        (("model.num_kv_heads=3",), "model.num_heads=2 is not a multiple of model.num_kv_heads=3"),
        (("model.dropout=1.0",), "model.dropout=1.0 is not a fraction"),
        (("data.batch_size=12",), "data.batch_size=12 does not divide over 8 devices; use a multiple of 8"),
        (("evaluate.batch_size=12",), "evaluate.batch_size=12 does not divide over 8 devices"),
        (("model.vocab_size=60", "mesh.codebook=8"), "model.vocab_size=60 does not divide over mesh.codebook=8"),
        (("optimizer.beta1=1.5",), "optimizer.beta1=1.5 is not a fraction"),
        (("optimizer.end_lr_factor=-2.0",), "optimizer.end_lr_factor=-2.0 is negative"),
        (("model.attention=cudnn",), "is for NVIDIA GPUs"),
        (("sample.top_p=2.0",), "top_p=2.0 is not in (0, 1]"),
        (("tokenizer=none",), "config.json does not exist"),
        (("model.use_pretrained_codebook=True", "model.codebook_dim=16"), "the tokenizer's codes have 8 dimensions"),
    ],
)
def test_wrong_use_of_train_is_one_line_and_writes_nothing(overrides, words, codes, tmp_path, capsys):
    assert words in refused(generator_arguments(tmp_path / "run", codes, *overrides), capsys)
    assert not (tmp_path / "run").exists()


def test_codes_of_another_tokenizer_are_refused(run, codes, data_dir, tmp_path, capsys):
    other = save_run(tmp_path / "other", data_dir, "seed=5")
    words = refused(generator_arguments(tmp_path / "new", codes, f"tokenizer={other}"), capsys)
    assert "tokenizer.fingerprint: the cache has " in words and f"the tokenizer in {other} asks for" in words
    made = json.loads((codes / "token_cache.json").read_text())["tokenizer"]
    elsewhere = copied(codes, tmp_path / "codes", tokenizer=made | {"fingerprint": "0" * 64})
    capsys.readouterr()
    before = logged(run)
    words = refused(generator_arguments(run, elsewhere), capsys)
    assert "tokenizer.fingerprint" in words and f"the run in {run} asks for" in words
    assert logged(run) == before


def test_a_run_is_not_continued_with_codes_of_another_precision_or_platform(run, codes, unpictured, tmp_path, capsys):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for name, cache, words in (
        (
            "precision",
            copied(codes, tmp_path / "low", precision="bfloat16"),
            "the cache has bfloat16, the run in {run} asks for float32",
        ),
        (
            "machine.platform",
            copied(codes, tmp_path / "gpu", machine={"platform": "gpu", "device_kind": "NVIDIA H100"}),
            "the cache has gpu, the run in {run} asks for cpu",
        ),
        (
            "machine.platform",
            copied(codes, tmp_path / "old", machine=None),
            "the cache has nothing, the run in {run} asks for cpu",
        ),
    ):
        capsys.readouterr()
        message = refused(generator_arguments(run, cache, "train.steps=20"), capsys)
        assert f"{name}: {words.format(run=run)}" in message
        assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    other_kind = copied(unpictured, tmp_path / "kind", machine={"platform": "cpu", "device_kind": "another"})
    workdir = tmp_path / "run"
    shutil.copytree(run, workdir)
    assert main(generator_arguments(workdir, other_kind, f"train.steps={STEPS + 1}", *BRIEF)) == 0


def test_a_cache_of_an_earlier_version_trains_and_so_does_its_run(unpictured, tmp_path):
    old = copied(unpictured, tmp_path / "old", machine=None, compared_with_float32=None)
    workdir = tmp_path / "run"
    for cache, steps in ((old, STEPS), (unpictured, STEPS + 1)):  # a machine that the run did not note is not compared
        assert main(generator_arguments(workdir, cache, f"train.steps={steps}", *BRIEF)) == 0
        assert logged(workdir)[-1]["step"] == steps
        assert ("machine" in json.loads((workdir / "token_cache.json").read_text())) == (cache == unpictured)


def test_an_unfinished_cache_is_refused(codes, tmp_path, capsys):
    unfinished = tmp_path / "codes"
    shutil.copytree(codes, unfinished)
    (unfinished / "token_cache.json").unlink()
    assert "is unfinished: rerun the same tokenize command" in refused(
        generator_arguments(tmp_path / "run", unfinished), capsys
    )
