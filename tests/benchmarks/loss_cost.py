"""Prints what each loss and each discriminator costs by itself, as a table in markdown, on one v5e chip or one H100.

    JAX_PLATFORMS=cpu python tests/benchmarks/loss_cost.py --topology=v5e:1x1 --out=costs_v5e.jsonl
    JAX_PLATFORMS=cpu python tests/benchmarks/loss_cost.py --topology=h100:1 --out=costs_h100.jsonl --only=dino

Nothing runs, and weights are shapes only: each case is compiled for the chip, as `python -m ibq_jax plan` does, and
what the compiler expects or the compiled text says is read off. A loss's case is its value and its gradient at the
reconstruction (an alignment's: at latents and projection); a discriminator has two, its own step, and the tokenizer's
loss against it. Images are 4 of 256x256, in bfloat16, of `imagenet256_16384`. Cases that --out has are not compiled
again.
"""

import argparse
import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp

from ibq_jax.base.compiler import compiler_options
from ibq_jax.base.config import load_config
from ibq_jax.base.sharding import abstract_everywhere, make_mesh, replicated, with_sharding
from ibq_jax.plan.chips import topology_devices
from ibq_jax.plan.compiled import Plan, compile_plan
from ibq_jax.plan.gpus import GPUS, Gpu, gpu_devices
from ibq_jax.plan.kernels import by_kind
from ibq_jax.pretrained import lpips
from ibq_jax.pretrained.frozen_nets import NETS
from ibq_jax.tokenizer import losses, net_losses
from ibq_jax.tokenizer.discriminators import frozen_net
from ibq_jax.tokenizer.last_layers import at_last_layer_of_decoder
from ibq_jax.tokenizer.step import TokenizerTrainer

PRESET = Path(__file__).parents[2] / "configs" / "tokenizer.py"
IMAGES, SIDE, GRID = 4, 256, 16
PICTURES = jax.ShapeDtypeStruct((IMAGES, SIDE, SIDE, 3), jnp.float32)
STEP = jax.ShapeDtypeStruct((), jnp.int32)
DINO = ("discriminator.name=dino",)
TOKENS = (
    *(*DINO, "discriminator.net=dino_vits16", "discriminator.heads=tokens", "discriminator.channels=384"),
    *("discriminator.spectral_norm=true",),
)
DISCRIMINATORS: dict[str, tuple[str, ...]] = {  # name -> fields; the preset's norm_group is the 4 images
    "patch": (),
    "patch, without LeCAM": ("loss.lecam_weight=0.0",),
    "patch, with R1 at every step": ("discriminator.r1_weight=10.0", "discriminator.r1_every=1"),
    "stylegan": ("discriminator.name=stylegan",),
    "dino, maps of EfficientNet-Lite0": DINO,
    "dino, maps of DINO ViT-S/16": (*DINO, "discriminator.net=dino_vits16"),
    "dino, tokens of DINO ViT-S/16": TOKENS,
}
OWN_STEP_ONLY = ("patch, without LeCAM", "patch, with R1 at every step")
Case = tuple[Callable, tuple]  # a function of arrays, and its abstract arguments


def make_trainer(mesh: jax.sharding.Mesh, *fields: str) -> TokenizerTrainer:
    overrides = [f"--config.{field}" for field in (f"data.batch_size={IMAGES}", *fields)]
    return TokenizerTrainer(load_config(f"{PRESET}:imagenet256_16384", overrides), mesh, steps_per_epoch=1)


def lpips_case(net: str) -> Case:
    def cost(weights, images, reconstructions):
        def distance(reconstructions):
            return jnp.mean(lpips.lpips(weights, images, reconstructions, jnp.dtype(jnp.bfloat16), net))

        return jax.value_and_grad(distance)(reconstructions)

    return cost, (lpips.weight_shapes(net), PICTURES, PICTURES)


def net_case(mesh: jax.sharding.Mesh, measure: Callable, field: str, net: str) -> Case:
    """Returns the case of a loss on a frozen network, which `field` names."""
    config = make_trainer(mesh, f"{field}={net}").config

    def cost(nets, images, reconstructions):
        return jax.value_and_grad(lambda images_: jnp.mean(measure(config, nets, images, images_)))(reconstructions)

    return cost, ({net: NETS[net].weight_shapes()}, PICTURES, PICTURES)


def alignment_case(mesh: jax.sharding.Mesh, net: str, of: str) -> Case:
    config = make_trainer(mesh, "alignment.weight=0.1", f"alignment.net={net}", f"alignment.of={of}").config
    channels = net_losses.aligned_channels(config)
    projection = jax.eval_shape(partial(net_losses.initial_projection, config, channels=channels), jax.random.key(0))
    aligned = jax.ShapeDtypeStruct((IMAGES, GRID, GRID, channels), jnp.bfloat16)

    def cost(nets, projection, images, aligned):
        measure = jax.value_and_grad(net_losses.measure_alignment, argnums=(2, 4))
        return measure(config, nets, projection, images, aligned)

    return cost, ({net: NETS[net].weight_shapes()}, projection, PICTURES, aligned)


