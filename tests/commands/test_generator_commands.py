"""The generator's commands: training on a token cache, killed and resumed; evaluating, sampling; wrong use."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from PIL import Image
from support.small_runs import ROOT, STEPS, generator_arguments, save_run

from ibq_jax import Generator, Tokenizer
from ibq_jax.__main__ import main
from ibq_jax.autoregressive.restore import find_tokenizer, restore_run
from ibq_jax.base.config import read_config
from ibq_jax.base.errors import UsageError
from ibq_jax.base.precision import PRECISIONS
from ibq_jax.data.token_cache import open_token_cache
from ibq_jax.evaluate import sample_set
from ibq_jax.pretrained.tensor_files import read_tensors, write_tensors
from ibq_jax.tokenizer.restore import restore_run as restore_tokenizer
from ibq_jax.tokenizer.tokenize import fingerprint

pytestmark = pytest.mark.slow

BRIEF = ("log.images_every=1000", "evaluate.every=1000")  # without samples and validation


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory, data_dir):
    return save_run(tmp_path_factory.mktemp("runs") / "tok", data_dir)


def tokenized(tokenizer: Path, out: Path, *flags: str) -> Path:
    splits = "--splits=train[:96],validation[:40]"
    assert main(["tokenize", f"--tokenizer={tokenizer}", f"--out={out}", splits, *flags]) == 0
    return out


@pytest.fixture(scope="module")
def codes(tmp_path_factory, tokenizer):
    return tokenized(tokenizer, tmp_path_factory.mktemp("caches") / "codes")


@pytest.fixture(scope="module")
def run(tmp_path_factory, codes):
    """A run that was never interrupted."""
    workdir = tmp_path_factory.mktemp("runs") / "ar"
    assert main(generator_arguments(workdir, codes)) == 0
    return workdir


def logged(workdir: Path) -> list[dict]:
    path = workdir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def refused(argv: list[str], capsys) -> str:
    """Returns the one line with which a command ends after wrong use."""
    assert main(argv) == 2
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("ibq_jax ")]
    assert len(lines) == 1 and "Traceback" not in error
    return lines[0]


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


def test_validation_loss_is_that_of_the_public_class(run, codes, tmp_path, capsys):
    numbers = tmp_path / "numbers.json"
    assert main(["evaluate", f"--run={run}", f"--json={numbers}"]) == 0
    out, measured = capsys.readouterr().out, json.loads(numbers.read_text())
    assert "unigram entropy of the codes" in out and "uniform, log K" in out
    generator, source = Generator.load(run), list(open_token_cache(codes, "validation"))
    stored = np.stack([image["codes"][0] for image in source]).astype(np.int32)
    logits = generator.logits(stored, np.array([image["label"] for image in source]))
    log_p = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), stored.reshape(len(stored), -1, 1), 2)
    assert measured["images"] == len(stored) == 40
    assert measured["metrics"]["loss"] == pytest.approx(-log_p.mean(), rel=1e-5)
    assert measured["metrics"]["uniform"] == pytest.approx(np.log(64))
    histogram = np.bincount(stored.reshape(-1)) / stored.size
    assert measured["metrics"]["order_0"] == pytest.approx(-sum(p * np.log(p) for p in histogram if p))


def test_an_imported_generator_is_evaluated_and_trained_on(run, codes, tmp_path, capsys):
    """The file has no metadata, like the published ones."""
    assert main(["convert", f"--in={run}", f"--out={tmp_path / 'with_metadata.safetensors'}"]) == 0
    file, imported = tmp_path / "weights.safetensors", tmp_path / "imported"
    write_tensors(file, read_tensors(tmp_path / "with_metadata.safetensors"), {})
    fields = ["--config.model.num_heads=2", "--config.model.grid=(8, 8)"]
    assert main(["convert", f"--in={file}", f"--out={imported}", *fields]) == 0
    assert "give --token-cache=FOLDER" in refused(["evaluate", f"--run={imported}"], capsys)
    losses = []
    for folder in (run, imported):
        numbers = tmp_path / f"{folder.name}.json"
        assert main(["evaluate", f"--run={folder}", f"--codes={codes}", f"--json={numbers}"]) == 0
        losses.append(json.loads(numbers.read_text())["metrics"]["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)  # bfloat16 there, float32 here
    assert main(generator_arguments(imported, codes, "train.steps=3", "model.num_kv_heads=2")) == 0
    assert "continuing from the weights of step 0" in capsys.readouterr().out
    trained = [row["loss/total"] for row in logged(imported) if "loss/total" in row]
    assert len(trained) == 3 and abs(trained[0] - losses[0]) < 0.5
    assert "reads a token cache: --token-cache" in refused(["evaluate", f"--run={imported}", "--data=openmoji"], capsys)


def test_drawn_samples_are_compared_with_the_originals_and_kept(run, tmp_path, capsys):
    command = ["evaluate", f"--run={run}", "--num=16", "--batch-size=8", f"--json={tmp_path / 'numbers.json'}"]
    assert main(command) == 0
    first, printed = json.loads((tmp_path / "numbers.json").read_text()), capsys.readouterr().out
    assert "against the originals of openmoji/train[:96]" in printed and "16 images, the protocol has 50,000" in printed
    assert first["metrics"]["FD-EfficientNetLite0"] > 0 and 0 <= first["metrics"]["recall (EfficientNetLite0)"] <= 1
    assert first["samples"]["pictures"] == 16 and first["step"] == STEPS and first["protocol"]["name"] == "adm"
    drawn = run / "samples" / f"{STEPS:07}-ema-16.npz"
    written = drawn.stat().st_mtime_ns
    assert main([*command, f"--reference={drawn}", "--protocol=clean"]) == 0
    second = json.loads((tmp_path / "numbers.json").read_text())
    assert drawn.stat().st_mtime_ns == written, "the set exists: it is not drawn again"
    assert abs(second["metrics"]["FD-EfficientNetLite0"]) < 1e-6 and second["reference"] == drawn.name
    kept = {path.name for path in (run / "evaluations").iterdir()}
    assert {f"{STEPS:07}-ema-{name}-{drawn.stem}.json" for name in ("adm", "clean")} <= kept


def test_codes_of_another_kind_are_refused_in_evaluation(run, data_dir, tmp_path, capsys):
    other = tokenized(save_run(tmp_path / "tok", data_dir, "codebook.size=128"), tmp_path / "codes")
    error = refused(["evaluate", f"--run={run}", f"--codes={other}"], capsys)
    assert "model.vocab_size=64, the token cache has 128" in error


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


def test_on_another_mesh_it_is_the_same_run(run, codes, tmp_path):
    workdir = tmp_path / "mesh"
    mesh = ("mesh.data=2", "mesh.fsdp=2", "mesh.codebook=2")
    assert main(generator_arguments(workdir, codes, *mesh)) == 0
    losses = [[row["loss/total"] for row in logged(path) if "loss/total" in row] for path in (run, workdir)]
    np.testing.assert_allclose(*losses, rtol=1e-5)


def sampled(run: Path, out: Path, *flags: str) -> list[str]:
    return ["sample", f"--run={run}", f"--out={out}", *flags]


def test_a_contact_sheet_has_one_row_per_class(run, tmp_path, capsys):
    out = tmp_path / "sheet.png"
    assert main(sampled(run, out, "--labels=3,1", "--per-class=2")) == 0
    assert "2 samples of each of 2 classes" in capsys.readouterr().out
    with Image.open(out) as sheet:
        assert sheet.height == 2 * (64 + 4) + 4 and sheet.width > 2 * (64 + 4)


def test_samples_start_with_the_rows_of_an_image(run, tmp_path):
    image = tmp_path / "image.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 24, 3), np.uint8)).save(image)
    out = tmp_path / "sheet.png"
    assert main(sampled(run, out, "--labels=0", "--per-class=2", f"--image={image}", "--keep-rows=7")) == 0
    assert out.is_file()


def read_set(path: Path) -> tuple[np.ndarray, np.ndarray]:
    with np.load(path) as arrays:
        assert sorted(arrays.files) == ["arr_0", "arr_1"]
        return arrays["arr_0"], arrays["arr_1"]


@pytest.fixture(scope="module")
def whole_set(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("sets") / "whole.npz"
    assert main(sampled(run, out, "--num=40")) == 0
    return read_set(out)


def test_a_set_is_what_the_evaluation_suite_reads(whole_set, run, tmp_path):
    samples, labels = whole_set
    assert samples.dtype == np.uint8 and samples.shape == (40, 16, 16, 3)
    assert np.bincount(labels).tolist() == [5, 5, 5, 5, 4, 4, 4, 4, 4]
    assert len(np.unique(samples.reshape(40, -1), axis=0)) == 40
    tokenizer = Tokenizer.load(json.loads((run / "token_cache.json").read_text())["tokenizer"]["path"])
    generator = Generator.load(run)
    config = json.loads((run / "config.json").read_text())["sample"]
    codes = generator.sample(labels[7:9], config["cfg_scale"], config["temperature"], first=7)
    decoded = np.round((np.clip(tokenizer.decode(codes), -1, 1) + 1) * 127.5)
    assert np.abs(decoded - samples[7:9]).max() <= 1  # sample 7 of a seed, whoever draws it; decoded in another batch


def test_a_set_that_was_killed_ends_with_exactly_its_samples(whole_set, run, tmp_path, monkeypatch):
    monkeypatch.setattr(sample_set, "SAMPLES_PER_PART", 6)
    out, drawn = tmp_path / "set.npz", []
    save = np.save

    def killed(file, samples):
        drawn.append(len(samples))
        if len(drawn) == 4:
            file.write(b"half")
            raise KeyboardInterrupt
        save(file, samples)

    with monkeypatch.context() as patch:
        patch.setattr(sample_set.np, "save", killed)
        assert main(sampled(run, out, "--num=40")) == 130
    assert not out.exists() and len(list((tmp_path / "set.npz.parts").glob("*.npy"))) == 3
    assert main(sampled(run, out, "--num=40")) == 0
    for array, expected in zip(read_set(out), whole_set, strict=True):
        np.testing.assert_array_equal(array, expected)
    assert {path.name for path in tmp_path.iterdir()} == {"set.npz", "set.json"}
    assert json.loads((tmp_path / "set.json").read_text())["cfg_scale"] == 2.0


def test_processes_share_a_set(whole_set, run, tmp_path, monkeypatch):
    monkeypatch.setattr(sample_set, "SAMPLES_PER_PART", 6)
    out = tmp_path / "set.npz"
    for index in (1, 0):
        process = {"process_count": lambda: 2, "process_index": lambda index=index: index}
        with monkeypatch.context() as patch:
            patch.setattr("ibq_jax.evaluate.draw_samples.jax", SimpleNamespace(**vars(jax) | process))
            assert main(sampled(run, out, "--num=40")) == 0
        assert out.exists() == (index == 0)
    np.testing.assert_array_equal(read_set(out)[0], whole_set[0])


def test_a_set_begun_with_other_settings_is_not_continued(run, tmp_path, monkeypatch, capsys):
    out = tmp_path / "set.npz"
    with monkeypatch.context() as patch:
        patch.setattr(sample_set.np, "save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main(sampled(run, out, "--num=9")) == 130
    capsys.readouterr()
    assert "other settings (seed: 0 -> 1)" in refused(sampled(run, out, "--num=9", "--seed=1"), capsys)
    assert main(sampled(run, out, "--num=9")) == 0
    assert "exists already" in refused(sampled(run, out, "--num=9"), capsys)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--labels=0,9"], "labels lie in 0..8; these reach from 0 to 9"),
        (["--labels=-1"], "these reach from -1 to -1"),
        (["--labels=cat"], "'cat' is not integers separated by commas"),
        (["--top-p=0"], "top_p=0.0 is not in (0, 1]"),
        (["--top-p=1.5"], "top_p=1.5 is not in (0, 1]"),
        (["--temperature=-1"], "temperature=-1.0 is not a number of at least 0"),
        (["--cfg-scale=nan"], "guidance scale nan"),
        (["--cfg-interval=0.5"], "guidance interval (0.5,) is not two increasing fractions"),
        (["--cfg-interval=0.8,0.2"], "guidance interval (0.8, 0.2) is not two increasing fractions"),
        (["--num=4"], "a set of --num=N samples is an .npz file"),
        (["--image=none.png"], "--image=none.png does not exist"),
        (["--tokenizer=none"], "config.json does not exist"),
        (["--seed=4294967296"], "seed=4294967296 is not an integer in 0..2**32 - 1"),
    ],
)
def test_wrong_use_of_sample_is_one_line_and_writes_nothing(flags, words, run, tmp_path, capsys):
    assert words in refused(sampled(run, tmp_path / "out.png", *flags), capsys)
    assert not list(tmp_path.iterdir())


def test_a_tokenizers_run_cannot_be_sampled(tokenizer, tmp_path, capsys):
    assert "this needs a generator" in refused(sampled(tokenizer, tmp_path / "out.png"), capsys)


def test_guidance_needs_a_model_that_knows_no_class(codes, tmp_path, capsys):
    workdir, out = tmp_path / "run", tmp_path / "out.png"
    assert main(generator_arguments(workdir, codes, "loss.class_dropout=0.0", "sample.cfg_scale=1.0")) == 0
    assert 'was trained on "no class"' in refused(sampled(workdir, out, "--cfg-scale=2"), capsys)
    assert main(sampled(workdir, out, "--labels=0", "--per-class=1")) == 0


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
    elsewhere = tokenized(other, tmp_path / "codes")
    capsys.readouterr()
    before = logged(run)
    words = refused(generator_arguments(run, elsewhere), capsys)
    assert "tokenizer.fingerprint" in words and f"the run in {run} asks for" in words
    assert logged(run) == before


def copied(codes: Path, out: Path, **fields) -> Path:
    """Returns a copy of a token cache with some of its manifest's fields replaced, or removed if None."""
    shutil.copytree(codes, out)
    manifest = json.loads((out / "token_cache.json").read_text()) | fields
    present = {name: value for name, value in manifest.items() if value is not None}
    (out / "token_cache.json").write_text(json.dumps(present))
    return out


