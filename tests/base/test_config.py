"""Config files, overrides and saved configs: wrong ones are refused in one line, old field names are upgraded."""

import json
from pathlib import Path

import pytest

from ibq_jax.base.config import (
    differences,
    flatten,
    load_config,
    preset_folder,
    preset_names,
    read_config,
    run_file,
    save_config,
)
from ibq_jax.base.errors import UsageError

CONFIGS = Path(__file__).parents[2] / "configs"
TOKENIZER = str(CONFIGS / "tokenizer.py")
HISTORY = run_file(CONFIGS / "renamed_fields.py")
RENAMED = [(stage, old, new) for stage, names in HISTORY.RENAMED.items() for old, new in names.items()]


def test_overrides_keep_the_field_s_type():
    config = load_config(
        f"{TOKENIZER}:imagenet256_16384",
        [
            "--config.codebook.size=8192",
            "--config.optimizer.learning_rate=1",
            "--config.model.channel_multipliers=1,2",
            "--config.data.name=mine",
            "--config.optimizer.drop_epochs=()",
        ],
    )
    assert config.codebook.size == 8192
    assert config.optimizer.learning_rate == 1.0 and isinstance(config.optimizer.learning_rate, float)
    assert config.model.channel_multipliers == (1, 2)
    assert config.data.name == "mine"
    assert config.optimizer.drop_epochs == ()


@pytest.mark.parametrize(
    ("preset", "override", "words"),
    [
        ("openmoji46", "", "did you mean openmoji64"),
        ("openmoji64", "--config.codebook.sizes=4", "did you mean codebook.size"),
        ("openmoji64", "--config.codebook.size=4.5", "of type int"),
        ("openmoji64", "--config.codebook.size=four", "of type int"),
        ("openmoji64", "--config.optimizer.learning_rate=fast", "of type float"),
        ("openmoji64", "--config.model.channel_multipliers=wide", "of type tuple"),
        ("openmoji64", "--config.codebook=4", "it is a group"),
        ("openmoji64", "--config.codebook.size", "write --config.codebook.size=VALUE"),
    ],
)
def test_a_wrong_preset_or_override_is_one_line(preset, override, words):
    with pytest.raises(UsageError) as caught:
        load_config(f"{TOKENIZER}:{preset}", [override] if override else [])
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_config_file_is_named():
    with pytest.raises(UsageError, match=r"there is no file configs/tokeniser\.py"):
        load_config("configs/tokeniser.py:openmoji64")


def test_a_saved_config_comes_back_equal(tmp_path):
    config = load_config(f"{TOKENIZER}:openmoji32")
    save_config(config, tmp_path / "config.json")
    assert differences(config, read_config(tmp_path / "config.json")) == []


def test_differences_name_fields_and_both_values():
    overrides = ["--config.model.resolution=64", "--config.data.batch_size=8", "--config.mesh.fsdp=2"]
    old, new = load_config(f"{TOKENIZER}:openmoji32"), load_config(f"{TOKENIZER}:openmoji32", overrides)
    assert differences(old, new, ignore=("data.", "mesh.")) == ["model.resolution: 32 -> 64"]


@pytest.mark.parametrize("text", ["", "{", "[1]", "\x00"])
def test_a_broken_saved_config_is_a_usage_error(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UsageError, match="is not a saved config"):
        read_config(tmp_path / "config.json")


def other_value(value):
    """Returns another value of the same type."""
    match value:
        case bool():
            return not value
        case int() | float():
            return value + 3
        case str():
            return value + "_other"
    raise AssertionError(f"no renamed field is of type {type(value)}")


def with_old_name(fields: dict, old: str, new: str, value) -> dict:
    """Returns a config's nested fields in which `old` = value stands in place of `new`."""
    flat = flatten(fields)
    assert new in flat and old not in flat
    del flat[new]
    nested: dict = {}
    for name, content in (flat | {old: value}).items():
        *groups, leaf = name.split(".")
        inner = nested
        for group in groups:
            inner = inner.setdefault(group, {})
        inner[leaf] = content
    return nested


@pytest.mark.parametrize(("stage", "old", "new"), RENAMED)
def test_a_saved_config_with_an_old_name_has_the_same_value_under_the_new_one(stage, old, new, tmp_path):
    config = load_config(f"{stage}:openmoji32")
    value = other_value(flatten(config)[new])
    (tmp_path / "config.json").write_text(json.dumps(with_old_name(config.to_dict(), old, new, value)))
    read = flatten(read_config(tmp_path / "config.json"))
    assert read == flatten(config) | {new: value}


@pytest.mark.parametrize(("stage", "old", "new"), RENAMED)
def test_an_override_may_use_an_old_name(stage, old, new):
    config = load_config(f"{stage}:openmoji32")
    value = other_value(flatten(config)[new])
    overridden = load_config(f"{stage}:openmoji32", [f"--config.{old}={value}"])
    assert flatten(overridden) == flatten(config) | {new: value}


@pytest.mark.parametrize(("stage", "old", "new"), RENAMED)
def test_a_config_file_of_ones_own_may_use_an_old_name(stage, old, new, tmp_path):
    config = load_config(f"{stage}:openmoji32")
    value = other_value(flatten(config)[new])
    fields = with_old_name(config.to_dict(), old, new, value)
    (tmp_path / "mine.py").write_text(
        f"from ml_collections import ConfigDict\nPRESETS = ('mine',)\ndef get_config(preset):\n"
        f"    return ConfigDict({fields!r})\n"
    )
    own = load_config(f"{tmp_path}/mine.py:mine", [f"--config.{new}={other_value(value)}"])
    assert flatten(own) == flatten(config) | {new: other_value(value)}
    assert flatten(load_config(f"{tmp_path}/mine.py:mine")) == flatten(config) | {new: value}


@pytest.mark.parametrize("stage", HISTORY.RENAMED)
def test_every_new_name_is_in_every_preset_and_no_old_one_is(stage):
    assert set(HISTORY.RENAMED) == set(HISTORY.RENAMED_LEAVES) == set(HISTORY.ADDED)
    file = preset_folder() / f"{stage}.py"
    for preset in preset_names(str(file)):
        names = flatten(run_file(file).get_config(preset)).keys()
        assert names >= {*HISTORY.RENAMED[stage].values(), *HISTORY.ADDED[stage]}, preset
        assert not names & HISTORY.RENAMED[stage].keys(), preset


def test_a_config_saved_before_there_were_other_quantizers_is_of_ibq(tmp_path):
    saved = {"stage": "tokenizer", "quantizer": {"beta": 0.5}, "codebook": {"size": 8}, "data": {"name": "x"}}
    (tmp_path / "config.json").write_text(json.dumps(saved))
    config = read_config(tmp_path / "config.json")
    assert config.quantizer.to_dict() == {
        "beta": 0.5,
        "name": "ibq",
        "double_loss": True,
        "l2_normalize": False,
        "levels": (),
        "logit_temperature": 1.0,
        "entropy_logits": "own",
        "precision": "bfloat16_3x",
        "gradient_precision": "bfloat16",
    }
    assert config.encode.to_dict() == {"precision": "float32"}
    assert config.codebook.to_dict() == {"size": 8, "init_scale": 1.0} and config.data.to_dict() == {"name": "x"}
