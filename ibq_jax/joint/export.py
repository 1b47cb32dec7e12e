"""Writes the two networks of a joint run as runs of their own stages, which every command and the Python API know.

run/tokenizer/    a tokenizer's run with its whole state, so that it can also be trained further
run/generator/    a generator's run, whose token_cache.json names that tokenizer and states sizes, for there is no cache
"""

import os
from pathlib import Path

import jax

from ibq_jax.base.config import save_config
from ibq_jax.base.saved_run import open_checkpoints
from ibq_jax.base.sharding import to_host
from ibq_jax.data.token_cache import VERSION, write_run_manifest
from ibq_jax.joint.step import JointState, JointTrainer
from ibq_jax.tokenizer.tokenize import fingerprint

WEIGHTS = "ema"  # the tokenizer's, which the generator's codes are decoded with


def export_parts(workdir: Path, trainer: JointTrainer, state: JointState, class_names: tuple[str, ...]) -> None:
    """Writes both runs into the joint run's folder, unless they have this step already. Every process calls it."""
    step = int(state.tokenizer.step)
    for name, part, its_state in (
        ("tokenizer", trainer.tokenizer, state.tokenizer),
        ("generator", trainer.generator, state.generator),
    ):
        folder = workdir / name
        if jax.process_index() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            save_config(part.config, folder / "config.json")
        checkpoints = open_checkpoints(folder, part.config)
        metadata = {"config": part.config.to_dict(), "steps_per_epoch": trainer.steps_per_epoch, "step": step}
        checkpoints.save(step, its_state, metadata)
        checkpoints.close()
    manifest = _manifest(workdir, trainer, state, class_names)
    if jax.process_index() == 0:
        write_run_manifest(workdir / "generator", manifest)


def _manifest(workdir: Path, trainer: JointTrainer, state: JointState, class_names: tuple[str, ...]) -> dict:
    """Returns what a generator's run says of its codes: as an imported one, for no token cache was written."""
    tokenizer, model = trainer.tokenizer, trainer.generator.config.model
    params = jax.tree.map(to_host, state.tokenizer.weights(WEIGHTS))
    data = tokenizer.config.data
    return {
        "version": VERSION,
        "imported": str(workdir),
        "tokenizer": {
            "path": str(workdir / "tokenizer"),
            "step": int(state.tokenizer.step),
            "weights": WEIGHTS,
            "fingerprint": fingerprint(tokenizer.model, params),
        },
        "preprocessing": {"image_size": data.image_size, "resize": data.resize},
        "precision": tokenizer.config.encode.precision,
        "data": {
            "name": data.name,
            "dir": os.path.abspath(data.dir),
            "class_names": list(class_names),
            "splits": {"train": {"source": data.train_split}},
        },
        "codebook_size": model.vocab_size,
        "grid": list(model.grid),
    }
