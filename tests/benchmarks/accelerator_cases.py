"""The cases of `accelerator.py`: programs with random weights, images and codes, at full sizes and shrunk for a CPU."""

import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from index_backprop import torch_step

from ibq_jax.autoregressive import step as autoregressive
from ibq_jax.autoregressive.sample_codes import sampling_program
from ibq_jax.base.config import load_config
from ibq_jax.base.sharding import batch_sharding, make_mesh, platform, replicated
from ibq_jax.data.preprocess import to_float
from ibq_jax.ops import index_backprop, nearest_codes
from ibq_jax.plan.compiled import Plan, read_plan
from ibq_jax.plan.gpus import attached_gpus
from ibq_jax.tokenizer import step as tokenizer

ROOT = Path(__file__).parents[2]
COMMAND = Path(__file__).parent / "accelerator.py"
PARTS = "tokenizer", "quantizer", "sampler", "encode", "generator", "codes", "start"
FULL, SHRUNK = "full", "shrunk"
TOKENIZER = {
    FULL: ("imagenet256_16384", ()),
    SHRUNK: (
        "openmoji32",
        (
            *(
                "data.image_size=16",
                "data.resize=16",
                "model.resolution=16",
                "model.channels=32",
                "model.z_channels=16",
            ),
            *("model.channel_multipliers=(1, 1)", "model.num_res_blocks=0", "codebook.dim=8"),
            *("discriminator.channels=8", "discriminator.num_layers=1", "loss.perceptual_weight=0.0"),
            "quantizer.entropy_group_tokens=64",
        ),
    ),
}
GENERATOR = {
    FULL: ("imagenet256_B", ("model.vocab_size=16384", "model.grid=(16, 16)", "model.num_classes=1000")),
    SHRUNK: (
        "openmoji32",
        (
            *("model.vocab_size=64", "model.grid=(4, 4)", "model.num_classes=5", "model.num_layers=2"),
            *("model.num_heads=2", "model.num_kv_heads=2", "model.embed_dim=32"),
        ),
    ),
}
# Sizes of the cases, the most important first.
TRAINED = {
    FULL: [
        (16_384, 32),
        (262_144, 32),
        (16_384, 64),
        (16_384, 8),
        (262_144, 8),
        (16_384, 16),
        (262_144, 16),
        (262_144, 64),
    ],
    SHRUNK: [(64, 8)],
}
GENERATED = {FULL: [64, 32], SHRUNK: [8]}
QUANTIZED = {FULL: [2**n for n in (14, 18, 10, 12, 16)], SHRUNK: [64]}
TOKENS = {FULL: (2048, 256), SHRUNK: (128, 8)}  # of a quantizer's batch, and their dimensions
SAMPLED = {FULL: [64, 1, 4], SHRUNK: [2]}
ENCODED = {FULL: [(256, 64), (512, 16)], SHRUNK: [(16, 4)]}  # pixels, images at a time
COMPARED = {FULL: 4, SHRUNK: 4}  # images whose codes the CPU computes, too


class Case(NamedTuple):
    """Something to measure: `prepare` returns what runs it once, how many items that makes, and its plan.

    What is no rate is measured by `prepare` itself, which then returns a `Row`.
    """

    part: str
    name: str
    unit: str
    prepare: Callable[[], Any]


@dataclass
class Row:
    """The outcome of a case. Bytes, bounds and the share of the peak are `plan`'s; the rest is measured."""

    part: str
    case: str
    note: str = ""
    seconds: float | None = None
    rate: float | None = None
    unit: str = ""
    peak_bytes: int | None = None
    process_peak_bytes: int | None = None  # the most that this process has held on the device so far, measured
    flops: float | None = None
    bound_seconds: float | None = None
    bound_by: str = ""
    share_of_peak: float | None = None
    prepare_seconds: float | None = None


