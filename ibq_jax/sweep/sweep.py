"""A sweep: a grid of configs that is trained point by point in a folder, and tabulated."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ibq_jax.base.errors import Failed, UsageError
from ibq_jax.sweep.grid import Grid, Point
from ibq_jax.sweep.plots import draw
from ibq_jax.sweep.points import PointTrainer
from ibq_jax.sweep.results import DONE, Result, read_result
from ibq_jax.sweep.table import Table, chosen_metrics, write_table


@dataclass(frozen=True)
class Sweep:
    """A `grid` of configs, each of which is trained in its own folder under `workdir`."""

    grid: Grid
    workdir: Path

    @cached_property
    def points(self) -> list[Point]:
        """The points. Raises UsageError if the config refuses a field or a value."""
        return self.grid.points()

    def results(self) -> list[Result]:
        """Reads the results of all points from their folders."""
        return [read_result(self.workdir, point) for point in self.points]

    def train(self, launcher: Sequence[str]) -> None:
        """Trains the points that have not ended, one after the other.

        Args:
            launcher: the command to run with the arguments that follow `python -m ibq_jax`.

        Raises:
            Interrupted: a signal came; the running point has saved its state.
        """
        PointTrainer(self.workdir, self.grid.spec, launcher).train(self.points)

    def train_point(self, index: int, launcher: Sequence[str]) -> None:
        """Trains one point, unless it has ended.

        Raises:
            UsageError: there is no such point.
            Failed: the point is not done.
            Interrupted: a signal came; the point has saved its state.
        """
        if index >= len(self.points):
            raise UsageError(f"--point={index}: the points are 0 to {len(self.points) - 1}; --list prints them")
        point = self.points[index]
        PointTrainer(self.workdir, self.grid.spec, launcher).train([point])
        result = read_result(self.workdir, point)
        if result.status != DONE:
            raise Failed(f"{point.name} is {result.status}{': ' if result.reason else ''}{result.reason}")

    def write_table(self, metrics: Sequence[str]) -> tuple[str, int]:
        """Writes the plots, table.md, table.csv and results.json of the results so far.

        Args:
            metrics: names of logged scalars; if empty, usual ones are chosen.

        Returns:
            the table as Markdown, and the number of plots.
        """
        results = self.results()
        table = Table(results, chosen_metrics(metrics, results))
        plots = draw(self.workdir, table)
        return write_table(self.workdir, table, plots), len(plots)

    def check_done(self) -> None:
        """Raises Failed if a point is not done."""
        unfinished = [f"{result.point.name} is {result.status}" for result in self.results() if result.status != DONE]
        if unfinished:
            raise Failed(
                f"{len(unfinished)} of {len(self.points)} points are not done ({'; '.join(unfinished)}); "
                f"see {self.workdir / 'table.md'}"
            )