def adaptive_weight_case(mesh: jax.sharding.Mesh) -> Case:
    trainer = make_trainer(mesh, "loss.adaptive_limit=1e4")
    layer = abstract_everywhere(lambda: trainer.create_state(0).params["decoder"]["conv_out"], mesh)
    inputs = jax.ShapeDtypeStruct((IMAGES, SIDE, SIDE, trainer.config.model.channels), jnp.bfloat16)

    def cost(layer, inputs, *gradients):
        at_last_layer = partial(at_last_layer_of_decoder, trainer.model, {"decoder": {"conv_out": layer}}, inputs)
        return losses.adaptive_weight(*map(at_last_layer, gradients), trainer.config.loss.adaptive_limit)

    return cost, (layer, inputs, PICTURES, PICTURES)


def discriminator_cases(mesh: jax.sharding.Mesh, name: str) -> Iterator[tuple[str, Case]]:
    trainer = make_trainer(mesh, *DISCRIMINATORS[name])
    state = abstract_everywhere(lambda: trainer.adversarial.create(jax.random.key(0)), mesh)
    net = frozen_net(trainer.config)
    weights = NETS[net].weight_shapes() if net else None
    yield f"{name}: its step", (trainer.adversarial.train, (state, PICTURES, PICTURES, STEP, weights))
    if name in OWN_STEP_ONLY:
        return

    def against(state, reconstructions, step, weights):
        loss_of = jax.value_and_grad(trainer.adversarial.loss_of, argnums=1, has_aux=True)
        return loss_of(state, reconstructions, step, weights)

    yield f"{name}: the tokenizer's loss", (against, (state, PICTURES, STEP, weights))


def cases(mesh: jax.sharding.Mesh) -> Iterator[tuple[str, Case]]:
    for net in ("vgg16", "alexnet"):
        yield f"LPIPS, {net}", lpips_case(net)
    for net in ("efficientnet", "dino_vits16"):
        yield f"features, {net}", net_case(mesh, net_losses.measure_features, "loss.features_net", net)
    yield "logits, convnext_small", net_case(mesh, net_losses.measure_logits, "loss.logits_net", "convnext_small")
    for net, of in (("dinov2_vits14", "latents"), ("dinov2_vits14", "decoder"), ("dinov2_vitb14", "latents")):
        yield f"alignment of {of}, {net}", alignment_case(mesh, net, of)
    yield "adaptive weight of the adversarial loss", adaptive_weight_case(mesh)
    for name in DISCRIMINATORS:
        yield from discriminator_cases(mesh, name)


def measured(name: str, plan: Plan) -> dict:
    """Returns a row of the table, times in ms."""
    assert plan.chip is not None
    seconds = plan.chip.product_seconds(plan.flops_by_bits)
    return {
        "case": name,
        "expected": 1e3 * sum(plan.expected_seconds.values()) or None,
        "products": 1e3 * max(seconds.values()),
        "hbm": 1e3 * plan.hbm_bytes / plan.chip.hbm_bytes_per_second,
        "hbm_bytes": plan.hbm_bytes,
        "gflop_by_bits": {bits: flops / 1e9 for bits, flops in plan.flops_by_bits.items()},
        "launches": sum(kernels.launches for kernels in plan.kernels) or None,
        "kernels": {kind: launches for kind, (launches, _) in by_kind(plan.kernels).items()},
        "temporaries": plan.memory.temporaries,
        "compiled": plan.compile_seconds,
    }


def table(rows: list[dict]) -> str:
    lines = ["| loss | expected, ms | matrix products at the peak, ms | HBM, GB | HBM at the peak, ms | launches |"]
    lines.append("|---|---|---|---|---|---|")
    for row in rows:
        expected, launches = ("-" if row[name] is None else row[name] for name in ("expected", "launches"))
        expected = expected if expected == "-" else f"{expected:.2f}"
        figures = f"{row['products']:.2f} | {row['hbm_bytes'] / 1e9:.2f} | {row['hbm']:.2f}"
        lines.append(f"| {row['case']} | {expected} | {figures} | {launches} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default="v5e:1x1", help="v5e:1x1 or h100:1")
    parser.add_argument("--out", type=Path, required=True, help="a file of JSON lines, which rows are added to")
    parser.add_argument("--only", default="", help="a regular expression: cases whose name it is found in")
    flags = parser.parse_args()
    chip, devices = (
        gpu_devices(flags.topology) if flags.topology.split(":")[0] in GPUS else topology_devices(flags.topology)
    )
    mesh = make_mesh({"data": 1}, devices)
    known = [json.loads(line) for line in flags.out.read_text().splitlines()] if flags.out.is_file() else []
    rows = {row["case"]: row for row in known}
    for name, (cost, arguments) in cases(mesh):
        if name in rows or not re.search(flags.only, name):
            continue
        step = jax.jit(cost, compiler_options=compiler_options(mesh))
        plan = compile_plan(step, with_sharding(arguments, replicated(mesh)), mesh, chip)
        rows[name] = measured(name, plan)
        with flags.out.open("a") as file:
            file.write(json.dumps(rows[name]) + "\n")
        print(f"{name}: compiled in {plan.compile_seconds:.0f} s", flush=True)
    kind = "compiled text's counts" if isinstance(chip, Gpu) else "compiler's estimates"
    print(f"{flags.topology}, {IMAGES} images of {SIDE}x{SIDE}, {kind}; nothing was run.\n")
    print(table(list(rows.values())))


if __name__ == "__main__":
    main()
