"""How much of an evaluation is the host's work, rather than the networks': openmoji64's reconstructions.

    python tests/benchmarks/evaluation.py --data-dir=~/data --feature_nets=efficientnet

One pass over the training split, which has more images than the other, with fresh weights. Timed each alone:
reading and decoding, putting the numbers together (statistics in float64 included), and the whole pass, in which the
host works while the devices are at the next batch.
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
    parser.add_argument("--judges", default="efficientnet")
    parser.add_argument("--examples", type=int, default=512)
    arguments = parser.parse_args()
    fields = [f"--config.data.dir={arguments.data_dir}", "--config.data.validation_split=train"]
    config = load_config(f"{CONFIG}:openmoji64", fields)
    trainer = TokenizerTrainer(config, make_mesh({"data": -1}), steps_per_epoch=1)
    params = create_sharded(trainer.create_state, trainer.mesh, 0).params
    judges = find_feature_nets([kind for kind in arguments.judges.split(",") if kind], {})
    evaluator = validation_evaluator(trainer, arguments.examples, PROTOCOLS["clean"], judges)

    dict(evaluator(params))  # compiles
    start = time.perf_counter()
    images = dict(evaluator(params))["images"]
    whole = time.perf_counter() - start

    start = time.perf_counter()
    for _ in evaluator._batches(arguments.examples):
        pass
    reading = time.perf_counter() - start

    measured = list(evaluator._measured(params))
    tally = _Tally(config.codebook.size, judges.distances)
    start = time.perf_counter()
    for batch in measured:
        tally.add(batch)
    for statistics in (of for pair in tally.statistics.values() for of in pair):
        _ = statistics.mean
    adding = time.perf_counter() - start
    print(
        f"{images:.0f} images of 64 pixels, judges {arguments.judges or 'none'}, {jax.device_count()} devices on "
        f"{os.cpu_count()} cores: {whole:.1f} s; reading {reading:.2f} s ({reading / whole:.1%}), putting together "
        f"{adding:.2f} s ({adding / whole:.1%})"
    )


if __name__ == "__main__":
    main()
