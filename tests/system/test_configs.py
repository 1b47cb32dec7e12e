"""Every preset builds the state it describes, abstractly."""

import dataclasses
from pathlib import Path

import jax
import pytest
from support.partition_specs import partition_specs_text

from ibq_jax.autoregressive.check import check_config as check_generator_config
from ibq_jax.autoregressive.step import GeneratorTrainer
from ibq_jax.autoregressive.token_sizes import load_preset, preset_sizes
from ibq_jax.base.config import flatten, load_config, preset_module
from ibq_jax.base.sharding import abstract_state, make_mesh
from ibq_jax.joint.check import check_config as check_joint_config
from ibq_jax.joint.parts import generator_part, resolve, tokenizer_part
from ibq_jax.joint.step import JointTrainer
from ibq_jax.sweep.grid import read_study
from ibq_jax.tokenizer.check import check_config
from ibq_jax.tokenizer.step import TokenizerTrainer

CONFIGS = Path(__file__).parents[2] / "configs"
TOKENIZER_PARAMETERS = {
    "imagenet256_1024": 107_049_859,
    "imagenet256_8192": 108_884_867,
    "imagenet256_16384": 110_982_019,
    "imagenet256_262144": 173_896_579,
    "pretrain256_16384": 110_982_019,
    "pretrain256_262144": 173_896_579,
    "emu35_131072": 455_336_963,
}
GENERATOR_PARAMETERS = {
    "imagenet256_B": 342_994_944,
    "imagenet256_L": 649_640_960,
    "imagenet256_XL": 1_076_103_168,
    "imagenet256_XXL": 2_063_331_840,
}


@pytest.mark.parametrize("preset", ["openmoji32", "openmoji64", "photos32", "photos64", *TOKENIZER_PARAMETERS])
def test_preset_builds_its_state(preset):
    config = load_config(f"{CONFIGS}/tokenizer.py:{preset}")
    mesh = make_mesh({"data": 2, "fsdp": 2, "codebook": 2})
    check_config(config, mesh)
    state, shardings = abstract_state(TokenizerTrainer(config, mesh, steps_per_epoch=5004).create_state, mesh, 0)
    count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    assert count == TOKENIZER_PARAMETERS.get(preset, count)
    assert state.params["quantize"]["codebook"].shape == (config.codebook.size, config.codebook.dim)
    for place in (shardings.params, shardings.ema, shardings.optimizer[0].mu, shardings.optimizer[0].nu):
        assert place["quantize"]["codebook"].spec[0] == ("codebook", "data", "fsdp")
    assert shardings.window.last_used.spec[0] == "codebook"


def test_the_larger_presets_differ_from_the_base_by_the_codebook_alone():
    base = load_config(f"{CONFIGS}/tokenizer.py:imagenet256_16384").to_dict()
    large = load_config(f"{CONFIGS}/tokenizer.py:imagenet256_262144").to_dict()
    assert large["codebook"].pop("size") == 262144
    assert base["codebook"].pop("size") == 16384
    assert base == large


@pytest.mark.parametrize("size", [32, 64])
def test_photographs_and_emojis_are_trained_alike(size):
    emojis, photos = (load_config(f"{CONFIGS}/tokenizer.py:{data}{size}").to_dict() for data in ("openmoji", "photos"))
    assert (emojis["data"].pop("name"), photos["data"].pop("name")) == ("openmoji", f"photos{size}")
    assert emojis == photos


def test_every_parameter_lies_where_the_golden_file_says_and_its_moments_beside_it(check_golden):
    config = load_config(f"{CONFIGS}/tokenizer.py:imagenet256_16384")
    mesh = make_mesh({"data": 2, "fsdp": 2, "codebook": 2})
    create_state = TokenizerTrainer(config, mesh, steps_per_epoch=5004).create_state
    for spread_out, golden in ((False, "partition_specs.json"), (True, "stored_specs.json")):
        _, shardings = abstract_state(create_state, mesh, 0, spread_out=spread_out)
        check_golden(golden, partition_specs_text((shardings.params, shardings.discriminator.params)))
    for moments in (shardings.ema, shardings.optimizer[0].mu, shardings.optimizer[0].nu):
        assert moments == shardings.params
    assert shardings.discriminator.optimizer[0].nu == shardings.discriminator.params


