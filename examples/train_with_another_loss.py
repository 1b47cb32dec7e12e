"""Trains a tokenizer from Python with a changed loss: the error of neighbouring pixels' differences is added.

It shows that a loss is changed by a subclass of the trainer, without editing the package; everything else (data,
checkpoints, continuing, validation, logs) stays as in `python -m ibq_jax train`. The preset openmoji32 takes about four
minutes on two CPU cores; make its data set first with `python -m ibq_jax prepare openmoji`.

    python examples/train_with_another_loss.py --workdir=runs/edges --config.train.steps=200
"""

import argparse
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from ibq_jax import Tokenizer, load_config, train
from ibq_jax.tokenizer.step import TokenizerTrainer

EDGE_WEIGHT = 0.5


class EdgeTrainer(TokenizerTrainer):
    """The tokenizer's trainer with a loss that asks for sharp edges."""

    def reconstruction_loss(self, images: jax.Array, reconstructions: jax.Array, nets: Mapping):
        """Adds the mean absolute error of vertical and horizontal differences; logged as loss/edges."""
        loss, terms = super().reconstruction_loss(images, reconstructions, nets)
        errors = reconstructions - images  # [B, H, W, 3]
        edges = jnp.mean(jnp.abs(jnp.diff(errors, axis=1))) + jnp.mean(jnp.abs(jnp.diff(errors, axis=2)))
        return loss + EDGE_WEIGHT * edges, terms | {"edges": edges}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/tokenizer.py:openmoji32", help="FILE.py:PRESET")
    parser.add_argument("--workdir", required=True, help="folder of the run")
    arguments, overrides = parser.parse_known_args(argv)

    run = train(load_config(arguments.config, overrides), arguments.workdir, trainer_class=EdgeTrainer)
    tokenizer = Tokenizer.load(run.workdir)
    print(f"trained {run.saved_step()} steps: {tokenizer.codebook_size:,} codes, run {run.workdir}")


if __name__ == "__main__":
    main()
