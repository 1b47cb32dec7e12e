"""The sample command: contact sheets, and sets that are killed, shared and continued; and wrong use."""

import json
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from PIL import Image
from support.generator_runs import refused
from support.small_runs import save_generator_run

from ibq_jax import Generator, Tokenizer
from ibq_jax.__main__ import main
from ibq_jax.evaluate import sample_set

pytestmark = pytest.mark.slow


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
    fields, out = ("loss.class_dropout=0.0", "sample.cfg_scale=1.0"), tmp_path / "out.png"
    workdir = save_generator_run(tmp_path / "run", codes, *fields)
    assert 'was trained on "no class"' in refused(sampled(workdir, out, "--cfg-scale=2"), capsys)
    assert main(sampled(workdir, out, "--labels=0", "--per-class=1")) == 0
