"""The report: one self-contained HTML page of a run, or of several runs of one stage side by side."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ibq_jax.base.errors import UsageError
from ibq_jax.base.files import write_text
from ibq_jax.report.baseline import Baseline, read_baseline, shipped_baseline
from ibq_jax.report.comparison import comparison_page
from ibq_jax.report.run import Run, read_run
from ibq_jax.report.single_run import single_run_page


@dataclass(frozen=True)
class Report:
    """A page that was written to `path`, and sentences on what it could not show (`missing`)."""

    path: Path
    missing: list[str]


def write_report(
    folders: Sequence[Path], out: Path | None = None, overwrite: bool = False, baseline: Path | None = None
) -> Report:
    """Writes the page of the runs in `folders`.

    Args:
        folders: a run's folder, or several; one of their checkpoints' folders selects that step.
        out: the HTML file; by default report.html in the first run.
        overwrite: replace the file if it exists.
        baseline: a baseline's file, whose curves are drawn behind those of one run; by default the one in the package
            that fits the run, if there is one.

    Raises:
        UsageError: a folder is not a run, the runs cannot be compared, the file exists, or the baseline is damaged, of
            the other stage or given with several runs.
    """
    runs = [read_run(folder) for folder in folders]
    names = ", ".join(map(str, folders))
    if len({run.stage for run in runs}) > 1:
        raise UsageError(f"{names}: runs of different stages have no numbers in common; report on them separately")
    if len({run.saved.workdir for run in runs}) < len(runs):
        raise UsageError(f"{names}: a run is named twice; name every run once")
    out = out or runs[0].saved.workdir / "report.html"
    if out.exists() and not overwrite:
        raise UsageError(f"--out={out} exists already; give --overwrite to replace it")
    if baseline is not None and len(runs) > 1:
        raise UsageError(f"--baseline={baseline} is drawn behind the curves of one run; {len(runs)} are given")
    html, missing = single_run_page(runs[0], _baseline(runs[0], baseline)) if len(runs) == 1 else comparison_page(runs)
    write_text(out, html.encode("utf-8", "replace").decode())  # a path may hold bytes that are not text
    return Report(out, missing)


def _baseline(run: Run, path: Path | None) -> Baseline | None:
    if path is None:
        return shipped_baseline(run)
    found = read_baseline(path)
    if found.stage != run.stage:
        raise UsageError(f"--baseline={path} is of the stage {found.stage}; {run.folder} is of {run.stage}")
    return found
