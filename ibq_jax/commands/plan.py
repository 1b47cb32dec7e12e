"""`python -m ibq_jax plan` compiles a config's programs for devices that are not present, and prints their needs."""

import argparse
import contextlib
import copy
import json
from collections.abc import Callable
from pathlib import Path

import jax
from ml_collections import ConfigDict

from ibq_jax import __version__
from ibq_jax.autoregressive import check as autoregressive_check
from ibq_jax.autoregressive import step as autoregressive
from ibq_jax.autoregressive.sample_codes import sampling_program
from ibq_jax.autoregressive.token_sizes import preset_sizes, resolve_model
from ibq_jax.base.config import PREFIX, load_config
from ibq_jax.base.errors import Failed, UsageError
from ibq_jax.base.files import write_text
from ibq_jax.base.sharding import make_mesh
from ibq_jax.commands.arguments import Parser, positive
from ibq_jax.commands.plan_table import ENCODE, ESTIMATE, GB, SAMPLE, TRAIN, describe, table
from ibq_jax.joint import check as joint_check
from ibq_jax.joint import step as joint
from ibq_jax.joint.parts import resolve as resolve_joint
from ibq_jax.plan.chips import Chip, topology_devices
from ibq_jax.plan.compiled import DoesNotFit, compile_plan
from ibq_jax.plan.gpus import GPUS, HERE, Gpu, attached_gpus, check_nodes, gpu_devices
from ibq_jax.plan.search import FITS, Candidate, Outcome, Program, Results, best, search
from ibq_jax.tokenizer import check as tokenizer_check
from ibq_jax.tokenizer import step as tokenizer
from ibq_jax.tokenizer.tokenize import encoding_program

# Stage -> its trainer, the check of its config, and the values of model.remat, among which a search chooses
STAGES: dict[str, tuple[Callable, Callable, tuple[str, ...]]] = {
    "tokenizer": (
        tokenizer.TokenizerTrainer,
        tokenizer_check.check_config,
        tokenizer_check.CHOICES["model.remat"],
    ),
    "autoregressive": (
        autoregressive.GeneratorTrainer,
        autoregressive_check.check_config,
        autoregressive_check.CHOICES["model.remat"],
    ),
    "joint": (joint.JointTrainer, joint_check.check_config, ()),
}
# Stage -> what runs in it -> trainer to (jitted program, its abstract arguments)
PROGRAMS: dict[str, dict[str, Callable[..., tuple[Callable, tuple]]]] = {
    "tokenizer": {
        TRAIN: lambda trainer: (tokenizer.jit_train_step(trainer), tokenizer.abstract_arguments(trainer)),
        ENCODE: encoding_program,
    },
    "autoregressive": {
        TRAIN: lambda trainer: (autoregressive.jit_train_step(trainer), autoregressive.abstract_arguments(trainer)),
        SAMPLE: sampling_program,
    },
    "joint": {TRAIN: lambda trainer: (joint.jit_train_step(trainer), joint.abstract_arguments(trainer))},
}
# Fields that encoding has no use for, without effect: their checks would restrict its batch.
NOT_FOR_ENCODING = {"discriminator.norm_group": 0, "quantizer.entropy_group_tokens": 0, "train.grad_accum_steps": 1}
BEST = 5  # candidates of a search that are listed
TO_TRY = (
    "try a larger codebook or fsdp axis in --mesh, --config.model.remat=blocks, --config.train.grad_accum_steps=2, "
    "or more chips (fewer images per chip)"
)


