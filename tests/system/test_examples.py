"""The scripts in examples/ run on small runs and write what they promise."""

import importlib.util
import json

import numpy as np
import pytest
from PIL import Image
from support import small_generators
from support.small_runs import ROOT, SMALL, save_run

from ibq_jax.pretrained.tensor_files import write_tensors

GENERATOR = {"vocab_size": 64, "block_size": 64, "n_layer": 2, "n_head": 2, "n_embd": 32, "class_num": 5}


def run_example(name: str, *argv: str):
    """Runs the example's `main` and returns its module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main([*argv])
    return module


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory, data_dir):
    return save_run(tmp_path_factory.mktemp("runs") / "tokenizer", data_dir)


@pytest.fixture
def photographs(tmp_path):
    folder = tmp_path / "photographs"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, shape in (("wide.png", (20, 33, 3)), ("high.jpg", (40, 24, 3))):
        Image.fromarray(rng.integers(0, 256, shape, np.uint8)).save(folder / name)
    (folder / "notes.txt").write_text("not an image")
    return folder


def test_reconstruct_folder(tokenizer, photographs, tmp_path, capsys):
    sheet = tmp_path / "sheet.png"
    run_example("reconstruct_folder", f"--tokenizer={tokenizer}", f"--images={photographs}", f"--out={sheet}")
    assert "2 images of 8x8 codes: mean PSNR" in capsys.readouterr().out
    with Image.open(sheet) as image:
        assert image.height == 2 * (64 + 4) + 4  # two rows of images enlarged to 64 pixels


def test_draw_and_complete(tokenizer, photographs, tmp_path):
    generator, sheet = tmp_path / "generator.safetensors", tmp_path / "sheet.png"
    tensors = small_generators.generator(grid=(8, 8)).to_torch()
    write_tensors(generator, tensors, {"architecture": json.dumps(GENERATOR)})
    flags = [f"--generator={generator}", f"--tokenizer={tokenizer}", "--labels=1,4", "--columns=3"]
    run_example("draw_and_complete", *flags, f"--image={photographs / 'wide.png'}", f"--out={sheet}")
    with Image.open(sheet) as image:
        assert image.height == 3 * (64 + 4) + 4  # one row per class, then the completions


@pytest.mark.slow
def test_train_with_another_loss(data_dir, tmp_path):
    fields = [f"--config.{field}" for field in (*SMALL, f"data.dir={data_dir}", "train.steps=2", "evaluate.every=2")]
    workdir = tmp_path / "edges"
    example = run_example("train_with_another_loss", f"--workdir={workdir}", *fields)
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    logged = next(row for row in rows if "loss/edges" in row)
    expected = logged["loss/l1"] + example.EDGE_WEIGHT * logged["loss/edges"] + logged["loss/codebook"]
    weight = json.loads((workdir / "config.json").read_text())["loss"]["adversarial_weight"]
    expected += weight * logged["loss/adversarial"]
    assert logged["loss/total"] == pytest.approx(expected, rel=1e-4) and logged["loss/edges"] > 0
