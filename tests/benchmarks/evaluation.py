"""Measures how much of an evaluation is work of the host, with openmoji64's reconstructions.

    python tests/benchmarks/evaluation.py --data-dir=~/data --feature-nets=efficientnet

One pass over the training split, the larger one, with untrained weights. Timed separately: reading and decoding,
adding up the numbers (statistics in float64 included), and the whole pass, in which the host works while the devices
compute the next batch.
"""

import argparse
import os
import time
from pathlib import Path

import jax

from ibq_jax.base.config import load_config
from ibq_jax.base.sharding import create_sharded, make_mesh
from ibq_jax.evaluate.feature_nets import find_feature_nets
from ibq_jax.evaluate.protocols import PROTOCOLS
from ibq_jax.evaluate.reconstruction import _Tally
from ibq_jax.evaluate.validation import validation_evaluator
from ibq_jax.tokenizer.step import TokenizerTrainer

CONFIG = Path(__file__).parents[2] / "configs" / "tokenizer.py"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--feature-nets", default="efficientnet")
    parser.add_argument("--examples", type=int, default=512)
    arguments = parser.parse_args()
    fields = [f"--config.data.dir={arguments.data_dir}", "--config.data.validation_split=train"]
    config = load_config(f"{CONFIG}:openmoji64", fields)
    trainer = TokenizerTrainer(config, make_mesh({"data": -1}), steps_per_epoch=1)
    params = create_sharded(trainer.create_state, trainer.mesh, 0).params
    feature_nets = find_feature_nets([kind for kind in arguments.feature_nets.split(",") if kind], {})
    evaluator = validation_evaluator(trainer, arguments.examples, PROTOCOLS["clean"], feature_nets)

    dict(evaluator(params))  # compiles
    start = time.perf_counter()
    images = dict(evaluator(params))["images"]
    whole = time.perf_counter() - start

    start = time.perf_counter()
    for _ in evaluator._batches(arguments.examples):
        pass
    reading = time.perf_counter() - start

    measured = list(evaluator._measured(params))
    tally = _Tally(config.codebook.size, feature_nets.distances)
    start = time.perf_counter()
    for batch in measured:
        tally.add(batch)
    for statistics in (one for pair in tally.statistics.values() for one in pair):
        _ = statistics.mean
    adding = time.perf_counter() - start
    print(
        f"{images:.0f} images of 64 pixels, feature nets {arguments.feature_nets or 'none'}, {jax.device_count()} "
        f"devices on {os.cpu_count()} cores: {whole:.1f} s; reading {reading:.2f} s ({reading / whole:.1%}), adding up "
        f"{adding:.2f} s ({adding / whole:.1%})"
    )


if __name__ == "__main__":
    main()