class Benchmark:
    """The device, the sizes and the cases of every part."""

    def __init__(self, size: str):
        self.size = size
        self.mesh = make_mesh({"data": 1}, jax.devices()[:1])
        self.chip = attached_gpus()[0] if platform(self.mesh) == "gpu" else None

    def tokenizer_trainer(self, *fields: str, mesh: jax.sharding.Mesh | None = None) -> tokenizer.TokenizerTrainer:
        preset, small = TOKENIZER[self.size]
        overrides = [f"--config.{field}" for field in (*small, *fields)]
        config = load_config(f"{ROOT}/configs/tokenizer.py:{preset}", overrides)
        return tokenizer.TokenizerTrainer(config, mesh or self.mesh, steps_per_epoch=1000)

    def generator_trainer(self, *fields: str) -> autoregressive.GeneratorTrainer:
        preset, small = GENERATOR[self.size]
        overrides = [f"--config.{field}" for field in (*small, *fields)]
        config = load_config(f"{ROOT}/configs/autoregressive.py:{preset}", overrides)
        return autoregressive.GeneratorTrainer(config, self.mesh, steps_per_epoch=1000)

    def compiled(self, jitted: Callable, arguments: tuple) -> tuple[Callable, Plan]:
        """Compiles a program and returns it with its plan."""
        start = time.perf_counter()
        compiled = jitted.lower(*arguments).compile()
        return compiled, read_plan(compiled, self.mesh, self.chip, time.perf_counter() - start)

    def training(self, module, trainer, highest: int) -> tuple[Callable, int, Plan]:
        """Prepares steps of training on one random batch, whose integers are below `highest`."""
        state, *batch = module.abstract_arguments(trainer)
        step, plan = self.compiled(module.jit_train_step(trainer), (state, *batch))
        holder = [random_values(state)]
        batch = [random_values(part, highest) for part in batch]

        def run():
            holder[0], metrics = step(holder[0], *batch)
            return metrics

        return run, trainer.config.data.batch_size, plan

    def tokenizer(self) -> Iterator[Case]:
        for codes, batch in TRAINED[self.size]:
            fields = f"codebook.size={codes}", f"data.batch_size={batch}"
            yield Case(
                "tokenizer",
                f"training step, {codes:,} codes, {batch} images",
                "images/s",
                lambda fields=fields: self.training(tokenizer, self.tokenizer_trainer(*fields), 256),
            )

    def generator(self) -> Iterator[Case]:
        for batch in GENERATED[self.size]:
            trainer = self.generator_trainer(f"data.batch_size={batch}")
            yield Case(
                "generator",
                f"training step, {batch} images",
                "images/s",
                lambda trainer=trainer: self.training(autoregressive, trainer, trainer.config.model.num_classes),
            )

    def quantizer(self) -> Iterator[Case]:
        tokens = TOKENS[self.size][0]
        for codes in QUANTIZED[self.size]:
            for precisions in (("bfloat16_3x", "bfloat16"), ("float32", "float32")):
                name = f"forward and backward, {codes:,} codes, {tokens} tokens, {precisions[0]}"
                yield Case("quantizer", name, "tokens/s", lambda c=codes, p=precisions: self.quantizing(c, *p))
            if importlib.util.find_spec("torch"):
                name = f"forward and backward, {codes:,} codes, {tokens} tokens, float32, released form in PyTorch"
                yield Case("quantizer", name, "tokens/s", lambda c=codes: self.quantizing_in_torch(c))

    def quantizing(self, codes: int, precision: str, gradient_precision: str) -> tuple[Callable, int, Plan]:
        tokens, width = TOKENS[self.size]
        group = min(1024, tokens)
        settings = dict(precision=precision, gradient_precision=gradient_precision, entropy_group_tokens=group)

        def loss(z, codebook, cotangent):
            out = index_backprop(z, codebook, mesh=self.mesh, **settings)
            return (out.z_q * cotangent).sum() + 0.05 * (out.sample_entropy - out.batch_entropy)

        everywhere = replicated(self.mesh)
        arrays = [
            jax.ShapeDtypeStruct((rows, width), jnp.float32, sharding=everywhere) for rows in (tokens, codes, tokens)
        ]
        gradients = jax.jit(jax.grad(loss, argnums=(0, 1)), out_shardings=everywhere)
        step, plan = self.compiled(gradients, tuple(arrays))
        arrays = random_values(arrays)
        return lambda: step(*arrays), tokens, plan

    def quantizing_in_torch(self, codes: int) -> tuple[Callable, int, None]:
        import torch

        tokens, width = TOKENS[self.size]
        rng = np.random.default_rng(0)
        arrays = [0.02 * rng.standard_normal((rows, width), np.float32) for rows in (tokens, codes, tokens)]
        device = "cuda" if torch.cuda.is_available() else "cpu"
        torch.backends.cuda.matmul.allow_tf32 = False
        step = torch_step(*arrays, device=device)

        def run():
            step()
            if device == "cuda":
                torch.cuda.synchronize()

        return run, tokens, None

    def sampler(self) -> Iterator[Case]:
        for batch in SAMPLED[self.size]:
            yield Case("sampler", f"{batch} images, with guidance", "codes/s", lambda b=batch: self.sampling(b))

    def sampling(self, batch: int) -> tuple[Callable, int, Plan]:
        trainer = self.generator_trainer(f"data.batch_size={batch}", "sample.cfg_scale=2.25")
        program, arguments = sampling_program(trainer)
        draw, plan = self.compiled(program, arguments)
        *weights, labels, keys, _, _ = arguments
        placed = jax.device_put(jax.random.split(jax.random.key(0), batch), keys.sharding)
        positions = trainer.model.positions
        settings = jax.device_put((jnp.full(positions, 2.25), jnp.ones(())), replicated(self.mesh))
        values = (*random_values(tuple(weights)), random_values(labels), placed, *settings)
        return lambda: draw(*values), batch * positions, plan

    def encode(self) -> Iterator[Case]:
        for pixels, batch in ENCODED[self.size]:
            for precision in ("bfloat16", "float32"):
                name = f"{batch} images of {pixels} pixels, {precision}"
                yield Case("encode", name, "images/s", lambda *a, s=(pixels, batch, precision): self.encoding(*s))

    def encoding(self, pixels: int, batch: int, precision: str) -> tuple[Callable, int, Plan]:
        trainer = self.tokenizer_trainer()
        model = trainer.model.for_encoding(precision)
        params = encoder_params(trainer)
        crops = jax.ShapeDtypeStruct((batch, pixels, pixels, 3), jnp.uint8, sharding=batch_sharding(self.mesh))

        def run(params, crops):
            return model.apply({"params": params}, to_float(crops), method="encode")

        program = jax.jit(run, out_shardings=batch_sharding(self.mesh))
        encode, plan = self.compiled(program, (params, crops))
        values = random_values((params, crops), 256)
        return lambda: encode(*values), batch, plan

    def codes(self) -> Iterator[Case]:
        for precision in ("float32", "bfloat16"):
            name = f"codes at {precision} that differ from a CPU's at float32"
            yield Case("codes", name, "", lambda name=name, p=precision: self.differing(name, p))

    def differing(self, name: str, precision: str) -> Row:
        """Returns the share of codes that the accelerator computes differently than the CPU."""
        expected, centre, scale = self.codes_of_the_cpu
        found, _, _ = self.nearest(self.mesh, precision, centre, scale)
        share = float(np.mean(found != expected))
        return Row("codes", name, f"{share:.4%} of {expected.size:,}", rate=share, unit="share of codes")

    @cached_property
    def codes_of_the_cpu(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.nearest(make_mesh({"data": 1}, jax.devices("cpu")[:1]), "float32")

    def nearest(self, mesh: jax.sharding.Mesh, precision: str, centre=None, scale=None):
        """Returns codes of centred latents, since those of an untrained encoder are nearly equal, and that shift."""
        pixels = ENCODED[self.size][0][0]
        images = np.random.default_rng(1).integers(0, 256, (COMPARED[self.size], pixels, pixels, 3), np.uint8)
        trainer = self.tokenizer_trainer(mesh=mesh)
        model, params = trainer.model.for_encoding(precision), random_values(encoder_params(trainer))
        latent = jax.jit(lambda params, x: model.apply({"params": params}, to_float(x), method="latent"))
        z = np.asarray(latent(params, jax.device_put(images, batch_sharding(mesh))), np.float32)
        z = z.reshape(-1, z.shape[-1])
        if centre is None:
            centre, scale = z.mean(axis=0), z.std()
        centred = jax.device_put((z - centre) / scale, replicated(mesh))
        codebook = params["quantize"]["codebook"]
        found = jax.jit(lambda z, codebook: nearest_codes(z, codebook, precision=precision, mesh=mesh))(
            centred, codebook
        )
        return np.asarray(found), centre, scale

    def start(self) -> Iterator[Case]:
        with tempfile.TemporaryDirectory() as cache:
            for name in ("first start", "second start, compiled programs cached"):
                yield Case("start", name, "", lambda name=name: self.starting(name, cache))

    def starting(self, name: str, cache: str) -> Row:
        """Returns the seconds from the start of a process to the end of its first step."""
        variables = {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        command = [sys.executable, str(COMMAND), "--first-step", *(["--shrunk"] if self.size == SHRUNK else [])]
        known, start = programs_in(cache), time.perf_counter()
        subprocess.run(command, env=os.environ | variables, check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - start
        return Row("start", name, f"{programs_in(cache) - known} programs compiled", seconds=seconds)

    def first_step(self) -> None:
        """Trains one step with the smallest batch."""
        codes, batch = TRAINED[self.size][0][0], min(batch for _, batch in TRAINED[self.size])
        trainer = self.tokenizer_trainer(f"codebook.size={codes}", f"data.batch_size={batch}")
        jax.block_until_ready(self.training(tokenizer, trainer, 256)[0]())


def programs_in(cache: str) -> int:
    """Returns the number of compiled programs in the folder of JAX's persistent cache."""
    return sum(1 for _ in Path(cache).glob("*-cache"))


def encoder_params(trainer: tokenizer.TokenizerTrainer):
    """Returns the shapes of all parameters of the tokenizer, whole on every device."""
    state = tokenizer.abstract_arguments(trainer)[0]
    everywhere = replicated(trainer.mesh)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere), state.params)


def random_values(shapes, highest: int = 1):
    """Returns arrays of these shapes on their devices: small normal numbers, and integers below `highest`.

    Moments of optimizers are 0, and statistics of batch norms 1.
    """
    rng = np.random.default_rng(0)

    def value(path, leaf):
        name = jax.tree_util.keystr(path)
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            array = rng.integers(0, highest, leaf.shape).astype(leaf.dtype)
        elif "batch_stats" in name or "optimizer" in name:
            array = np.full(leaf.shape, float("batch_stats" in name), leaf.dtype)
        else:
            array = (np.float32(0.02) * rng.standard_normal(leaf.shape, np.float32)).astype(leaf.dtype)
        return jax.device_put(array, leaf.sharding)

    return jax.tree_util.tree_map_with_path(value, shapes)
