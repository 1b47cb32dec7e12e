"""Training from the command line, end to end: a preset shrunk, made longer, grown, and used wrongly."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from support.jobs import finished, lines
from support.small_runs import STEPS, arguments

from ibq_jax import Tokenizer
from ibq_jax.__main__ import main
from ibq_jax.data.pipeline import evaluation_batches, open_split

pytestmark = pytest.mark.slow


@pytest.fixture
def train(start):
    """Trains in a process of its own, and returns what that printed."""

    def train(workdir: Path, data_dir: Path, *overrides: str) -> str:
        return finished(start(arguments(workdir, data_dir, *overrides), devices=1))

    return train


def logged(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in lines(workdir)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, data_dir, start):
    """A run that nothing disturbed, and what it printed."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    return workdir, finished(start(arguments(workdir, data_dir), devices=1))


@pytest.mark.usefixtures("optimized")  # the features of 189 images, twice, take longer than to compile their network
def test_a_run_says_and_leaves_what_it_should(whole, data_dir, tmp_path, capsys):
    workdir, out = whole
    assert "perceptual loss: OFF, because torchvision's vgg16-397923af.pth was not found" in out
    assert f"step {STEPS}/{STEPS}" in out and "codebook used" in out
    assert out.splitlines()[-1].startswith("next: python -m ibq_jax evaluate")
    assert [row["step"] for row in logged(workdir) if "loss/total" in row] == list(range(1, STEPS + 1))
    assert [row["step"] for row in logged(workdir) if "validation/psnr" in row] == [6, 12]
    assert {path.name for path in (workdir / "checkpoints").iterdir()} == {"8", "12"}  # the last 2; 12 is the best too
    assert json.loads((workdir / "config.json").read_text())["codebook"]["size"] == 64

    picture, numbers = tmp_path / "picture.png", tmp_path / "numbers.json"
    assert main(["evaluate", f"--run={workdir}", f"--pictures={picture}", f"--json={numbers}", "--columns=3"]) == 0
    assert "PSNR" in capsys.readouterr().out
    measured = json.loads(numbers.read_text())
    assert measured["step"] == STEPS and measured["images"] == 189 and measured["weights"] == "ema"
    assert measured["protocol"]["name"] == "clean" and "rounded to uint8" in measured["protocol"]["description"]
    assert measured["marks"] == ["unreliable with only 189 images: FD-EfficientNetLite0 (1,280 features)"]
    assert json.loads((workdir / "evaluations" / "0000012-ema-clean-openmoji_validation.json").read_text()) == measured
    with Image.open(picture) as image:
        assert image.size == (3 * 96, 4 * 96)

    tokenizer = Tokenizer.load(workdir)
    images = next(
        evaluation_batches(open_split("openmoji", data_dir, "validation"), image_size=16, resize=16, batch_size=4)
    )
    codes = tokenizer.encode(images["image"])
    assert codes.shape == (4, 8, 8) and tokenizer.decode(codes).shape == (4, 16, 16, 3)
    np.testing.assert_array_equal(Tokenizer.load(workdir / "checkpoints" / str(STEPS)).encode(images["image"]), codes)
    raw, averaged = jax.device_get((Tokenizer.load(workdir, use_ema=False).params, tokenizer.params))
    difference = jax.tree.map(lambda a, b: abs(a - b).max(), raw, averaged)
    assert max(jax.tree.leaves(difference)) > 0


def test_a_complete_run_is_left_alone_and_can_be_made_longer(whole, data_dir, train, tmp_path):
    workdir = tmp_path / "longer"
    shutil.copytree(whole[0], workdir)
    assert "complete: step 12 of 12" in train(workdir, data_dir)
    assert logged(workdir) == logged(whole[0])
    train(workdir, data_dir, "train.steps=13")
    assert logged(workdir)[-2]["step"] == 13


def test_a_run_continues_with_more_codes_and_with_fewer(whole, data_dir, train, tmp_path, capsys):
    grown, pruned = tmp_path / "grown", tmp_path / "pruned"
    assert main(["convert", f"--in={whole[0]}", f"--out={grown}", "--codebook-size=128"]) == 0
    assert f"step {STEPS} with 128 codes instead of 64" in capsys.readouterr().out
    longer = train(grown, data_dir, "codebook.size=128", f"train.steps={STEPS + 2}")
    assert f"continuing from step {STEPS}" in longer and logged(grown)[-1]["step"] == STEPS + 2
    assert main(["convert", f"--in={grown}", f"--out={pruned}", "--prune", "--multiple-of=1"]) == 0
    size, kept = json.loads((pruned / "config.json").read_text())["codebook"]["size"], np.load(pruned / "index_map.npy")
    assert len(kept) == size < 128
    renumbered = np.load(pruned / "old_to_new.npy")
    assert renumbered.shape == (128,) and np.all(renumbered[kept] == np.arange(size))
    assert np.sum(renumbered == -1) == 128 - size
    split = open_split("openmoji", data_dir, "validation")
    (images,) = evaluation_batches(split, image_size=16, resize=16, batch_size=len(split))
    tokenizers = Tokenizer.load(grown), Tokenizer.load(pruned)
    codes = [np.asarray(tokenizer.encode(images["image"])) for tokenizer in tokenizers]
    np.testing.assert_array_equal(codes[1], renumbered[codes[0]])
    assert set(codes[1].flat) == set(range(size))  # of what is left every code is used
    decoded = [tokenizer.decode(codes) for tokenizer, codes in zip(tokenizers, codes, strict=True)]
    np.testing.assert_array_equal(decoded[1], decoded[0])