@pytest.mark.parametrize("preset", ["openmoji32", "photos64", *GENERATOR_PARAMETERS])
def test_generator_preset_builds_its_state(preset):
    config = load_preset(f"{CONFIGS}/autoregressive.py:{preset}")
    mesh = make_mesh({"data": 2, "fsdp": 2, "codebook": 2})
    check_generator_config(config, mesh)
    state, shardings = abstract_state(GeneratorTrainer(config, mesh, steps_per_epoch=1668).create_state, mesh, 0)
    count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    assert count == GENERATOR_PARAMETERS.get(preset, count)
    assert state.params["head"].shape == (config.model.vocab_size, config.model.embed_dim)
    for table in (shardings.params["head"], shardings.params["tok_emb"]["embedding"]):
        assert table.spec[0] == ("codebook", "data") and table.spec[1] == "fsdp"
    assert (state.ema is None) == (config.optimizer.ema_decay == 0)


@pytest.mark.parametrize("preset", ["openmoji32", "openmoji64", "imagenet256_16384_B"])
def test_joint_preset_is_made_of_two_others(preset):
    spec = f"{CONFIGS}/joint.py:{preset}"
    config = resolve(load_config(spec), preset_sizes(spec))
    mesh = make_mesh({"data": 2, "fsdp": 2, "codebook": 2})
    check_joint_config(config, mesh)
    tokenizer, generator = preset_module(spec)[0].SOURCES[preset]
    assert tokenizer_part(config) == load_config(f"{CONFIGS}/tokenizer.py:{tokenizer}")
    part, own = flatten(generator_part(config)), flatten(load_preset(f"{CONFIGS}/autoregressive.py:{generator}"))
    assert {name.split(".")[0] for name in own if part.get(name) != own[name]} <= {"data", "train", "log", "evaluate"}
    assert part.keys() == own.keys()
    state, shardings = abstract_state(JointTrainer(config, mesh, steps_per_epoch=5004).create_state, mesh, 0)
    assert state.generator.params["head"].shape[0] == state.tokenizer.params["quantize"]["codebook"].shape[0]
    assert shardings.tokenizer.params["quantize"]["codebook"].spec[0] == ("codebook", "data", "fsdp")


def test_the_table_of_generators_is_that_of_its_presets():
    module_text = (CONFIGS / "autoregressive.py").read_text()
    for preset, count in GENERATOR_PARAMETERS.items():
        model = load_config(f"{CONFIGS}/autoregressive.py:{preset}").model
        row = next(line for line in module_text.splitlines() if line.startswith(f"| {preset} "))
        assert f"| {model.num_layers}, {model.num_heads}, {model.embed_dim} | {count:,} |" in row


@pytest.mark.parametrize("study", sorted((CONFIGS / "studies").glob("*.py")), ids=lambda path: path.stem)
def test_every_study_is_a_grid_whose_fields_exist_and_go_together(study):
    grid = read_study(str(study))
    corners = {field: (values[0], values[-1]) for field, values in grid.over.items()}  # all points take seconds
    for point in dataclasses.replace(grid, over=corners, seeds=1).points():
        if point.config.stage == "tokenizer":
            check_config(point.config, make_mesh({"data": -1}))


@pytest.mark.parametrize("file", ["tokenizer.py", "autoregressive.py", "joint.py"])
def test_a_copied_config_file_works_anywhere(file, tmp_path, monkeypatch):
    (tmp_path / file).write_text((CONFIGS / file).read_text())
    monkeypatch.chdir(tmp_path)
    assert load_config(f"{file}:openmoji32") == load_config(f"{CONFIGS}/{file}:openmoji32")
