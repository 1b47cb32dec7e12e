"""`report`: one HTML page of a run, or of several side by side."""

from pathlib import Path

from ibq_jax.base.errors import UsageError
from ibq_jax.commands.arguments import Parser, output_file
from ibq_jax.report.baseline import make_baseline, write_baseline
from ibq_jax.report.report import write_report
from ibq_jax.report.run import read_run


def main(argv: list[str]) -> None:
    """Runs the command; `argv` is what follows the word "report".

    Raises:
        UsageError: wrong flags, a folder that is not a run, runs of both stages, or a page that exists already.
    """
    flags = parser().parse_args(argv)
    folders = [Path(folder) for folder in flags.run.split(",") if folder]
    if not folders:
        raise UsageError(f"--run={flags.run} names no run")
    if flags.write_baseline is not None:
        baseline = make_baseline([read_run(folder) for folder in folders])
        write_baseline(baseline, flags.write_baseline)
        print(f"wrote {flags.write_baseline}: {len(baseline.bands)} curves of {baseline.runs} runs")
        print(f"next: python -m ibq_jax report --run=RUN --baseline={flags.write_baseline}")
        return
    report = write_report(folders, flags.out, flags.overwrite, flags.baseline)
    for sentence in report.missing:
        print(sentence)
    print(f"wrote {report.path}: open it in a browser")


def parser() -> Parser:
    """Returns the command's argument parser."""
    parser = Parser(
        "report",
        "Writes one self-contained HTML page of a run, or of several runs of one stage side by side: curves, images, "
        "evaluations, and what to try.",
        examples=(
            "--run=runs/tokenizer",
            "--run=runs/small,runs/large --out=comparison.html --overwrite",
            "--run=runs/a,runs/b,runs/c --write-baseline=usual.json",
        ),
    )
    parser.add_argument(
        "--run",
        "--workdir",
        required=True,
        metavar="RUN[,RUN...]",
        help="The folder of a run or of one of its checkpoints, or several runs of one stage to compare.",
    )
    parser.add_argument(
        "--out",
        type=output_file,
        metavar="FILE",
        help="The HTML file to write. Default: report.html in the folder of the (first) run.",
    )
    parser.add_argument("--overwrite", action="store_true", help="Replace the page if it exists already.")
    baselines = parser.add_mutually_exclusive_group()
    baselines.add_argument(
        "--baseline",
        type=Path,
        metavar="FILE",
        help="Curves to draw behind those of the run, from --write-baseline. Default: the package's own, if it has "
        "those of runs with the same settings.",
    )
    baselines.add_argument(
        "--write-baseline",
        type=output_file,
        metavar="FILE",
        help="Write no page but this file: mean and range of the curves of the runs, which differ in their seed alone. "
        "Default: none.",
    )
    return parser