def main(argv: list[str]) -> None:
    """Runs the command with the arguments that follow the word "plan".

    Raises:
        UsageError: wrong flags, an unknown topology, sizes that do not divide, or a compiler that is not installed.
        Failed: the step does not fit into the devices' memory.
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
    if flags.what not in PROGRAMS[config.stage]:
        raise UsageError(
            f"--what={flags.what} is not for stage {config.stage!r}, which has {' and '.join(PROGRAMS[config.stage])}"
        )
    if flags.topology != HERE:
        jax.config.update("jax_platforms", "cpu")  # nothing runs, so this machine's accelerator stays free
    if flags.topology:
        chip, devices = _devices(flags.topology, flags.slices)
    elif flags.slices > 1:
        raise UsageError(f"--slices={flags.slices} needs --topology")
    else:
        chip, devices = None, _cpu_devices(flags.cpu_devices)
    if flags.search:
        _search(flags, rest, config, chip, devices)
        return
    mesh = make_mesh(_mesh_sizes(flags.mesh) if flags.mesh else config.mesh, devices)
    if isinstance(chip, Gpu):
        check_nodes(mesh)
    try:
        plan = compile_plan(*_program(config, flags, mesh), mesh, chip)
    except DoesNotFit as error:
        raise Failed(
            f"{flags.config} {error}: {(error.needed - error.capacity) / 2**30:.1f} GiB over; {TO_TRY}"
        ) from None
    report = {"what": flags.what} | describe(plan, flags.config, config.data.batch_size, mesh, flags.slices)
    if flags.json is None:
        print(table(report))
    else:
        text = json.dumps(report, indent=2)
        print(text if flags.json == "-" else f"wrote {flags.json}")
        if flags.json != "-":
            write_text(Path(flags.json), text + "\n")
    if chip is not None and plan.memory.peak > chip.hbm_bytes:
        over = (plan.memory.peak - chip.hbm_bytes) / GB
        device = "GPU" if isinstance(chip, Gpu) else "chip"
        raise Failed(f"{flags.config} does not fit: {over:.2f} GB over on every {device}; {TO_TRY}")


def _program(config: ConfigDict, flags: argparse.Namespace, mesh: jax.sharding.Mesh) -> tuple[Callable, tuple]:
    """Returns the jitted program that `--what` names, and abstract arguments; raises UsageError for a bad config."""
    make_trainer, check_config, _ = STAGES[config.stage]
    if config.stage == "autoregressive":
        config = resolve_model(config, preset_sizes(flags.config))
    elif config.stage == "joint":
        config = resolve_joint(config, preset_sizes(flags.config))
    elif flags.what == ENCODE:
        config = copy.deepcopy(config)
        config.update_from_flattened_dict(NOT_FOR_ENCODING)
    check_config(config, mesh)
    return PROGRAMS[config.stage][flags.what](make_trainer(config, mesh, steps_per_epoch=1))


def _search(
    flags: argparse.Namespace, overrides: list[str], config: ConfigDict, chip: Chip | Gpu | None, devices: list
):
    """Runs `--search`: prints each candidate's outcome as it comes, and the best as a table."""
    if not isinstance(chip, Chip) or flags.mesh or flags.what != TRAIN:
        raise UsageError(
            "--search needs --topology of TPUs, whose compiler tells how long a step takes, and goes without --mesh "
            "and --what: it tries meshes for training"
        )

    if not STAGES[config.stage][2]:
        raise UsageError(f"--search is not for stage {config.stage!r}; plan meshes for it one by one, with --mesh")

    def prepare(candidate: Candidate) -> Program:
        fields = {"train.grad_accum_steps": candidate.micro_batches, "model.remat": candidate.remat}
        chosen = load_config(flags.config, [*overrides, *(f"{PREFIX}{name}={fields[name]}" for name in fields)])
        mesh = make_mesh(candidate.sizes, devices)
        return Program(*_program(chosen, flags, mesh), mesh)

    settings = {"config": config.to_dict(), "topology": flags.topology, "slices": flags.slices}
    known = Results(Path(flags.search), settings | {"versions": [__version__, jax.__version__]})
    found = []
    for candidate, outcome in search(len(devices), STAGES[config.stage][2], prepare, chip, known):
        found.append((candidate, outcome))
        print(f"{candidate}: {_in_words(outcome)}", flush=True)
    fastest = best(found, BEST)
    if not fastest:
        raise Failed(f"no mesh of {flags.topology} fits {flags.config}; take more chips or fewer images a step")
    rows = ["", "| mesh | micro-batches | remat | expected | images/s | peak memory |", "|---|---|---|---|---|---|"]
    for candidate, outcome in fastest:
        mesh = ",".join(f"{axis}:{size}" for axis, size in candidate.sizes.items() if size > 1)
        rate = f"{1e3 * outcome.seconds:.1f} ms | {config.data.batch_size / outcome.seconds:,.0f}"
        ways = f"{candidate.micro_batches} | {candidate.remat}"
        rows.append(f"| {mesh} | {ways} | {rate} | {outcome.peak_bytes / GB:.2f} GB |")
    print("\n".join([*rows, "", ESTIMATE]))


