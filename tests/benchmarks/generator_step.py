"""Times the generator's training step of size B on one CPU device against PyTorch, and prints a table in markdown.

    python tests/benchmarks/generator_step.py --batch-size 2

Ours is the step that `train` compiles for preset imagenet256_B, in float32, and its two halves compiled apart: the
gradient, and clipping and AdamW. PyTorch (`torch_generator.py`) has the same dropout, clips with `clip_grad_norm_` and
takes the faster of its two vectorised AdamWs. All take turns. No average of the weights is kept, as in the preset.
"""

import argparse
import itertools
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import optax
import torch
from torch_generator import torch_generator

from ibq_jax.api import Generator
from ibq_jax.autoregressive.step import GeneratorTrainer, jit_train_step
from ibq_jax.autoregressive.token_sizes import load_preset
from ibq_jax.base.sharding import create_sharded, global_batch, make_mesh

CONFIG = Path(__file__).parents[2] / "configs" / "autoregressive.py"
STEP, GRADIENT, OPTIMIZER = "step", "forward and backward", "clipping and AdamW"


class Ours:
    """The step and its halves, on one state that each of them moves on."""

    def __init__(self, trainer: GeneratorTrainer, state, codes: np.ndarray, labels: np.ndarray):
        batch = global_batch({"codes": codes, "labels": labels}, trainer.mesh)
        self.arguments = batch["codes"], batch["labels"]
        self.state, self.key, self.gradient = state, jax.random.key(0), None

        def update(params, optimizer, gradient):
            updates, optimizer = trainer.optimizer.update(gradient, optimizer, params)
            return optax.apply_updates(
                params, updates
            ), optimizer  # in the order of the arguments whose memory they take

        start = time.perf_counter()
        self.run_step = jit_train_step(trainer).lower(state, *self.arguments).compile()
        self.compile_seconds = time.perf_counter() - start
        self.run_gradient = jax.jit(trainer._gradient)
        self.run_update = jax.jit(update, donate_argnums=(0, 1))

    def step(self) -> None:
        self.state, metrics = self.run_step(self.state, *self.arguments)
        jax.block_until_ready((self.state, metrics))

    def forward_and_backward(self) -> None:
        self.gradient = None
        _, self.gradient = jax.block_until_ready(self.run_gradient(self.state.params, *self.arguments, self.key))

    def optimize(self) -> None:
        params, optimizer = self.run_update(self.state.params, self.state.optimizer, self.gradient)
        self.state = jax.block_until_ready(self.state.replace(params=params, optimizer=optimizer))
        self.gradient = None


class Theirs:
    """The same in PyTorch."""

    def __init__(self, module: torch.nn.Module, config, codes: np.ndarray, labels: np.ndarray):
        self.module, self.clip = module, config.gradient_clip
        self.codes, self.labels = torch.from_numpy(codes).long().flatten(1), torch.from_numpy(labels).long()
        decayed, others = [], []
        for parameter in module.parameters():
            (decayed if parameter.ndim > 1 else others).append(parameter)
        groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2))

    def step(self) -> None:
        self.forward_and_backward()
        self.optimize()

    def forward_and_backward(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.module.loss(self.codes, self.labels).backward()

    def optimize(self, **form: bool) -> None:
        """`form`: fused or foreach; the last one stays."""
        for group in self.optimizer.param_groups:
            group.update(form)
        torch.nn.utils.clip_grad_norm_(self.module.parameters(), self.clip, foreach=True)
        self.optimizer.step()


def seconds_in_turns(functions: dict[tuple, Callable], repeats: int) -> dict[tuple, list[float]]:
    """Seconds of each repeat of each, in the given order; the first round is not counted."""
    seconds = {name: [] for name in functions}
    for i, (name, function) in itertools.product(range(repeats + 1), functions.items()):
        start = time.perf_counter()
        function()
        seconds[name] += [time.perf_counter() - start] * (i > 0)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--set", nargs="*", default=[], help="more overrides, such as model.num_layers=4")
    parser.add_argument("--ours-only", action="store_true")
    arguments = parser.parse_args()
    overrides = ["dtype=float32", f"data.batch_size={arguments.batch_size}", *arguments.set]
    config = load_preset(f"{CONFIG}:imagenet256_B", [f"--config.{override}" for override in overrides])
    mesh = make_mesh({"data": 1}, jax.devices()[:1])
    trainer = GeneratorTrainer(config, mesh, steps_per_epoch=1000)
    state = create_sharded(trainer.create_state, mesh, config.seed)
    rng, model = np.random.default_rng(0), config.model
    codes = rng.integers(0, model.vocab_size, (arguments.batch_size, *model.grid), np.int32)
    labels = rng.integers(0, model.num_classes, arguments.batch_size, np.int32)
    functions = {}
    if not arguments.ours_only:
        tensors = Generator(trainer.model, state.params).to_torch()
        theirs = Theirs(torch_generator(trainer.model, tensors, model.dropout), config.optimizer, codes, labels)
        del tensors
        functions = {
            ("PyTorch", GRADIENT): theirs.forward_and_backward,
            ("PyTorch, foreach", OPTIMIZER): lambda: theirs.optimize(foreach=True, fused=False),
            ("PyTorch, fused", OPTIMIZER): lambda: theirs.optimize(foreach=False, fused=True),
            ("PyTorch", STEP): theirs.step,
        }
    ours = Ours(trainer, state, codes, labels)
    del state
    functions |= {
        ("ours", GRADIENT): ours.forward_and_backward,
        ("ours", OPTIMIZER): ours.optimize,
        ("ours", STEP): ours.step,
    }
    size = sum(leaf.size for leaf in jax.tree.leaves(ours.state.params))
    load = os.getloadavg()[0]
    seconds = seconds_in_turns(functions, arguments.repeats)
    if not arguments.ours_only:
        forms = [("PyTorch, foreach", OPTIMIZER), ("PyTorch, fused", OPTIMIZER)]
        print("\nPyTorch's AdamW: " + ", ".join(f"{name[9:]} {min(seconds[name, _]):.2f} s" for name, _ in forms))
        seconds["PyTorch", OPTIMIZER] = min((seconds[form] for form in forms), key=min)
    print(
        f"\n{size:,} parameters, {config.data.batch_size} pictures a step, {config.dtype}, {arguments.repeats} repeats;"
    )
    print(f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, load before: {load:.1f}; ")
    print(f"ours compiled in {ours.compile_seconds:.1f} s; seconds, median (minimum)\n")
    print("| | ours | PyTorch | PyTorch / ours, medians (minima) |\n|---|---|---|---|")
    for part in GRADIENT, OPTIMIZER, STEP:
        values = [
            (statistics.median(times), min(times))
            for times in (seconds["ours", part], seconds.get(("PyTorch", part), [float("nan")]))
        ]
        (ours_median, ours_least), (theirs_median, theirs_least) = values
        cells = [f"{median:.2f} ({least:.2f})" for median, least in values]
        print(f"| {part} | {' | '.join(cells)} | {theirs_median / ours_median:.2f} ({theirs_least / ours_least:.2f}) |")


if __name__ == "__main__":
    main()
