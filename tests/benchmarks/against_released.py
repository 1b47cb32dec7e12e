"""Times a training step of the released PyTorch code and of this one, and prints a table in markdown.

    git clone https://github.com/TencentARC/SEED-Voken && pip install lightning pytorch-lightning torchmetrics omegaconf
    python tests/benchmarks/against_released.py --released=SEED-Voken --batch=1

Both take the same step, in float32 on the CPU with random weights and images: reconstruction, LPIPS, discriminator,
both optimizers, average. They run one after another, each in a process of its own, so that its peak memory is its own;
the first step, which compiles, is given apart.
CPU seconds are of all threads, and tell more than wall seconds where other work runs on the machine.
"""

import argparse
import contextlib
import json
import os
import resource
import statistics
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
PRESETS = ("imagenet256_1024", "imagenet256_8192", "imagenet256_16384", "imagenet256_262144", "openmoji32")


def released_step(preset: str, batch: int) -> Callable[[], object]:
    """Returns a function that takes one step of the released code, which has to be importable."""
    import lightning  # noqa: F401  they replace modules that the stubs below would hide from them
    import pytorch_lightning  # noqa: F401
    import torch
    import torchmetrics  # noqa: F401

    from ibq_jax.base.config import load_config

    config = load_config(f"{ROOT}/configs/tokenizer.py:{preset}", [])
    stub_imports(torch)
    from src.IBQ.models.ibqgan import IBQ  # pyright: ignore[reportMissingImports]

    layout = dict(
        double_z=False,
        z_channels=config.model.z_channels,
        resolution=config.model.resolution,
        in_channels=3,
        out_ch=3,
        ch=config.model.channels,
        ch_mult=list(config.model.channel_multipliers),
        num_res_blocks=config.model.num_res_blocks,
        attn_resolutions=list(config.model.attention_resolutions),
        dropout=0.0,
    )
    loss = dict(
        disc_conditional=False,
        disc_in_channels=3,
        disc_start=0,
        disc_ndf=config.discriminator.channels,
        disc_num_layers=config.discriminator.num_layers,
        disc_weight=0.4,
        quant_loss_weight=1.0,
        entropy_loss_weight=0.05,
        gen_loss_weight=0.1,
        lecam_loss_weight=0.05,
        perceptual_weight=config.loss.perceptual_weight,
    )
    model = IBQ(
        layout,
        dict(target="src.IBQ.modules.losses.vqperceptual.VQLPIPSWithDiscriminator", params=loss),
        n_embed=config.codebook.size,
        embed_dim=config.codebook.dim,
        learning_rate=1e-4,
        use_entropy_loss=True,
        use_ema=True,
    )
    optimizers = tuple(found["optimizer"] for found in model.configure_optimizers())
    model.optimizers = lambda: optimizers
    model.manual_backward = lambda loss: loss.backward()
    model.log_dict = lambda *_, **__: None
    size = config.data.image_size
    images = torch.rand(batch, size, size, 3) * 2 - 1

    def step():
        model.training_step({"image": images}, 0)
        model.on_train_batch_end()

    return step


def stub_imports(torch) -> None:
    """Puts stand-ins for what the released code imports, but this step does not need, into sys.modules."""

    def instantiate_from_config(config):
        module, name = config["target"].rsplit(".", 1)
        return getattr(__import__(module, fromlist=[name]), name)(**config["params"])

    def vgg16(*_, **__):
        layers, channels = [], 3
        for width in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0):
            if width:
                layers += [torch.nn.Conv2d(channels, width, 3, padding=1), torch.nn.ReLU(inplace=True)]
                channels = width
            else:
                layers.append(torch.nn.MaxPool2d(2))
        return types.SimpleNamespace(features=torch.nn.Sequential(*layers))

    for name, attributes in {
        "main": {"instantiate_from_config": instantiate_from_config},
        "torchvision": {"models": types.SimpleNamespace(vgg16=vgg16)},
    }.items():
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(attributes)
    from src.IBQ.modules.losses import lpips  # pyright: ignore[reportMissingImports]

    lpips.LPIPS.load_from_pretrained = lambda self, name="": None