def _in_words(outcome: Outcome) -> str:
    if outcome.outcome != FITS:
        return f"{outcome.outcome}: {outcome.reason}"
    figures = f"{1e3 * outcome.seconds:.1f} ms expected, {outcome.peak_bytes / GB:.2f} GB"
    return f"{figures}, compiled in {outcome.compile_seconds:.0f} s"


def parser() -> Parser:
    """Returns the parser of the command's flags."""
    parser = Parser(
        "plan",
        "Compiles a config's training step, encoding or sampling for devices that are not present, and prints the "
        "memory, the time at best, the time that the compiler expects, and the collectives of each device.",
        examples=[
            "--config=configs/tokenizer.py:imagenet256_262144 --topology=v5e:8x8\n--mesh=data:4,codebook:16",
            "--config=configs/tokenizer.py:imagenet256_16384 --topology=v5e:2x4 --what=encode\n"
            "--config.data.batch_size=128",
            "--config=configs/tokenizer.py:imagenet256_16384 --topology=h100:8",
            "--config=configs/autoregressive.py:imagenet256_B --topology=v5e:4x4 --search",
            "--config=configs/joint.py:imagenet256_16384_B --topology=h100:8",
            "--config=configs/autoregressive.py:openmoji32 --cpu-devices=8 --config.data.batch_size=64",
        ],
        notes=f"Fields of the config are overridden with {PREFIX}NAME=VALUE. The exit code is 1 if the step does not "
        "fit. docs/plans.md has examples of the output.",
    )
    add = parser.add_argument
    add("--config", required=True, metavar="FILE.py:PRESET", help="The config whose training step is compiled.")
    add(
        "--what",
        choices=(TRAIN, ENCODE, SAMPLE),
        default=TRAIN,
        help="What to compile: a step of training; tokenize's encoding of a batch (tokenizers); drawing a batch of "
        "samples with the config's `sample` fields (generators). A batch is config.data.batch_size. Default: train.",
    )
    devices = parser.add_mutually_exclusive_group(required=True)
    devices.add_argument(
        "--topology",
        metavar="CHIP:SHAPE",
        help="Plan for these TPU chips, such as v5e:16x16, or for GPUs: a node (h100:8), nodes (h100:4x8), or those of "
        "this machine (here). Needs the extra [tpu] or [cuda], and only for `here` the devices.",
    )
    devices.add_argument("--cpu-devices", type=positive, metavar="N", help="Plan for N simulated devices.")
    add(
        "--slices",
        type=positive,
        default=1,
        metavar="N",
        help="Plan for N slices of the topology, joined along the mesh axis data. Default: 1.",
    )
    add("--mesh", metavar="AXIS:SIZE,...", help="Mesh, such as data:16,codebook:16. Default: the config's.")
    add(
        "--search",
        nargs="?",
        const="plan_search.jsonl",
        metavar="FILE",
        help="Try meshes, micro-batches and model.remat for training, and print the fastest that fit. Outcomes are "
        "kept in FILE (plan_search.jsonl if none is named), from which a search that was stopped goes on. Default: no "
        "search.",
    )
    add(
        "--json",
        nargs="?",
        const="-",
        metavar="FILE",
        help="Write the plan as JSON to FILE; without FILE, print JSON. Default: print a table.",
    )
    return parser


def _devices(topology: str, slices: int) -> tuple[Chip | Gpu | None, list]:
    """Returns the devices that `--topology` names, and their peaks if they are known."""
    family = topology.partition(":")[0]
    if family not in GPUS and topology != HERE:
        return topology_devices(topology, slices)
    if slices > 1:
        raise UsageError(f"--slices={slices} is for TPUs; nodes of GPUs are part of the topology, as in h100:4x8")
    return attached_gpus() if topology == HERE else gpu_devices(topology)


def _mesh_sizes(text: str) -> dict[str, int]:
    sizes = {}
    for part in text.split(","):
        axis, _, size = part.partition(":")
        if not size.isdecimal() or not int(size) or axis in sizes:
            raise UsageError(f"--mesh={text}: {part!r} is not AXIS:SIZE; write it like data:16,codebook:16")
        sizes[axis] = int(size)
    return sizes


def _cpu_devices(count: int) -> list:
    with contextlib.suppress(RuntimeError):  # JAX has initialized its devices already; use those
        jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise UsageError(f"--cpu-devices={count}: this process has only {len(devices)}")
    return devices[:count]