def test_a_run_is_not_continued_with_codes_of_another_precision_or_platform(run, codes, tokenizer, tmp_path, capsys):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for name, cache, words in (
        (
            "precision",
            tokenized(tokenizer, tmp_path / "low", "--precision=bfloat16"),
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
    other_kind = copied(codes, tmp_path / "kind", machine={"platform": "cpu", "device_kind": "another"})
    workdir = tmp_path / "run"
    shutil.copytree(run, workdir)
    assert main(generator_arguments(workdir, other_kind, f"train.steps={STEPS + 1}", *BRIEF)) == 0


def test_a_cache_of_an_earlier_version_trains_and_so_does_its_run(codes, tmp_path):
    old = copied(codes, tmp_path / "old", machine=None, compared_with_float32=None)
    workdir = tmp_path / "run"
    for cache, steps in ((old, 1), (codes, 2)):  # a machine that the run did not note is not compared
        assert main(generator_arguments(workdir, cache, f"train.steps={steps}", *BRIEF)) == 0
        assert logged(workdir)[-1]["step"] == steps
        assert ("machine" in json.loads((workdir / "token_cache.json").read_text())) == (cache == codes)


def manifest_of(run: Path, **fields) -> dict:
    return {"tokenizer": {"path": str(run), "step": 7, "weights": "ema"} | fields.pop("tokenizer"), **fields}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_tokenizer_is_found_whatever_the_precision_of_its_codes(precision, tokenizer):
    trainer, restored = restore_tokenizer(tokenizer)
    made = trainer.model.for_encoding(precision)
    digest = {"fingerprint": fingerprint(made, restored.state.ema)}
    machine = {"platform": "tpu", "device_kind": "TPU v5e"}
    found = find_tokenizer("", manifest_of(tokenizer, tokenizer=digest, precision=precision, machine=machine), True)
    assert found is not None and found[0] == made
    other = {"fingerprint": fingerprint(made, restored.state.params)}
    with pytest.raises(UsageError, match=r"tokenizer.fingerprint: [^\n]* the tokenizer in [^\n]* asks for"):
        find_tokenizer("", manifest_of(tokenizer, tokenizer=other, precision=precision, machine=machine), True)


def test_the_tokenizer_of_an_earlier_versions_codes_is_found(data_dir, tmp_path):
    """They were computed at the type of training, by whose name the manifest calls their precision."""
    run = save_run(tmp_path / "tok", data_dir, "dtype=bfloat16")
    trainer, restored = restore_tokenizer(run)
    digest = {"fingerprint": fingerprint(trainer.model, restored.state.ema)}
    for fields, precision in (({"precision": "bfloat16"}, "bfloat16"), ({}, "float32")):  # imported runs had no field
        found = find_tokenizer("", manifest_of(run, tokenizer=digest, **fields), True)
        assert found is not None and found[0].precision == precision


def test_a_precision_that_this_machine_lacks_is_replaced_by_float32_to_decode(tokenizer, monkeypatch):
    trainer, restored = restore_tokenizer(tokenizer)
    digest = {"fingerprint": fingerprint(trainer.model.for_encoding("bfloat16_3x"), restored.state.ema)}
    machine = {"platform": "tpu", "device_kind": "TPU v5e"}
    monkeypatch.setattr("ibq_jax.tokenizer.model.platform", lambda mesh: "gpu")
    manifest = manifest_of(tokenizer, tokenizer=digest, precision="bfloat16_3x", machine=machine)
    found = find_tokenizer("", manifest, True)
    assert found is not None and found[0].precision == "float32"


def test_an_unfinished_cache_is_refused(codes, tmp_path, capsys):
    unfinished = tmp_path / "codes"
    shutil.copytree(codes, unfinished)
    (unfinished / "token_cache.json").unlink()
    assert "is unfinished: rerun the same tokenize command" in refused(
        generator_arguments(tmp_path / "run", unfinished), capsys
    )
