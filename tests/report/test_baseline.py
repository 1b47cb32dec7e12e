"""Baselines: what a band is, which runs it fits, the file, and the lines that a report draws of it."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from support.small_runs import ROOT

from ibq_jax.__main__ import main
from ibq_jax.base.config import load_config, save_config
from ibq_jax.base.errors import UsageError
from ibq_jax.report import baseline as baselines
from ibq_jax.report.baseline import make_baseline, read_baseline, write_baseline
from ibq_jax.report.curves import COLOURS, Band, Panel, plot
from ibq_jax.report.history import History, Series
from ibq_jax.report.run import Run, read_run

SPEC = f"{ROOT}/configs/tokenizer.py:openmoji32"


def write_run(folder: Path, seed: int, rows: list[dict], *fields: str, spec: str = SPEC) -> Run:
    folder.mkdir(parents=True)
    save_config(load_config(spec, [f"--config.{field}" for field in (f"seed={seed}", *fields)]), folder / "config.json")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_run(folder)


def rows(offset: float, steps: range = range(10, 60, 10)) -> list[dict]:
    return [{"step": step, "loss/l1": step / 100 + offset, "loss/lpips": 0.0, "loss/else": 1.0} for step in steps]


@pytest.fixture
def three(tmp_path) -> list[Run]:
    return [write_run(tmp_path / f"r{seed}", seed, rows(offset)) for seed, offset in enumerate((0.0, 0.3, 0.9))]


def test_a_band_is_mean_least_and_greatest_at_the_common_steps(three, tmp_path):
    longer = write_run(tmp_path / "longer", 7, rows(0.0, range(20, 90, 10)))
    found = make_baseline([*three, longer])
    assert (found.runs, found.steps, found.off) == (4, 50, ("loss/lpips",))
    assert set(found.bands) == {"loss/l1"}  # one of the scalars that plots show
    band, steps = found.bands["loss/l1"], np.asarray([20, 30, 40, 50])
    np.testing.assert_array_equal(band.steps, steps)
    np.testing.assert_allclose(band.mean, steps / 100 + 0.3)
    np.testing.assert_allclose(band.low, steps / 100)
    np.testing.assert_allclose(band.high, steps / 100 + 0.9)


def test_long_curves_are_put_into_groups_that_keep_extremes(tmp_path):
    runs = [write_run(tmp_path / f"r{seed}", seed, rows(seed, range(1, 1001))) for seed in range(2)]
    band = make_baseline(runs).bands["loss/l1"]
    assert len(band.steps) == baselines.MAX_POINTS and band.steps[-1] == 1000
    assert band.low[0] == pytest.approx(0.01) and band.high[-1] == pytest.approx(11.0)
    assert band.mean[0] == pytest.approx(np.arange(1, 11).mean() / 100 + 0.5)


def test_the_file_keeps_four_digits(three, tmp_path):
    made = make_baseline(three)
    write_baseline(made, tmp_path / "b.json")
    found = read_baseline(tmp_path / "b.json")
    assert (found.runs, found.steps, found.off) == (made.runs, made.steps, made.off)
    for array, exact in zip(vars(found.bands["loss/l1"]).values(), vars(made.bands["loss/l1"]).values(), strict=True):
        np.testing.assert_allclose(array, exact, rtol=5e-4)


def test_it_fits_runs_that_compute_the_same(three, tmp_path):
    found = make_baseline(three)

    def fits(name: str, *fields: str, logged: list[dict] | None = None) -> bool:
        run = write_run(tmp_path / name, 5, rows(0.0) if logged is None else logged, *fields)
        return found.fits(run.config, run.history)

    assert fits("elsewhere", "data.dir=/data", "train.steps=9", "log.every=3", "mesh.codebook=2", "evaluate.every=7")
    assert not fits("larger", "codebook.size=2048")
    assert not fits("measured", "evaluate.examples=50")  # its validation curves are of other images
    assert not fits("lpips", logged=[{"step": 1, "loss/l1": 0.5, "loss/lpips": 0.2}])  # off in the baseline


def test_it_holds_no_path_of_the_machine(tmp_path):
    runs = [write_run(tmp_path / f"p{seed}", seed, rows(0.0), "data.dir=/home/me") for seed in range(2)]
    write_baseline(make_baseline(runs), tmp_path / "b.json")
    assert "/home/me" not in (tmp_path / "b.json").read_text()


def test_an_older_runs_config_fits(three, tmp_path):
    """A baseline that is shipped today stays valid when a field is added later."""
    write_baseline(make_baseline(three), tmp_path / "b.json")
    fields = json.loads((tmp_path / "b.json").read_text())
    del fields["config"]["quantizer.entropy_logits"]
    (tmp_path / "b.json").write_text(json.dumps(fields))
    assert read_baseline(tmp_path / "b.json").fits(three[0].config, three[0].history)


def test_runs_that_make_none(three, tmp_path):
    other = write_run(tmp_path / "other", 3, rows(0.0), "codebook.size=64")
    twin = write_run(tmp_path / "twin", 0, rows(0.0))
    empty = write_run(tmp_path / "empty", 4, [])
    for runs, words in (
        (three[:1], "needs the runs of two or more seeds"),
        ([three[0], other], r"differ in more than the seed \(codebook.size: 1024 -> 64\)"),
        ([three[0], twin], "two of the runs have the same seed"),
        ([three[0], empty], "no curves in common"),
    ):
        with pytest.raises(UsageError, match=words):
            make_baseline(runs)


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"config": {}, "runs": 1, "steps": 1, "off": [], "bands": {"a": 3}}']
)
def test_a_damaged_file_is_named(text, tmp_path):
    (tmp_path / "b.json").write_text(text)
    with pytest.raises(UsageError, match=r"b\.json: not a file that --write-baseline wrote"):
        read_baseline(tmp_path / "b.json")


def test_a_band_is_drawn_in_the_colour_of_its_scalar_and_the_axis_holds_it():
    panel = Panel("two", ("a", "b"))
    series = {name: Series(np.asarray([1, 2]), np.asarray([1.0, 2.0])) for name in "ab"}
    band = Band(*(np.asarray(values, float) for values in ([1, 2, 3], [1, 2, 3], [0, 1, 2], [40, 40, 40])))
    alone, behind = (plot(panel, {"run": History(series, {})}, behind=bands) for bands in (None, {"b": band}))
    count = {colour: behind.count(colour) - alone.count(colour) for colour in COLOURS[:2]}
    assert count[COLOURS[0]] == 0 and count[COLOURS[1]] >= 2  # an area and its mean
    assert ">40<" in re.sub(r"\s", "", behind) and ">40<" not in re.sub(r"\s", "", alone)
    assert plot(panel, {"run": History({}, {})}, behind={"b": band}) == ""  # a baseline alone is no plot


def test_the_report_draws_a_shipped_or_given_one(three, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(baselines, "FOLDER", tmp_path / "shipped")
    (tmp_path / "shipped").mkdir()
    run, out = tmp_path / "run", tmp_path / "page.html"
    write_run(run, 9, rows(0.1))

    def page(*flags: str) -> str:
        assert main(["report", f"--run={run}", f"--out={out}", "--overwrite", *flags]) == 0
        return out.read_text()

    without = page()
    shipped = tmp_path / "shipped" / "tokenizer.json"
    folders = ",".join(str(run.folder) for run in three)
    assert main(["report", f"--run={folders}", f"--write-baseline={shipped}"]) == 0
    assert "1 curves of 3 runs" in capsys.readouterr().out
    words = "Behind the curves: 3 runs of 50 steps with the same settings."
    assert words not in without and words in page()
    shipped.rename(tmp_path / "own.json")
    assert words in page(f"--baseline={tmp_path / 'own.json'}") and words not in page()
    for flags, error in (
        (
            [f"--run={run},{folders}", f"--baseline={tmp_path / 'own.json'}"],
            "behind the curves of one run; 4 are given",
        ),
        ([f"--run={run}", f"--baseline={tmp_path / 'none.json'}"], "none.json: the file does not exist"),
    ):
        assert main(["report", f"--out={out}", "--overwrite", *flags]) == 2
        assert error in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted(baselines.FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_a_shipped_file_is_of_a_preset_as_it_is(path):
    found, (stage, _, preset) = read_baseline(path), path.stem.partition("_")
    assert path.stat().st_size < 100_000 and found.runs >= 3
    if stage == "tokenizer":
        config = load_config(f"{ROOT}/configs/tokenizer.py:{preset}")
        assert found.fits(config, History({}, {}))
