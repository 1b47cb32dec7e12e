"""`ibq_jax.train`, the library call: a run in a folder, continued by the same call, from any thread."""

import json
import threading
from pathlib import Path

import numpy as np
import pytest
from support.small_runs import ROOT, SMALL

from ibq_jax import Tokenizer, load_config, train
from ibq_jax.autoregressive.step import GeneratorTrainer
from ibq_jax.base.errors import UsageError

PRESET = f"{ROOT}/configs/tokenizer.py:openmoji32"


def small(data_dir, *fields: str):
    overrides = [*SMALL, f"data.dir={data_dir}", "train.steps=2", "evaluate.every=2", "log.images_every=2", *fields]
    return load_config(PRESET, [f"--config.{field}" for field in overrides])


@pytest.fixture(scope="module")
def run(tmp_path_factory, data_dir):
    return train(small(data_dir), str(tmp_path_factory.mktemp("runs") / "run"))


def losses(workdir: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss/total"] for row in rows if "loss/total" in row}


@pytest.mark.slow
def test_a_run_comes_back_from_a_folder_given_as_text(run):
    assert isinstance(run.workdir, Path) and run.saved_step() == 2 and run.config.codebook.size == 64
    assert losses(run.workdir).keys() == {1, 2}
    codes = Tokenizer.load(run.workdir).encode(np.zeros((1, 16, 16, 3), np.uint8))
    assert codes.shape == (1, 8, 8)


@pytest.mark.slow
def test_the_same_call_continues_also_in_another_thread(run, data_dir):
    """A thread other than the main one, as in some notebooks and servers, cannot handle signals."""
    before, done = losses(run.workdir), []
    thread = threading.Thread(target=lambda: done.append(train(small(data_dir, "train.steps=3"), run.workdir)))
    thread.start()
    thread.join()
    assert done[0].saved_step() == 3
    after = losses(run.workdir)
    assert after.keys() == {1, 2, 3} and {step: after[step] for step in before} == before


@pytest.mark.slow
def test_another_config_in_the_same_folder_is_refused(run, data_dir):
    with pytest.raises(UsageError, match=r"holds a run of another config \(optimizer\.learning_rate: "):
        train(small(data_dir, "optimizer.learning_rate=0.5"), run.workdir)


def test_an_unknown_stage_names_those_that_exist(data_dir, tmp_path):
    config = small(data_dir)
    config.stage = "diffusion"
    with pytest.raises(UsageError, match="stage 'diffusion'; the stages are tokenizer, autoregressive"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_trainer_of_the_other_stage_is_refused(data_dir, tmp_path):
    with pytest.raises(UsageError, match=r"GeneratorTrainer does not fit stage 'tokenizer'; .* TokenizerTrainer"):
        train(small(data_dir), tmp_path / "run", trainer_class=GeneratorTrainer)
    assert not (tmp_path / "run").exists()
