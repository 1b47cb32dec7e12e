"""Both stages, chained through the real commands: pictures in, the same pictures out of the generator."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from support.small_runs import ROOT, save_untrained_run

from ibq_jax import Generator
from ibq_jax.__main__ import main
from ibq_jax.data.token_cache import open_token_cache

PICTURES = 64
BY_HEART = (
    "model.dropout=0.0",
    "loss.class_dropout=0.0",
    "sample.cfg_scale=1.0",
    "optimizer.ema_decay=0.0",
    "data.batch_size=16",
    "train.steps=480",
    "optimizer.end_lr_factor=0.01",
    "log.every=10",
    "evaluate.every=1000",
    "log.images_every=1000",
)


@pytest.mark.slow
@pytest.mark.long
def test_the_preset_learns_64_pictures_by_heart_and_completes_them_from_their_first_row(tmp_path):
    """The tokenizer keeps its first weights: the chain does not ask what its codes look like."""
    data, tokenizer, codes, run = (tmp_path / name for name in ("data", "tok", "codes", "ar"))
    assert main(["prepare", "openmoji", "--size=64", f"--data_dir={data}"]) == 0
    save_untrained_run(tokenizer, "openmoji64", f"data.dir={data}", "seed=1")
    splits = f"--splits=train[:{PICTURES}],validation[:16]"
    assert main(["tokenize", f"--tokenizer={tokenizer}", f"--out={codes}", "--views=centre", splits]) == 0
    command = [sys.executable, "-m", "ibq_jax", "train", f"--config={ROOT}/configs/autoregressive.py:openmoji64"]
    fields = [f"--config.{field}" for field in (*BY_HEART, f"codes={codes}")]
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "2"}  # eight simulated ones would take twice as long
    subprocess.run([*command, f"--workdir={run}", *fields], cwd=ROOT, env=environment, check=True)
    losses = [json.loads(line).get("loss/total") for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [loss for loss in losses if loss][-1] < 0.1

    pictures = list(open_token_cache(codes, "train"))
    known = np.stack([picture["codes"][0] for picture in pictures]).astype(np.int32)
    labels = np.array([picture["label"] for picture in pictures])
    beginnings = {(label, *row) for label, row in zip(labels, known[:, 0].tolist(), strict=True)}
    assert len(beginnings) == PICTURES  # class and first row tell which picture it is
    drawn = Generator.load(run).sample(labels, cfg_scale=1.0, temperature=0.0, prefix=known[:, :1])
    np.testing.assert_array_equal(drawn, known)
