"""`sweep`: trains a grid of configs, each in its own folder, and puts their results in one table."""

import argparse
import shlex
import shutil
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace

from ibq_jax.base.config import PREFIX
from ibq_jax.base.errors import UsageError
from ibq_jax.base.files import as_path
from ibq_jax.commands.arguments import Parser, count, positive
from ibq_jax.sweep.grid import Grid, parse_over, read_study
from ibq_jax.sweep.sweep import Sweep

NOTES = f"""\
Each point is trained in WORKDIR/FIELD=VALUE_..._seed=N. Repeating the command skips the points that are done or have
stopped by themselves, continues unfinished ones and retries failed ones; then it writes table.md, table.csv,
results.json and plots/. The exit code is 0 if all points are done and 1 if not. {PREFIX}NAME=VALUE overrides a field
in every point.

Points run side by side, each on a device of its own, if the same command is given several times: a point that another
process is training is left to it. On GPUs, start each with another CUDA_VISIBLE_DEVICES. What `evaluate --run=POINT`
measures later is in the table that the next --table writes.

To run one job per point, --list prints the points, --point=INDEX trains one of them, and --table writes the table of
the results so far; launch/sweep.sh does this with Slurm. To train each point on several GPUs, several hosts or a TPU
pod, give a launch script as --launcher.
"""
EXAMPLES = (
    "--config=configs/tokenizer.py:openmoji32 --over codebook.size=256,1024,4096\n--seeds=2 --workdir=runs/sweep",
    "--study=configs/studies/collapse.py --workdir=runs/collapse --list",
    '--study=configs/studies/collapse.py --workdir=runs/collapse\n--launcher="bash launch/local_gpus.sh --processes=8"',
    "--study=configs/studies/collapse.py --workdir=gs://BUCKET/collapse\n"
    '--launcher="bash launch/tpu_pod.sh --name=pod --zone=ZONE --type=v5litepod-64 run"',
)


def main(argv: list[str]) -> None:
    """Runs the command; `argv` is what follows the word "sweep".

    Raises:
        UsageError: wrong flags, or a field or value that the config refuses; before anything is started.
        Failed: not every point is done.
        Interrupted: a signal came; the running point has saved its state.
    """
    flags, overrides = _flags(argv)
    sweep = Sweep(_grid(flags, overrides), flags.workdir)
    points = sweep.points
    if flags.list:
        for result in sweep.results():
            print(f"{result.point.index}  {result.point.name}  {result.status}")
        return
    if flags.point is not None:
        sweep.train_point(flags.point, flags.launcher)
        return
    if not flags.table:
        sweep.train(flags.launcher)
    table, plots = sweep.write_table(flags.metrics)
    print(table)
    print(f"wrote {flags.workdir}/ (table.md, table.csv, results.json, {plots} plots)")
    print(f"next: python -m ibq_jax report --run={','.join(str(flags.workdir / point.name) for point in points[:2])}")
    if not flags.table:
        sweep.check_done()


def parser() -> Parser:
    """Returns the command's argument parser."""
    parser = Parser(
        "sweep",
        "Trains a grid of configs, each in its own folder, and puts their results in one table.",
        examples=EXAMPLES,
        notes=NOTES,
    )
    add = parser.add_argument
    add(
        "--config",
        metavar="FILE.py:PRESET",
        help="The config to vary, such as configs/tokenizer.py:openmoji32. Default: the study's.",
    )
    add(
        "--over",
        action="append",
        default=[],
        metavar="FIELD=VALUE,VALUE",
        help="A field to sweep and its values; repeat the flag for a grid of several fields. Commas in brackets are "
        "part of a value: (1,2),(1,2,2). Default: none.",
    )
    add(
        "--seeds",
        type=positive,
        metavar="N",
        help="Number of seeds: every setting is trained with the seeds 0 to N - 1. Default: 1, or as the study says.",
    )
    add(
        "--study",
        metavar="FILE.py",
        help="Read CONFIG, OVER, SEEDS and OVERRIDES from this file. Default: none, use the flags above.",
    )
    add("--workdir", required=True, type=as_path, metavar="DIR", help="The folder of the sweep, local or gs://.")
    add(
        "--metrics",
        type=_names,
        default=(),
        metavar="A,B",
        help="Scalars of metrics.jsonl, and evaluation/PROTOCOL/NAME, to tabulate and plot. Default: the usual "
        "validation and codebook scalars, and what evaluate has measured.",
    )
    add(
        "--launcher",
        type=_command,
        default=[sys.executable, "-m", "ibq_jax"],
        metavar="COMMAND",
        help="The command that runs each point, given the arguments `train --config=... ...`; for example a script of "
        "launch/. Default: python -m ibq_jax, a process on this machine.",
    )
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--list", action="store_true", help="Print the index, name and status of each point, and exit.")
    mode.add_argument(
        "--point", type=count, metavar="INDEX", help="Train only the point of this index. Default: train all points."
    )
    mode.add_argument("--table", action="store_true", help="Train nothing; write the table and plots of all results.")
    return parser


def _grid(flags: Namespace, overrides: Sequence[str]) -> Grid:
    if (flags.study is None) == (flags.config is None):
        raise UsageError("give either --config=FILE.py:PRESET with --over, or --study=FILE.py")
    if flags.study is None:
        return Grid(flags.config, parse_over(flags.over), flags.seeds or 1, tuple(overrides))
    if flags.over:
        raise UsageError(f"--over cannot be combined with --study; {flags.study} states the fields to sweep")
    study = read_study(flags.study)
    return replace(study, seeds=flags.seeds or study.seeds, overrides=(*study.overrides, *overrides))


def _flags(argv: list[str]) -> tuple[Namespace, list[str]]:
    """Returns the flags, and the overrides of config fields among the arguments."""
    command_line = parser()
    flags, rest = command_line.parse_known_args(argv)
    for argument in rest:
        if not argument.startswith(PREFIX):
            command_line.error(
                f"unknown argument {argument}; fields of the config are overridden with {PREFIX}NAME=VALUE"
            )
    return flags, rest


def _names(text: str) -> tuple[str, ...]:
    """argparse type: names separated by commas."""
    return tuple(name for name in text.split(",") if name)


def _command(text: str) -> list[str]:
    """argparse type: a command, split as a shell would."""
    words = shlex.split(text)
    if not words or shutil.which(words[0]) is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a command on this machine")
    return words