def test_convert_used_wrongly_is_one_line_and_writes_nothing(whole, tmp_path, capsys):
    run, out = f"--in={whole[0]}", tmp_path / "out"
    for flags, words in (
        ([run, "--codebook-size=64"], "the codebook has 64 codes already"),
        ([run], "a run becomes a file"),
        ([run, "--prune", "--multiple-of=64"], "rounded up to a multiple of 64 none can be dropped"),
        ([run, "--codebook-size=128", "--spread=2"], "'2' is not a fraction"),
        (["--in=nowhere", "--codebook-size=128"], "nowhere/config.json does not exist"),
    ):
        assert main(["convert", *flags, f"--out={out}"]) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1
        assert not out.exists() and not list(tmp_path.iterdir())
    assert main(["convert", run, f"--out={whole[0]}", "--codebook-size=128"]) == 2
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "preset", "words"),
    [
        ((), "openmoji23", "no preset 'openmoji23'; did you mean openmoji32?"),
        (("codebok.size=8",), "openmoji32", "no field 'codebok.size'; did you mean codebook.size?"),
        (("codebook.size=many",), "openmoji32", "codebook.size is of type int (such as 64), which 'many' is not"),
        (("codebook.block_size=48",), "openmoji32", "in blocks of codebook.block_size=48"),
        (
            ("data.batch_size=12",),
            "openmoji32",
            "data.batch_size=12 does not divide over 8 devices; use a multiple of 8",
        ),
        (("mesh.codebook=3",), "openmoji32", "does not fit 8 devices"),
        (("data.image_size=17",), "openmoji32", "data.image_size=17 is not a multiple of the downsampling 2; try 16"),
        (("model.channel_multipliers=(1,2)",), "openmoji32", "model.num_res_blocks=0 leaves no block in which"),
        (("model.num_res_blocks=-1",), "openmoji32", "model.num_res_blocks=-1 is negative"),
        (("data.resize=8",), "openmoji32", "data.resize=8 is smaller than data.image_size=16"),
        (("data.name=photos",), "openmoji32", "no data set 'photos' in"),
        (("data.validation_split=test",), "openmoji32", "no split 'test'; it has "),
        (
            ("quantizer.entropy_group_tokens=100",),
            "openmoji32",
            "entropy_group_tokens=100 does not divide the 512 tokens",
        ),
        (("discriminator.norm_group=3",), "openmoji32", "norm_group=3 does not divide the micro-batch of 8 images"),
        (("log.every=0",), "openmoji32", "log.every=0 is not positive"),
        (("train.steps=0",), "openmoji32", "train.steps and train.epochs are both 0"),
        (("loss.perceptual_file=/none.pth",), "openmoji32", "loss.perceptual_file is /none.pth, which does not exist"),
        (("dtype=float8",), "openmoji32", "dtype=float8 is not one of float32, bfloat16"),
        (("evaluate.batch_size=12",), "openmoji32", "evaluate.batch_size=12 does not divide over 8 devices"),
        (("seed=-1",), "openmoji32", "seed=-1"),
        (
            ("codebook.implementation=sparse",),
            "openmoji32",
            "codebook.implementation=sparse is not one of streamed, dense",
        ),
        (("model.channels=20",), "openmoji32", "model.channels=20 is not a multiple of 32"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(overrides, preset, words, data_dir, tmp_path, capsys):
    assert main(arguments(tmp_path / "run", data_dir, *overrides, preset=preset)) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and error.startswith("ibq_jax train: ")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "the following arguments are required: --config, --workdir"),
        (["--config=configs/none.py:a", "--workdir=w"], "there is no file configs/none.py"),
        (["--config=c", "--workdir=w", "--steps=3"], "unknown argument --steps=3"),
    ],
)
def test_wrong_flags_are_one_line(argv, words, capsys):
    assert main(["train", *argv]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_a_workdir_of_another_config_names_the_fields_that_differ(whole, data_dir, capsys):
    workdir = whole[0]
    before = logged(workdir)
    assert main(arguments(workdir, data_dir, "codebook.size=128", "optimizer.learning_rate=0.5", "log.every=3")) == 2
    error = capsys.readouterr().err
    assert "holds a run of another config (codebook.size: 64 -> 128; optimizer.learning_rate: 0.001 -> 0.5)" in error
    assert error.count("\n") == 1 and logged(workdir) == before


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--run=nowhere"], "nowhere/config.json does not exist"),
        (["--run=nowhere", "--pictures=no/such/folder.png"], "the folder no/such does not exist"),
        (["--run=nowhere", "--examples=-3"], "'-3' is not an integer of at least 0"),
        (["--run=nowhere", "--weights=best"], "invalid choice: 'best'"),
    ],
)
def test_evaluate_used_wrongly_is_one_line(argv, words, capsys):
    assert main(["evaluate", *argv]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
