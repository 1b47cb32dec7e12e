"""`report`: one HTML page of a run, or of several side by side."""

from pathlib import Path

from ibq_jax.base.errors import UsageError
from ibq_jax.commands.arguments import Parser, output_file
from ibq_jax.report.report import write_report


def main(argv: list[str]) -> None:
    """Runs the command; `argv` is what follows the word "report".

    Raises:
        UsageError: wrong flags, a folder that is not a run, runs of both stages, or a page that exists already.
    """
    flags = parser().parse_args(argv)
    folders = [Path(folder) for folder in flags.run.split(",") if folder]
    if not folders:
        raise UsageError(f"--run={flags.run} names no run")
    report = write_report(folders, flags.out, flags.overwrite)
    for sentence in report.missing:
        print(sentence)
    print(f"wrote {report.path}: open it in a browser")


def parser() -> Parser:
    """Returns the command's argument parser."""
    parser = Parser(
        "report",
        "Writes one self-contained HTML page of a run, or of several runs of one stage side by side: curves, images, "
        "evaluations, and what to try.",
        examples=("--run=runs/tokenizer", "--run=runs/small,runs/large --out=comparison.html --overwrite"),
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
    return parser
