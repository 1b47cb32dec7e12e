"""Runs and files that the version before the renamed fields wrote: they load, convert and continue as today's do."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from support.small_runs import ROOT, arguments, save_run

from ibq_jax import Tokenizer
from ibq_jax.__main__ import main
from ibq_jax.base.checkpoint import Checkpoints
from ibq_jax.base.config import differences, flatten, load_config, read_config, run_file
from ibq_jax.interop.to_file import export
from ibq_jax.pretrained.tensor_files import write_tensors
from ibq_jax.tokenizer.restore import restore_whole_run

HISTORY = run_file(ROOT / "configs" / "renamed_fields.py")
FIELDS = ("train.grad_accum_steps=2", "codebook_monitor.usage_floor=0.125", "discriminator.norm_group=1")


def with_old_names(fields: dict) -> dict:
    """Returns a config's fields under the names of the earlier version."""
    old_names = {today: before for before, today in HISTORY.RENAMED[fields["stage"]].items()}
    old: dict = {}
    for name, value in flatten(fields).items():
        *groups, leaf = old_names.get(name, name).split(".")
        group = old
        for part in groups:
            group = group.setdefault(part, {})
        group[leaf] = value
    return old


def save_as_earlier_version(run: Path, old: Path) -> Path:
    """Writes a copy of a tokenizer's run with the earlier names of its fields and of the leaves of its state."""
    _, restored = restore_whole_run(run)
    leaves = {name: getattr(restored.state, name) for name in ("step", "params", "optimizer", "ema", "window")}
    old.mkdir()
    (old / "config.json").write_text(json.dumps(with_old_names(json.loads((run / "config.json").read_text()))))
    checkpoints = Checkpoints(old / "checkpoints")
    checkpoints.save(restored.step, leaves | {"adversary": restored.state.discriminator}, restored.metadata)
    checkpoints.close()
    return old


@pytest.fixture(scope="module")
def runs(tmp_path_factory, data_dir):
    """The same run as today's version and as the earlier one writes it."""
    folder = tmp_path_factory.mktemp("runs")
    today = save_run(folder / "today", data_dir, *FIELDS)
    return today, save_as_earlier_version(today, folder / "earlier")


def test_the_config_is_read_under_todays_names(runs):
    today, earlier = runs
    assert "accumulate" in (earlier / "config.json").read_text()
    assert differences(read_config(earlier / "config.json"), read_config(today / "config.json")) == []


def test_the_whole_state_is_read_with_the_moments_of_both_optimizers(runs):
    (_, today), (_, earlier) = (restore_whole_run(run) for run in runs)
    moments = jax.tree.leaves(earlier.state.discriminator.optimizer)
    assert len(moments) > 4 and max(float(np.abs(leaf).max()) for leaf in moments) > 0
    jax.tree.map(np.testing.assert_array_equal, earlier.state, today.state)


def test_codes_and_exported_tensors_are_the_same(runs):
    images = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
    today, earlier = (np.asarray(Tokenizer.load(run).encode(images)) for run in runs)
    np.testing.assert_array_equal(earlier, today)
    (today, _), (earlier, _) = (export(run) for run in runs)
    assert earlier.keys() == today.keys()
    for name, tensor in earlier.items():
        np.testing.assert_array_equal(tensor, today[name], err_msg=name)


def test_a_file_that_the_earlier_version_wrote_keeps_its_configs_fields(runs, tmp_path):
    tensors, about = export(runs[0])
    about["config"] = json.dumps(with_old_names(json.loads(about["config"])))
    write_tensors(tmp_path / "earlier.safetensors", tensors, about)
    source = f"--in={tmp_path / 'earlier.safetensors'}"
    assert main(["convert", source, f"--out={tmp_path / 'run'}", "--config.watch.usage_floor=0.25"]) == 0
    imported, written = read_config(tmp_path / "run" / "config.json"), read_config(runs[0] / "config.json")
    assert differences(written, imported) == ["codebook_monitor.usage_floor: 0.125 -> 0.25"]
    assert main(["convert", source, f"--out={tmp_path / 'hub'}", "--hub"]) == 0
    assert json.loads((tmp_path / "hub" / "config.json").read_text())["config"]["train"]["grad_accum_steps"] == 2


def test_commands_with_the_earlier_names_give_the_same_config(data_dir, tmp_path):
    old_names = {today: before for before, today in HISTORY.RENAMED["tokenizer"].items()}
    _, spec, _, *fields = arguments(tmp_path, data_dir, *FIELDS)
    renamed = []
    for field in fields:
        name, _, value = field.removeprefix("--config.").partition("=")
        renamed.append(f"--config.{old_names.get(name, name)}={value}")
    assert renamed != fields
    spec = spec.removeprefix("--config=")
    assert differences(load_config(spec, fields), load_config(spec, renamed)) == []
