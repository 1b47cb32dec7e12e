"""python -m ibq_jax plan: compiles a config's training step for devices that are not here, and says what it needs."""

import contextlib
import dataclasses
import json
from pathlib import Path

import jax

from ibq_jax.autoregressive import check as autoregressive_check
from ibq_jax.autoregressive import step as autoregressive
from ibq_jax.autoregressive.token_sizes import preset_sizes, resolve_model
from ibq_jax.base.config import PREFIX, load_config
from ibq_jax.base.errors import Failed, UsageError
from ibq_jax.base.sharding import make_mesh
from ibq_jax.commands.arguments import Parser, positive
from ibq_jax.plan.chips import topology_devices
from ibq_jax.plan.compiled import DoesNotFit, Plan, compile_plan
from ibq_jax.tokenizer import check as tokenizer_check
from ibq_jax.tokenizer import step as tokenizer

STAGES = {
    "tokenizer": (tokenizer, tokenizer.TokenizerTrainer, tokenizer_check.check_config),
    "autoregressive": (autoregressive, autoregressive.GeneratorTrainer, autoregressive_check.check_config),
}
GB = 1e9
PEAKS = (
    "Peaks of a {name} chip: {flops:.3g} operations/s in bfloat16, {hbm_bytes_per_second:.3g} bytes/s of HBM, "
    "{ici_bytes_per_second:.3g} bytes/s to its neighbours ({source})."
)
BETWEEN_SLICES = (
    "Collectives over data go between the slices too, by a network whose speed is not known here: the bound by "
    "interconnect takes it for that inside a slice."
)
TO_TRY = (
    "try a larger codebook or fsdp axis in --mesh, --config.model.remat=blocks, or --config.train.grad_accum_steps=2 "
    "or more chips (fewer images a chip at a time)"
)


def main(argv: list[str]) -> None:
    """Runs the command; `argv` is what follows the word "plan".

    Raises:
        UsageError: wrong flags, an unknown topology, sizes that do not divide, or libtpu is not installed.
        Failed: the step does not fit into the chips' memory.
    """
    command_line = parser()
    flags, rest = command_line.parse_known_args(argv)
    for argument in rest:
        if not argument.startswith(PREFIX):
            command_line.error(
                f"unknown argument {argument}; fields of the config are overridden with {PREFIX}NAME=VALUE"
            )
    config = load_config(flags.config, rest)
    if config.stage not in STAGES:
        raise UsageError(f"{flags.config} is of stage {config.stage!r}; plan knows {', '.join(STAGES)}")
    stage, make_trainer, check_config = STAGES[config.stage]
    jax.config.update("jax_platforms", "cpu")  # nothing runs: an accelerator of this machine stays free
    if flags.topology:
        chip, devices = topology_devices(flags.topology, flags.slices)
    elif flags.slices > 1:
        raise UsageError(f"--slices={flags.slices}: slices are of a --topology")
    else:
        chip, devices = None, _cpu_devices(flags.cpu_devices)
    mesh = make_mesh(_mesh_sizes(flags.mesh) if flags.mesh else config.mesh, devices)
    if config.stage == "autoregressive":
        config = resolve_model(config, preset_sizes(flags.config))
    check_config(config, mesh)
    trainer = make_trainer(config, mesh, steps_per_epoch=1)
    try:
        plan = compile_plan(stage.jit_train_step(trainer), stage.abstract_arguments(trainer), mesh, chip)
    except DoesNotFit as error:
        raise Failed(
            f"{flags.config} {error}: {(error.needed - error.capacity) / 2**30:.1f} GiB over; {TO_TRY}"
        ) from None
    report = _report(plan, flags.config, config.data.batch_size, mesh, flags.slices)
    if flags.json is None:
        print(_table(report))
    else:
        text = json.dumps(report, indent=2)
        print(text if flags.json == "-" else f"wrote {flags.json}")
        if flags.json != "-":
            Path(flags.json).write_text(text + "\n")
    if chip is not None and plan.memory.peak > chip.hbm_bytes:
        over = (plan.memory.peak - chip.hbm_bytes) / GB
        raise Failed(f"{flags.config} does not fit: {over:.2f} GB over on every chip; {TO_TRY}")


