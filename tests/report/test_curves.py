"""Plots: any run name, any amount of data, and the same SVG for the same numbers."""

import re
import xml.dom.minidom

import numpy as np
import pytest

from ibq_jax.report.curves import COLOURS, PANELS, Panel, colour_errors, plot, plot_grid, plot_ranks
from ibq_jax.report.history import History, Series

LOG = Panel("norms", ("norm",), log=True)


def history(*values: float, name: str = "norm") -> History:
    return History({name: Series(np.arange(1, len(values) + 1) * 100, np.asarray(values, float))}, {})


def words(svg: str) -> list[str]:
    texts = xml.dom.minidom.parseString(svg).getElementsByTagName("text")
    return [text.firstChild.data for text in texts]


def test_a_panel_without_its_scalars_is_empty():
    assert plot(LOG, {"run": history(1, 2, name="other")}) == ""
    assert plot(LOG, {"run": history(0, 0)}) == ""


@pytest.mark.parametrize("name", ["_hidden", "a$\\foo$b", "<b>&"])
def test_a_run_may_have_any_name(name):
    assert {f"{name} norm", "other norm"} <= set(words(plot(LOG, {name: history(1, 2), "other": history(2, 1)})))


@pytest.mark.parametrize("values", [(3,), (3, 3), (300, 301), (1e-6, 1e6), (2, 0), (-1, 5)])
def test_numbers_at_an_axis_are_plain(values):
    said = words(plot(LOG, {"run": history(*values)}))
    assert len(said) > 4 and not any("$" in word or "×" in word for word in said)


def test_each_run_has_a_colour_or_each_scalar_of_a_single_run():
    panel = Panel("two", ("a", "b"))
    one = History(history(1, 2, name="a").series | history(2, 1, name="b").series, {})
    assert {COLOURS[0], COLOURS[1]} <= set(re.findall("#[0-9a-f]{6}", plot(panel, {"run": one})))
    several = set(re.findall("#[0-9a-f]{6}", plot(panel, {"run": one, "other": one, "third": one})))
    assert several & set(COLOURS) == set(COLOURS[:3])


def test_a_long_run_gives_a_small_plot_that_keeps_its_extremes():
    values = np.random.default_rng(0).uniform(1, 2, 30_000)
    calm = plot(LOG, {"run": history(*values)})
    values[12_345] = 100
    spiky = plot(LOG, {"run": history(*values)})
    assert len(calm) < 50_000 and "100" in words(spiky) and "100" not in words(calm)


def test_ranks_of_a_large_codebook_give_a_small_plot():
    counts = np.arange(2.0**18)
    assert len(plot_ranks(counts)) < 50_000 and "100,000" in words(plot_ranks(counts))
    assert words(plot_ranks(np.asarray([5.0, 0, 1])))


def test_the_same_numbers_give_the_same_plot_and_ids_are_unique():
    svg = plot(LOG, {"run": history(1, 2)})
    assert svg == plot(LOG, {"run": history(1, 2)})
    every = [svg, plot(PANELS["tokenizer"][0], {"run": history(1, 2, name="validation/psnr")})]
    every += [plot_ranks(np.asarray([3.0, 1])), plot_grid(np.eye(4), "a grid")]
    names = [name for svg in every for name in re.findall(r' id="([^"]+)"', svg)]
    assert len(names) == len(set(names))


def test_no_error_is_black_and_a_large_one_is_bright():
    dark, bright = colour_errors(np.asarray([0.0, 1.0])).astype(int).sum(axis=-1)
    assert dark < 20 and bright > 500
