"""Config files and overrides: what is wrong is said in words, with the nearest right name."""

import json
from pathlib import Path

import pytest

from ibq_jax.base.config import differences, load_config, read_config, save_config
from ibq_jax.base.errors import UsageError

TOKENIZER = str(Path(__file__).parents[2] / "configs" / "tokenizer.py")


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
    }
    assert config.codebook.to_dict() == {"size": 8, "init_scale": 1.0} and config.data.to_dict() == {"name": "x"}
