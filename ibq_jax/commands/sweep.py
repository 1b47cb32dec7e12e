"""python -m ibq_jax sweep: trains a grid of configs, each in its own folder, and puts their numbers in one table."""

import argparse
import shlex
import shutil
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace

from ibq_jax.base.config import PREFIX
from ibq_jax.base.errors import Failed, UsageError
from ibq_jax.base.files import as_path
from ibq_jax.commands.arguments import Parser, count, positive
from ibq_jax.sweep.grid import Grid, parse_over, read_study
from ibq_jax.sweep.plots import draw
from ibq_jax.sweep.points import PointTrainer
from ibq_jax.sweep.results import DONE, Point, Result, read_result, rows_of
from ibq_jax.sweep.table import chosen_metrics, write_table

EPILOG = f"""\
Points lie in WORKDIR/FIELD=VALUE_..._seed=N. The same command again passes over those that are done or have stopped
themselves, continues those in between, and tries again those that failed; then it writes table.md, table.csv,
results.json and plots/. Ends with exit code 0 if all points are done, 1 if not. Fields of every point are overridden
with {PREFIX}NAME=VALUE.

One job a point: --list prints the points, --point=INDEX trains one of them, --table writes the table of what is there;
launch/sweep.sh does that on Slurm. On several GPUs, hosts or a TPU pod, one point at a time:
  --launcher="bash launch/local_gpus.sh --processes=8"
  --launcher="bash launch/tpu_pod.sh --name=pod --zone=ZONE --type=v5litepod-64 run" --workdir=gs://BUCKET/sweep
"""


def main(argv: list[str]) -> None:
    """Runs the command; `argv` is what follows the word "sweep".

    Raises:
        UsageError: wrong flags, or a field or value that the config refuses; before anything is started.
        Failed: not every point is done.
        Interrupted: a signal came; the point that ran has saved.
    """
    flags, overrides = _flags(argv)
    grid = _grid(flags, overrides)
    points = grid.points()
    if flags.point is not None and flags.point >= len(points):
        raise UsageError(f"--point={flags.point}: the points are 0 to {len(points) - 1}; --list prints them")
    if flags.list:
        for point in points:
            print(f"{point.index}  {point.name}  {read_result(flags.workdir, point).status}")
        return
    if not flags.table:
        asked = points if flags.point is None else [points[flags.point]]
        PointTrainer(flags.workdir, grid.spec, flags.launcher).train(asked)
    if flags.point is not None:
        result = read_result(flags.workdir, points[flags.point])
        if result.status != DONE:
            raise Failed(f"{result.point.name} is {result.status}{': ' if result.reason else ''}{result.reason}")
        return
    results = _write(flags, points)
    unfinished = [f"{result.point.name} is {result.status}" for result in results if result.status != DONE]
    if unfinished and not flags.table:
        where = flags.workdir / "table.md"
        raise Failed(f"{len(unfinished)} of {len(points)} points are not done ({'; '.join(unfinished)}); see {where}")


def _write(flags: Namespace, points: Sequence[Point]) -> list[Result]:
    """The table and the plots of what is there."""
    results = [read_result(flags.workdir, point) for point in points]
    rows, metrics = rows_of(results), chosen_metrics(flags.metrics, results)
    plots = draw(flags.workdir, rows, metrics)
    print(write_table(flags.workdir, flags.workdir.name, rows, metrics, plots))
    print(f"wrote {flags.workdir}/ (table.md, table.csv, results.json, {len(plots)} plots)")
    print(f"next: python -m ibq_jax report --workdir={','.join(str(flags.workdir / p.name) for p in points[:2])}")
    return results


def _grid(flags: Namespace, overrides: Sequence[str]) -> Grid:
    if (flags.study is None) == (flags.config is None):
        raise UsageError("give either --config=FILE.py:PRESET with --over, or --study=FILE.py")
    if flags.study is None:
        return Grid(flags.config, parse_over(flags.over), flags.seeds or 1, tuple(overrides))
    if flags.over:
        raise UsageError(f"--over is stated by the study {flags.study}")
    study = read_study(flags.study)
    return replace(study, seeds=flags.seeds or study.seeds, overrides=(*study.overrides, *overrides))


def _flags(argv: list[str]) -> tuple[Namespace, list[str]]:
    """(the flags, the overrides among them)."""
    parser = Parser(
        "sweep",
        __doc__.partition(": ")[2],
        notes=EPILOG,
    )
    parser.add_argument("--config", help="FILE.py:PRESET, such as configs/tokenizer.py:openmoji32")
    parser.add_argument(
        "--over",
        action="append",
        default=[],
        metavar="FIELD=VALUE,VALUE",
        help="a field to sweep; several make a product; a comma in brackets belongs to its value: (1,2),(1,2,2)",
    )
    parser.add_argument("--seeds", type=positive, metavar="N", help="each point with the seeds 0 to N - 1 (default: 1)")
    parser.add_argument(
        "--study", metavar="FILE.py", help="states CONFIG, OVER, SEEDS and OVERRIDES, for the flags above"
    )
    parser.add_argument("--workdir", required=True, type=as_path, help="folder of the sweep, made when it is not there")
    parser.add_argument(
        "--metrics", type=_names, default=(), metavar="A,B", help="of metrics.jsonl, for the table and plots"
    )
    parser.add_argument(
        "--launcher",
        type=_command,
        default=[sys.executable, "-m", "ibq_jax"],
        metavar="COMMAND",
        help="what is given each point's `train --config=...`, such as a script of launch/ (default: a process here)",
    )
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--list", action="store_true", help="print each point's index, name and status, and end")
    only.add_argument("--point", type=count, metavar="INDEX", help="train that point alone, and write no table")
    only.add_argument("--table", action="store_true", help="train nothing: the table and plots of what is there")
    flags, rest = parser.parse_known_args(argv)
    for argument in rest:
        if not argument.startswith(PREFIX):
            parser.error(f"unknown argument {argument}; fields of the config are overridden with {PREFIX}NAME=VALUE")
    return flags, rest


def _names(text: str) -> tuple[str, ...]:
    return tuple(name for name in text.split(",") if name)


def _command(text: str) -> list[str]:
    """argparse type: a command as a shell reads it."""
    words = shlex.split(text)
    if not words or shutil.which(words[0]) is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no command that is there")
    return words
