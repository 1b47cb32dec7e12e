"""A run's folder belongs to one config: which fields may change when a run is continued, and which may not."""

import json
from pathlib import Path

import pytest
from support.small_runs import ROOT

from ibq_jax.base.config import flatten, load_config, run_file, save_config
from ibq_jax.base.errors import UsageError
from ibq_jax.base.saved_run import IMPORTED
from ibq_jax.training import generator, joint, tokenizer
from ibq_jax.training.fit import FieldRoles, check_same_run

ROLES = {"tokenizer": tokenizer.FIELD_ROLES, "autoregressive": generator.FIELD_ROLES, "joint": joint.FIELD_ROLES}
RENAMED = run_file(ROOT / "configs" / "renamed_fields.py").RENAMED


def config(stage: str, *overrides: str):
    return load_config(f"{ROOT}/configs/{stage}.py:openmoji32", [f"--config.{field}" for field in overrides])


def save(workdir: Path, stage: str, imported: bool = False) -> Path:
    workdir.mkdir()
    save_config(config(stage), workdir / "config.json")
    if imported:
        (workdir / IMPORTED).write_text("{}")
    return workdir


@pytest.mark.parametrize("stage", ROLES)
def test_every_role_names_fields_that_exist(stage):
    fields, roles = flatten(config(stage)), ROLES[stage]
    for entry in (*roles.free, *roles.location, *roles.network, *roles.not_structural):
        assert any(f"{name}:".startswith(entry) for name in fields), entry
    assert set(roles.location) <= fields.keys()


@pytest.mark.parametrize(
    ("stage", "change"),
    [
        ("tokenizer", "train.steps=7"),
        ("tokenizer", "mesh.codebook=2"),
        ("tokenizer", "codebook.block_size=32"),
        ("tokenizer", "codebook_monitor.usage_floor=0.5"),
        ("tokenizer", "data.dir=elsewhere"),
        ("autoregressive", "token_cache=elsewhere"),
        ("autoregressive", "model.attention=flash"),
        ("autoregressive", "watchdog.slow_factor=3.0"),
        ("autoregressive", "sample.cfg_scale=3.0"),
        ("joint", "train.steps=7"),
        ("joint", "tokenizer.data.dir=elsewhere"),
        ("joint", "generator.sample.cfg_scale=3.0"),
        ("joint", "joint.init_tokenizer=elsewhere"),
    ],
)
def test_a_free_field_may_change(stage, change, tmp_path):
    workdir = save(tmp_path / "run", stage)
    changed = config(stage, change)
    check_same_run(workdir, changed, ROLES[stage])
    assert flatten(json.loads((workdir / "config.json").read_text())) == flatten(changed)  # the run takes it over


@pytest.mark.parametrize(
    ("stage", "change"),
    [
        ("tokenizer", "codebook.size=128"),
        ("tokenizer", "optimizer.learning_rate=0.5"),
        ("tokenizer", "codebook_monitor.window_tokens=1000"),
        ("tokenizer", "data.batch_size=8"),
        ("autoregressive", "model.dropout=0.3"),
        ("autoregressive", "optimizer.hold_fraction=0.5"),
        ("joint", "joint.prediction_weight=0.5"),
        ("joint", "tokenizer.data.name=elsewhere"),
        ("joint", "generator.model.dropout=0.3"),
    ],
)
def test_any_other_field_is_named_and_nothing_is_written(stage, change, tmp_path):
    workdir = save(tmp_path / "run", stage)
    before = (workdir / "config.json").read_text()
    with pytest.raises(UsageError, match=rf"holds a run of another config \({change.partition('=')[0]}: "):
        check_same_run(workdir, config(stage, change), ROLES[stage])
    assert (workdir / "config.json").read_text() == before


@pytest.mark.parametrize(
    ("stage", "change", "allowed"),
    [
        ("tokenizer", "optimizer.learning_rate=0.5", True),
        ("tokenizer", "codebook.block_size=32", True),
        ("tokenizer", "codebook.implementation=dense", True),
        ("tokenizer", "codebook.init_scale=2.0", True),
        ("tokenizer", "data.batch_size=8", True),
        ("tokenizer", "codebook.size=128", False),
        ("tokenizer", "quantizer.name=vq", False),
        ("tokenizer", "model.attention_resolutions=8", False),
        ("autoregressive", "model.dropout=0.3", True),
        ("autoregressive", "model.gamma_init=0.1", True),
        ("autoregressive", "model.attention=flash", True),
        ("autoregressive", "model.num_layers=2", False),
        ("autoregressive", "model.use_pretrained_codebook=true", False),
    ],
)
def test_an_imported_run_fixes_only_its_networks_until_it_is_trained(stage, change, allowed, tmp_path):
    workdir, changed = save(tmp_path / "run", stage, imported=True), config(stage, change)
    if allowed:
        check_same_run(workdir, changed, ROLES[stage])
    else:
        with pytest.raises(UsageError, match="holds a run of another config"):
            check_same_run(workdir, changed, ROLES[stage])
    (workdir / "metrics.jsonl").write_text("{}\n")  # from its first step on it is a run like any other
    other = config(stage, "optimizer.ema_decay=0.5")
    with pytest.raises(UsageError, match=r"optimizer\.ema_decay"):
        check_same_run(workdir, other, ROLES[stage])


@pytest.mark.parametrize("stage", ROLES)
def test_a_run_with_the_field_names_of_an_earlier_version_is_the_same_run(stage, tmp_path):
    old_names = {today: before for before, today in RENAMED[stage].items()}
    fields: dict = {}
    for name, value in flatten(config(stage)).items():
        *groups, leaf = old_names.get(name, name).split(".")
        group = fields
        for part in groups:
            group = group.setdefault(part, {})
        group[leaf] = value
    (tmp_path / "config.json").write_text(json.dumps(fields))
    check_same_run(tmp_path, config(stage), ROLES[stage])
    assert json.loads((tmp_path / "config.json").read_text()) == json.loads(config(stage).to_json())


def test_hosts_of_one_job_may_have_their_files_in_different_places(tmp_path, monkeypatch):
    compared = []
    monkeypatch.setattr("ibq_jax.training.fit.check_alike", lambda what, fields: compared.append(fields))
    roles = FieldRoles(free=(), location=("data.dir",), network=(), not_structural=())
    check_same_run(tmp_path / "run", config("tokenizer"), roles)
    assert "data.dir" not in compared[0] and compared[0]["data.name"] == "openmoji"
