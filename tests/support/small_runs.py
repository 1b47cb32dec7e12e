"""A preset of each stage shrunk until it trains in seconds, for the tests of the commands."""

from pathlib import Path

import jax
import numpy as np

from ibq_jax.autoregressive.step import GeneratorTrainer
from ibq_jax.autoregressive.token_sizes import cache_sizes, resolve_model
from ibq_jax.base.checkpoint import Checkpoints
from ibq_jax.base.config import load_config, save_config
from ibq_jax.base.sharding import abstract_state, create_sharded, make_mesh
from ibq_jax.data.token_cache import open_token_cache, write_run_manifest
from ibq_jax.tokenizer.step import TokenizerTrainer

ROOT = Path(__file__).parents[2]
STEPS = 12
SMALL_TOKENIZER = f"{ROOT}/configs/tokenizer.py:openmoji32"
SMALL = (
    "data.image_size=16",
    "data.resize=16",
    "data.batch_size=8",
    "model.resolution=16",
    "model.channel_multipliers=(1,1)",
    "model.num_res_blocks=0",  # compiles in two thirds of the time
    "model.z_channels=16",
    "codebook.size=64",
    "codebook.dim=8",
    "quantizer.entropy_group_tokens=128",
    "discriminator.channels=8",
    "discriminator.num_layers=1",
    "discriminator.norm_group=2",
    f"train.steps={STEPS}",
    "log.every=1",
    "log.images_every=6",
    "evaluate.every=6",
    "evaluate.examples=24",
    "evaluate.batch_size=8",
    "checkpoint.every=4",
    "checkpoint.keep_last=2",
)


def arguments(workdir: Path, data_dir: Path, *overrides: str, preset: str = "openmoji32") -> list[str]:
    """Returns the words of a command that trains a small tokenizer in `workdir`."""
    fields = [f"--config.{field}" for field in (*SMALL, f"data.dir={data_dir}", *overrides)]
    return ["train", f"--config={ROOT}/configs/tokenizer.py:{preset}", f"--workdir={workdir}", *fields]


def save_run(workdir: Path, data_dir: Path, *overrides: str) -> Path:
    """Writes a tokenizer's run as training would, but with random weights of the same shapes."""
    _, spec, _, *fields = arguments(workdir, data_dir, *overrides)
    config = load_config(spec.partition("=")[2], fields)
    return _save(workdir, config, _random_state(TokenizerTrainer(config, make_mesh({"data": -1}), steps_per_epoch=1)))


def _random_state(trainer: TokenizerTrainer | GeneratorTrainer):
    """A state of random numbers, drawn on the host: to compile the initial one takes as long as to compile a step."""
    shapes, shardings = abstract_state(trainer.create_state, trainer.mesh, trainer.config.seed)
    rng = np.random.default_rng(trainer.config.seed)
    arrays = jax.tree.map(lambda leaf: (rng.standard_normal(leaf.shape) / 5).astype(leaf.dtype), shapes)
    return jax.device_put(arrays, shardings)


def save_untrained_run(workdir: Path, preset: str, *overrides: str) -> Path:
    """A tokenizer's run as it is before its first step."""
    config = load_config(f"{ROOT}/configs/tokenizer.py:{preset}", [f"--config.{field}" for field in overrides])
    trainer = TokenizerTrainer(config, make_mesh({"data": -1}), steps_per_epoch=1)
    return _save(workdir, config, create_sharded(trainer.create_state, trainer.mesh, config.seed))


def _save(workdir: Path, config, state) -> Path:
    workdir.mkdir(parents=True)
    save_config(config, workdir / "config.json")
    checkpoints = Checkpoints(workdir / "checkpoints")
    checkpoints.save(7, state, {})
    checkpoints.close()
    return workdir


SMALL_GENERATOR = (
    "data.batch_size=16",
    "model.num_layers=2",
    "model.num_heads=2",
    "model.num_kv_heads=2",
    "model.embed_dim=32",
    "model.codebook_dim=8",
    f"train.steps={STEPS}",
    "log.every=1",
    "log.images_every=6",
    "log.num_images=2",
    "evaluate.every=6",
    "evaluate.batch_size=16",
    "checkpoint.every=4",
    "checkpoint.keep_last=2",
)


def generator_arguments(workdir: Path, codes: Path, *overrides: str, preset: str = "openmoji32") -> list[str]:
    """Returns the words of a command that trains a small generator on the token cache `codes` of a SMALL tokenizer."""
    fields = [f"--config.{field}" for field in (*SMALL_GENERATOR, f"token_cache={codes}", *overrides)]
    return ["train", f"--config={ROOT}/configs/autoregressive.py:{preset}", f"--workdir={workdir}", *fields]


OF_A_JOINT_RUN = ("data.batch_size", "train.", "log.", "evaluate.", "checkpoint.")  # fields at the top of its config
SMALL_JOINT = (
    *(field if field.startswith(OF_A_JOINT_RUN) else f"tokenizer.{field}" for field in SMALL),
    *(f"generator.{field}" for field in SMALL_GENERATOR if field.startswith("model.")),
)


def joint_arguments(workdir: Path, data_dir: Path, *overrides: str) -> list[str]:
    """Returns the words of a command that trains a small tokenizer and a small generator together in `workdir`."""
    fields = [f"--config.{field}" for field in (*SMALL_JOINT, f"tokenizer.data.dir={data_dir}", *overrides)]
    return ["train", f"--config={ROOT}/configs/joint.py:openmoji32", f"--workdir={workdir}", *fields]


def save_generator_run(workdir: Path, codes: Path, *overrides: str) -> Path:
    """Writes a generator's run as training on `codes` would, but with random weights of the same shapes."""
    _, spec, _, *fields = generator_arguments(workdir, codes, *overrides)
    source = open_token_cache(codes, "train")
    config = resolve_model(load_config(spec.partition("=")[2], fields), cache_sizes(source))
    trainer = GeneratorTrainer(config, make_mesh({"data": -1}), steps_per_epoch=1)
    _save(workdir, config, _random_state(trainer))
    write_run_manifest(workdir, source.manifest)
    return workdir