def parser() -> Parser:
    parser = Parser(
        "plan",
        __doc__.partition(": ")[2],
        notes=f"Fields of the config are overridden with {PREFIX}NAME=VALUE. Exit code 1 when the step does not fit.",
    )
    parser.add_argument(
        "--config", required=True, help="FILE.py:PRESET, such as configs/tokenizer.py:imagenet256_262144"
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--topology", help="TPU chips, such as v5e:16x16 (needs libtpu, see requirements-tpu.txt)")
    where.add_argument("--cpu-devices", type=positive, metavar="N", help="simulated devices instead")
    parser.add_argument("--slices", type=positive, default=1, help="so many of that topology; the axis data joins them")
    parser.add_argument("--mesh", help="such as data:16,codebook:16 (default: the config's)")
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE", help="JSON to FILE, or instead of the table")
    return parser


def _mesh_sizes(text: str) -> dict[str, int]:
    sizes = {}
    for part in text.split(","):
        axis, _, size = part.partition(":")
        if not size.isdecimal() or not int(size) or axis in sizes:
            raise UsageError(f"--mesh={text}: {part!r} is no AXIS:SIZE; write it like data:16,codebook:16")
        sizes[axis] = int(size)
    return sizes


def _cpu_devices(count: int) -> list[jax.Device]:
    with contextlib.suppress(RuntimeError):  # where devices exist already, of those
        jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise UsageError(f"--cpu_devices={count}: this process has only {len(devices)}")
    return devices[:count]


def _report(plan: Plan, config: str, batch_size: int, mesh: jax.sharding.Mesh, slices: int) -> dict:
    bounds = plan.bounds
    binding = max(bounds, key=bounds.get) if bounds else None
    return {
        "config": config,
        "mesh": dict(mesh.shape),
        "devices": plan.devices,
        "slices": slices,
        "images_a_step": batch_size,
        "chip": dataclasses.asdict(plan.chip) if plan.chip else None,
        "argument_bytes": plan.memory.arguments,
        "temporary_bytes": plan.memory.temporaries,
        "peak_bytes": plan.memory.peak,
        "spare_share": plan.memory.spare(plan.chip.hbm_bytes) if plan.chip else None,
        "flops": plan.flops,
        "hbm_bytes": plan.hbm_bytes,
        "xla_bytes_accessed": plan.accessed_bytes,
        "bound_seconds": bounds,
        "binding": binding,
        "images_a_second_at_best": batch_size / bounds[binding] if binding else None,
        "collectives": [dataclasses.asdict(traffic) for traffic in plan.collectives],
        "compile_seconds": plan.compile_seconds,
    }


def _table(report: dict) -> str:
    chip, mesh = report["chip"], ", ".join(f"{axis} {size}" for axis, size in report["mesh"].items() if size > 1)
    capacity = f" of {chip['hbm_bytes'] / GB:.1f} GB, {report['spare_share']:.0%} to spare" if chip else ""
    traffic = f"{report['hbm_bytes'] / GB:.2f} GB (XLA counts {report['xla_bytes_accessed'] / GB:.2f} GB)"
    rows = [
        ("memory: arguments", f"{report['argument_bytes'] / GB:.2f} GB"),
        ("memory: temporaries", f"{report['temporary_bytes'] / GB:.2f} GB"),
        ("memory: peak", f"{report['peak_bytes'] / GB:.2f} GB{capacity}"),
        ("matrix products", f"{report['flops'] / 1e12:.2f} TFLOP"),
        ("memory traffic", traffic),
        *((f"bound by {side}", f"{1e3 * seconds:.1f} ms") for side, seconds in report["bound_seconds"].items()),
    ]
    if chip:
        best = f"{report['images_a_second_at_best']:,.0f} images/s, bound by {report['binding']}"
        rows.append((f"all {report['devices']} chips at best", best))
    rows += [
        (f"{row['kind']} over {row['axes']}", f"{row['count']:,} x, {row['bytes'] / 1e6:,.1f} MB")
        for row in report["collectives"]
    ]
    rows.append(("compiled in", f"{report['compile_seconds']:.0f} s"))
    kind = f"{chip['name']} chips" if chip else "simulated devices"
    if report["slices"] > 1:
        kind += f" in {report['slices']} slices"
    title = f"{report['config']}, {report['images_a_step']} images a step on {report['devices']} {kind}"
    lines = [f"{title} ({mesh or 'one device'}); a device's share of a step:", "", "| what | figure |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in rows]
    lines += ["", PEAKS.format_map(chip)] if chip else []
    return "\n".join(lines + ([BETWEEN_SLICES] if report["slices"] > 1 else []))
