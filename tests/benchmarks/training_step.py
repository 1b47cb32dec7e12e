"""Times a preset's training as the loop runs it, against its parts alone, and prints a table in markdown.

    python -m ibq_jax prepare openmoji
    python tests/benchmarks/training_step.py --preset openmoji64

The loop's step is the mean wall time from one request for a batch to the next, logging included. The parts take turns,
and each is the median of its repeats; they share nothing, so their sum repeats work that a step may do once.
"""

import argparse
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ibq_jax.base.checkpoint import Checkpoints
from ibq_jax.base.config import load_config
from ibq_jax.base.loop import Intervals, Loop
from ibq_jax.base.sharding import create_sharded, global_batch, make_mesh
from ibq_jax.base.state import moving_average
from ibq_jax.base.telemetry import Telemetry
from ibq_jax.data.pipeline import open_split, training_batches
from ibq_jax.data.preprocess import to_float
from ibq_jax.tokenizer import losses
from ibq_jax.tokenizer.restore import TokenizerStage
from ibq_jax.tokenizer.step import TokenizerTrainer

CONFIGS = Path(__file__).parents[2] / "configs"
WARM_STEPS = 5


def timed(batches: Iterator[dict[str, np.ndarray]], times: list[float]) -> Iterator[dict[str, np.ndarray]]:
    """`batches`; `times` gets the moment that each was asked for."""
    while True:
        times.append(time.perf_counter())
        yield next(batches)


def parts(trainer: TokenizerTrainer, state, images: jax.Array) -> dict[str, Callable]:
    """Returns the parts of a step, each compiled by itself; the discriminator's passes are as released."""
    model, discriminator, weights = trainer.model, trainer.discriminator, trainer.config.loss
    images = to_float(images)

    def discriminate(params, x):
        variables = {"params": params, "batch_stats": state.discriminator.batch_stats}
        return discriminator.apply(variables, x, mutable=["batch_stats"])[0]

    def tokenizer_loss(params):
        reconstructions, quantized = model.apply({"params": params}, images)
        codebook = weights.quantizer_weight * quantized.quant_loss + weights.entropy_weight * quantized.entropy_loss
        return jnp.mean(jnp.abs(images - reconstructions)) + codebook

    def discriminator_loss(params):
        return losses.hinge(discriminate(params, images), discriminate(params, -images))

    def adversarial_loss(reconstructions):
        return losses.non_saturating(discriminate(state.discriminator.params, reconstructions))

    def update(params, gradient, optimizer):
        updates, optimizer = trainer.optimizer.update(gradient, optimizer, params)
        return optax.apply_updates(params, updates), optimizer

    losses_of_parts = tokenizer_loss, discriminator_loss, adversarial_loss
    tokenizer, real_and_fake, fake = (jax.jit(jax.grad(f)) for f in losses_of_parts)
    update, average = jax.jit(update), jax.jit(moving_average, static_argnums=2)
    decay, discriminator = trainer.config.optimizer.ema_decay, state.discriminator
    return {
        "tokenizer, forward and backward": lambda: tokenizer(state.params),
        "discriminator, forward and backward on both": lambda: real_and_fake(discriminator.params),
        "discriminator, backward to the pictures": lambda: fake(images),
        "tokenizer's Adam": lambda: update(state.params, state.params, state.optimizer),
        "discriminator's Adam": lambda: update(discriminator.params, discriminator.params, discriminator.optimizer),
        "EMA": lambda: average(state.ema, state.params, decay),
    }


def medians(functions: dict[str, Callable], repeats: int) -> dict[str, float]:
    """Seconds of each, in turns, compilation apart."""
    for function in functions.values():
        jax.block_until_ready(function())
    seconds = {name: [] for name in functions}
    for _, (name, function) in itertools.product(range(repeats), functions.items()):
        start = time.perf_counter()
        jax.block_until_ready(function())
        seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


class StageWithoutEvaluation(TokenizerStage):
    """The tokenizer's stage, without the evaluation and the images of the last step."""

    def evaluate(self, state):
        return {}

    def images(self, state):
        return {}


def loop_seconds(trainer: TokenizerTrainer, state, batches: Iterator, steps: int) -> float:
    """Mean wall time of a step in the real loop, the first few left out; donates `state`."""
    never = steps + 1
    intervals = Intervals(
        total_steps=steps,
        log_every=trainer.config.log.every,
        images_every=never,
        evaluate_every=never,
        checkpoint_every=never,
    )
    times = []
    with tempfile.TemporaryDirectory() as folder:
        workdir = Path(folder)
        telemetry, checkpoints = Telemetry(workdir, 0, steps), Checkpoints(workdir / "checkpoints")
        loop = Loop(
            stage=StageWithoutEvaluation(trainer, None),
            mesh=trainer.mesh,
            intervals=intervals,
            checkpoints=checkpoints,
            telemetry=telemetry,
            workdir=workdir,
            metadata={},
        )
        loop.run(state, timed(batches, times), 0)
        telemetry.close()
        checkpoints.close()
    return (times[-1] - times[WARM_STEPS]) / (steps - 1 - WARM_STEPS)


def input_seconds(make_batches: Callable[[], Iterator], count: int) -> float:
    """Mean seconds a batch from the input pipeline alone, its first ones left out."""
    batches = make_batches()
    for _ in range(WARM_STEPS):
        next(batches)
    start = time.perf_counter()
    for _ in range(count):
        next(batches)
    seconds = (time.perf_counter() - start) / count
    batches.close()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="openmoji64")
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    config = load_config(f"{CONFIGS}/tokenizer.py:{arguments.preset}", [f"--config.data.dir={arguments.data_dir}"])
    data, mesh = config.data, make_mesh(config.mesh)
    source = open_split(data.name, data.dir, data.train_split)
    trainer = TokenizerTrainer(config, mesh, len(source) // data.batch_size)
    state = create_sharded(trainer.create_state, mesh, config.seed)

    def make_batches():
        return training_batches(
            source, image_size=data.image_size, resize=data.resize, batch_size=data.batch_size, seed=config.seed,
            num_workers=data.num_workers, num_threads=data.num_threads,
        )  # fmt: skip

    batch = next(make_batches())["image"]
    rows = {"input pipeline": input_seconds(make_batches, 4 * arguments.steps)}
    images = global_batch({"image": batch}, mesh)["image"]
    transfer = {"transfer to the devices": lambda: global_batch({"image": batch}, mesh)}
    rows |= medians(transfer | parts(trainer, state, images), arguments.repeats)
    step, total = loop_seconds(trainer, state, make_batches(), arguments.steps), sum(rows.values())
    print(f"\n{arguments.preset}: {data.batch_size} images of {data.image_size} px a step, {config.dtype};")
    print(f"{mesh.size} {jax.devices()[0].device_kind} device(s), {os.cpu_count()} cores; {arguments.steps} steps\n")
    print("| part | ms |\n|---|---|")
    for name, seconds in [*rows.items(), ("sum of the parts", total), ("a step in the loop", step)]:
        print(f"| {name} | {1e3 * seconds:.1f} |")
    print(f"\nstep / sum of its parts: {step / total:.2f}")
    print(f"step / input pipeline alone: {step / rows['input pipeline']:.1f}")


if __name__ == "__main__":
    main()