def our_step(preset: str, batch: int) -> Callable[[], object]:
    """Returns a function that takes one step of this code."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from ibq_jax.base.config import load_config
    from ibq_jax.base.sharding import create_sharded, make_mesh
    from ibq_jax.pretrained.lpips import weight_shapes
    from ibq_jax.tokenizer.step import TokenizerTrainer, jit_train_step

    with contextlib.suppress(ImportError):  # an older checkout may not have it
        from ibq_jax.base.memory import keep_freed_memory

        keep_freed_memory()  # as training does
    groups = {"discriminator.norm_group": 0, "quantizer.entropy_group_tokens": 0}  # the whole batch, as released
    fields = {"dtype": "float32", "data.batch_size": batch, **groups}
    overrides = [f"--config.{name}={value}" for name, value in fields.items()]
    config = load_config(f"{ROOT}/configs/tokenizer.py:{preset}", overrides)
    trainer = TokenizerTrainer(config, make_mesh({}, jax.devices()[:1]), steps_per_epoch=1)
    state = create_sharded(trainer.create_state, trainer.mesh, 0)
    compiled, nets = jit_train_step(trainer), None
    random = np.random.default_rng(0)
    if config.loss.perceptual_weight:
        nets = {"vgg16": jax.tree.map(lambda leaf: jnp.float32(random.normal(0, 0.02, leaf.shape)), weight_shapes())}
    size = config.data.image_size
    images = random.integers(0, 256, (batch, size, size, 3), np.uint8)

    def step():
        nonlocal state
        state, metrics = compiled(state, nets, images)
        jax.block_until_ready(metrics)

    return step


def measure(step: Callable[[], object], steps: int) -> dict:
    """Returns the seconds of the first step, the medians of the others, and the process's peak memory in bytes."""
    times = []
    for _ in range(steps + 1):
        wall, cpu = time.perf_counter(), time.process_time()
        step()
        times.append((time.perf_counter() - wall, time.process_time() - cpu))
    wall, cpu = (statistics.median(column) for column in zip(*times[1:], strict=True))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"first": times[0][0], "wall": wall, "cpu": cpu, "peak": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--released", required=True, help="a checkout of SEED-Voken")
    parser.add_argument("--before", help="an older checkout of this project, to compare with as well")
    parser.add_argument("--preset", choices=PRESETS, default="imagenet256_16384")
    parser.add_argument("--batch", type=int, default=1, help="images in a step")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each")
    parser.add_argument("--only", choices=("released", "ours"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        make = {"released": released_step, "ours": our_step}[arguments.only]
        print(json.dumps(measure(make(arguments.preset, arguments.batch), arguments.steps)))
        return
    programs = {"released": ("released", [arguments.released, str(ROOT)]), "this code": ("ours", [str(ROOT)])}
    if arguments.before:
        programs["this code before"] = ("ours", [arguments.before])
    print(f"{arguments.preset}, {arguments.batch} images, {os.cpu_count()} cores\n")
    print("| code | CPU seconds | against released | wall seconds | the first step | peak memory |")
    print("|---|---|---|---|---|---|")
    released = None
    for name, (which, paths) in programs.items():
        argv = [sys.executable, __file__, f"--only={which}", f"--released={arguments.released}"]
        argv += [f"--preset={arguments.preset}", f"--batch={arguments.batch}", f"--steps={arguments.steps}"]
        paths = os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")])
        out = subprocess.run(argv, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True)
        if out.returncode:
            sys.exit(out.stderr)
        found = json.loads(out.stdout.splitlines()[-1])
        released = released or found
        row = f"{found['cpu']:.1f} | {found['cpu'] / released['cpu']:.2f} | {found['wall']:.1f} | {found['first']:.1f}"
        print(f"| {name} | {row} | {found['peak'] / 1e9:.1f} GB |", flush=True)


if __name__ == "__main__":
    main()
