"""Fine-tuning from the command line: a run that starts from weights, and a better decoder for codes that stay valid."""

import json
import shutil

import numpy as np
import pytest
from support.jobs import lines
from support.small_runs import arguments, save_run

from ibq_jax.__main__ import main
from ibq_jax.base.config import read_config
from ibq_jax.pretrained.tensor_files import read_tensors

pytestmark = pytest.mark.slow

BRIEF = ("train.steps=4", "checkpoint.every=2", "evaluate.every=100", "log.images_every=100")
DECODER = (*BRIEF, "finetune.freeze=encoder,codebook", "finetune.discriminator_warmup_steps=1")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data_dir):
    """A run with weights, raw and averaged ones that differ."""
    return save_run(tmp_path_factory.mktemp("runs") / "trained", data_dir)


@pytest.fixture(scope="module")
def finetuned(tmp_path_factory, data_dir, trained):
    workdir = tmp_path_factory.mktemp("runs") / "decoder"
    assert main([*arguments(workdir, data_dir, *DECODER), f"--init={trained}"]) == 0
    return workdir


def exported(run, path, weights: str = "ema") -> dict[str, np.ndarray]:
    assert main(["convert", f"--in={run}", f"--out={path}", f"--weights={weights}"]) == 0
    return read_tensors(path)


def evaluations(workdir) -> list[dict]:
    """Returns the run's scalars of validations."""
    rows = map(json.loads, lines(workdir))
    return [row for row in rows if "validation/psnr" in row]


def test_only_the_decoders_tensors_differ(trained, finetuned, tmp_path):
    before, after = (exported(run, tmp_path / f"{run.name}.safetensors") for run in (trained, finetuned))
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert before.keys() == after.keys() and changed
    assert {name.split(".")[0] for name in changed} <= {"decoder", "post_quant_conv"}


def test_a_continued_run_says_that_its_codes_are_those_of_before(finetuned, data_dir, tmp_path, capsys):
    workdir = tmp_path / "longer"
    shutil.copytree(finetuned, workdir)
    assert main(arguments(workdir, data_dir, *DECODER, "train.steps=5")) == 0  # without --init, which it would ignore
    out = capsys.readouterr().out
    assert "the codes of 189 validation images, 12,096 in all, are those of before training" in out
    first, *_, last = evaluations(workdir)
    assert first["step"] == 0 and last["step"] == 5
    said = next(line for line in out.splitlines() if line.startswith("before and after 5 steps: "))
    assert f"validation/psnr {first['validation/psnr']:.4g} -> {last['validation/psnr']:.4g}" in said
    before = np.load(workdir / "codes_before.npy")
    before[3, 4, 5] ^= 1
    np.save(workdir / "codes_before.npy", before)
    assert main(arguments(workdir, data_dir, *DECODER, "train.steps=5")) == 1
    assert "1 of 12,096 codes of validation images changed, though their parts are frozen" in capsys.readouterr().err


def test_it_goes_on_to_the_same_bits(finetuned, trained, data_dir, tmp_path):
    workdir = tmp_path / "stopped"
    assert main([*arguments(workdir, data_dir, *DECODER, "train.steps=2"), f"--init={trained}"]) == 0
    assert main(arguments(workdir, data_dir, *DECODER)) == 0
    ours, theirs = (exported(run, tmp_path / f"{run.name}.safetensors", "all") for run in (workdir, finetuned))
    for name in theirs:
        np.testing.assert_array_equal(ours[name], theirs[name])


def test_a_file_is_a_start_too(trained, data_dir, tmp_path):
    file, workdir = tmp_path / "weights.safetensors", tmp_path / "run"
    weights = exported(trained, file)
    # One step, in which only the discriminator learns.
    assert main([*arguments(workdir, data_dir, *DECODER, "train.steps=1"), f"--init={file}"]) == 0
    again = exported(workdir, tmp_path / "again.safetensors")
    assert all(np.array_equal(weights[name], again[name]) for name in weights)
    first, last = evaluations(workdir)
    assert first == last | {"step": 0}
    assert read_config(workdir / "config.json").finetune.discriminator_warmup_steps == 1


def test_weights_of_another_model_are_refused(trained, data_dir, tmp_path, capsys):
    command = arguments(tmp_path / "run", data_dir, *BRIEF, "codebook.size=128")
    assert main([*command, f"--init={trained}"]) == 2
    error = capsys.readouterr().err
    assert "the initial weights are of another model than the config: quantize/codebook is 64x8, here 128x8" in error
    assert main([*command, f"--init={tmp_path / 'absent'}"]) == 2
    assert "absent" in capsys.readouterr().err


def test_what_is_frozen_is_decided_at_the_start(finetuned, data_dir, capsys):
    assert main(arguments(finetuned, data_dir, *DECODER, "finetune.freeze=codebook")) == 2
    assert "finetune.freeze: 'encoder,codebook' -> 'codebook'" in capsys.readouterr().err
