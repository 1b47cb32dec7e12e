"""Reports: one self-contained page of whatever a run has, with everything that comes from a run escaped."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from support.small_runs import arguments, generator_arguments, save_run

from ibq_jax.__main__ import main
from ibq_jax.evaluate.feature_nets import FD
from ibq_jax.report.history import read_history

pytestmark = pytest.mark.slow

WIDTHS = [390, 1200]
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, data_dir) -> dict[str, Path]:
    """Runs of a few steps: two tokenizers with different learning rates, one of them not finished, and a generator."""
    folder = tmp_path_factory.mktemp("runs")
    fields = ("train.steps=6", "evaluate.every=3", "log.images_every=6", "checkpoint.every=3", "checkpoint.keep_last=1")
    judged = (
        "evaluate.feature_nets=efficientnet",
        f"checkpoint.best_metric=-validation/{FD}",
        "checkpoint.keep_best=1",
    )
    assert main(arguments(folder / "tok", data_dir, *fields, *judged, "optimizer.warmup_steps=3")) == 0
    assert main(["evaluate", f"--run={folder / 'tok'}", "--examples=20"]) == 0
    shutil.copytree(folder / "tok", folder / "faster")
    config = json.loads((folder / "faster" / "config.json").read_text())
    config["optimizer"]["learning_rate"], config["train"]["steps"] = 0.01, 12
    (folder / "faster" / "config.json").write_text(json.dumps(config))
    codes = ["tokenize", f"--tokenizer={folder / 'tok'}", f"--out={folder / 'codes'}"]
    assert main([*codes, "--splits=train[:96],validation[:40]"]) == 0
    assert main(generator_arguments(folder / "ar", folder / "codes", "train.steps=6", "evaluate.every=3")) == 0
    assert main(["evaluate", f"--run={folder / 'ar'}"]) == 0
    return {name: folder / name for name in ("tok", "faster", "ar")}


def test_the_step_with_the_best_distance_is_kept(runs):
    distances = read_history(runs["tok"] / "metrics.jsonl")[f"validation/{FD}"]
    assert distances.steps.tolist() == [3, 6] and (distances.values > 0).all()
    best = int(distances.steps[distances.values.argmin()])
    assert {int(path.name) for path in (runs["tok"] / "checkpoints").iterdir()} == {best, 6}


def bare_copy(run: Path, folder: Path) -> Path:
    """Copies a run without its weights."""
    return shutil.copytree(run, folder, ignore=shutil.ignore_patterns("checkpoints", "events"))


def report(folder: Path, *runs: Path) -> str:
    out = folder / "page.html"
    assert main(["report", f"--run={','.join(map(str, runs))}", f"--out={out}", "--overwrite"]) == 0
    return out.read_text()


@pytest.fixture(scope="module")
def pages(runs, tmp_path_factory) -> dict[str, str]:
    pages = {name: report(tmp_path_factory.mktemp("pages"), runs[name]) for name in ("tok", "ar")}
    return pages | {"two": report(tmp_path_factory.mktemp("pages"), runs["tok"], runs["faster"])}


def headings(page: str) -> list[str]:
    return re.findall(r"<h2>(.*?)</h2>", page)


def test_a_tokenizers_page_has_every_section(pages):
    page = pages["tok"]
    assert headings(page) == [
        "Doctor",
        "Evaluations and their protocols",
        "Reconstructions",
        "Curves",
        "Codebook",
        "Config",
    ]
    assert "tokenizer of 64 codes of 8 dimensions, openmoji at 16 px" in page
    assert "PSNR on validation images" in page and "Learning rate" in page and "Count of each code, by rank" in page
    assert page.count('alt="code ') == 32 and page.count('alt="image ') == 8
    assert "Protocol <b>clean</b>" in page and "&#34;learning_rate&#34;" in page


def test_a_number_that_is_not_comparable_is_marked(pages):
    for page in (pages["tok"], pages["two"]):
        assert '<span class="mark warn">Not comparable: 20 images, the protocol has 189.</span>' in page


def test_a_generators_page_shows_samples_by_class(pages):
    page = pages["ar"]
    assert headings(page) == ["Doctor", "Evaluations and their protocols", "Samples by class", "Curves", "Config"]
    assert "unigram entropy" in page and "log K" in page and "Perplexity by position" in page


def test_a_page_loads_nothing_from_elsewhere(pages):
    for page in pages.values():
        addresses = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"')>\s]+)""", page)
        assert addresses and all(address.startswith(("data:image/png", "#")) for address in addresses)
        assert "<script" not in page and "@import" not in page


def test_ids_on_a_page_are_unique(pages):
    for page in pages.values():
        names = re.findall(r' id="([^"]+)"', page)
        assert names and len(names) == len(set(names))


def test_several_runs_are_compared_on_one_page(pages):
    page = pages["two"]
    assert headings(page) == [
        "Doctor",
        "Differences between the configs",
        "Last values logged in training",
        "Evaluations and their protocols",
        "Curves",
        "Config of tok",
        "Config of faster",
    ]
    assert re.search(r"<td>optimizer.learning_rate</td>\s*<td[^>]*>0.001</td>\s*<td[^>]*>0.01</td>", page)
    assert '<b>The run is not finished</b> <span class="soft">(faster)</span>' in page and "Step 6 of 12" in page
    assert re.search(r"<td>PSNR</td>(<td[^>]*>[\d.]+ dB</td>){2}", page)
    assert "tok validation/psnr" in page and "faster validation/psnr" in page


def test_a_run_without_checkpoint_or_data_still_has_a_page(runs, data_dir, tmp_path, capsys):
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(runs["tok"] / "config.json", bare)
    page = report(tmp_path, bare)
    assert "has no checkpoint yet" in page and "there are no curves" in page
    assert "bare: metrics.jsonl is missing or empty" in report(tmp_path, bare, runs["tok"])
    save_run(tmp_path / "elsewhere", tmp_path / "no_data")
    page = report(tmp_path, tmp_path / "elsewhere")
    assert "no reconstructions and no code frequencies" in page and "no curves" in capsys.readouterr().out


def test_a_killed_run_and_one_that_stopped_by_itself_are_reported(runs, tmp_path):
    run = bare_copy(runs["tok"], tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "loss/to')
    (run / "stopped_step5_process0.json").write_text('{"step": 5, "reason": "an old one"}')
    page = report(tmp_path, run)
    assert "Left out: 1 of them" in page and "an old one" not in page
    (run / "stopped_step7_process0.json").write_text('{"step": 7, "reason": "the codebook has collapsed"}')
    assert "The codebook has collapsed." in report(tmp_path, run)


def test_the_unigram_entropy_is_shown_even_without_evaluations(runs, tmp_path):
    run = bare_copy(runs["ar"], tmp_path / "run")
    shutil.rmtree(run / "evaluations")
    assert "unigram entropy" in report(tmp_path, run)
    (run / "token_cache.json").unlink()
    assert "unigram entropy" not in report(tmp_path, run)


def test_everything_that_comes_from_a_run_is_escaped(runs, tmp_path):
    run = bare_copy(runs["tok"], tmp_path / "run<b>")
    found = next((run / "evaluations").iterdir())
    record = json.loads(found.read_text())
    record["split"] = "<script>alert(1)</script>"
    record["metrics"]["<i>"] = 1.0
    found.write_text(json.dumps(record))
    for page in (report(tmp_path, run), report(tmp_path, run, runs["tok"])):
        assert "<script" not in page and "<i>" not in page and "run<b>" not in page
        assert "&lt;script&gt;" in page


OLD_ROWS = """
{"step": 1, "gradient_norm": 2.0, "adversary/hinge": 1.0, "adversary/gradient_norm": 1.5, "validation/psnr": 9.0}
{"step": 2, "gradient_norm": 2.0, "adversary/hinge": 1.0, "adversary/gradient_norm": 1.5, "validation/psnr": 9.0}
"""


def test_a_run_that_an_earlier_version_began_is_drawn_as_one(runs, tmp_path):
    run = bare_copy(runs["tok"], tmp_path / "run")
    rows = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text(OLD_ROWS.lstrip() + "".join(rows[2:]))
    page = report(tmp_path, run)
    assert "discriminator/gradient_norm" in page and "adversary" not in page
    assert page.count(">Gradient norm</text>") == 1 and "lines of metrics.jsonl cannot be read" not in page


def refused(arguments, capsys) -> str:
    assert main(["report", *arguments]) == 2
    said = capsys.readouterr().err.strip()
    assert "\n" not in said
    return said


def test_workdir_is_an_alias_of_run(runs, tmp_path):
    run = bare_copy(runs["ar"], tmp_path / "run")
    assert main(["report", f"--workdir={run}"]) == 0 and (run / "report.html").is_file()


def test_wrong_use_is_one_line(runs, tmp_path, capsys):
    assert "config.json does not exist" in refused([f"--run={tmp_path / 'none'}"], capsys)
    assert "no numbers in common" in refused([f"--run={runs['tok']},{runs['ar']}"], capsys)
    assert "names no run" in refused(["--run=,"], capsys)
    assert "named twice" in refused([f"--run={runs['tok']},{runs['tok']}/"], capsys)
    (tmp_path / "config.json").write_text("{}")
    assert "stage is None, not one of tokenizer" in refused([f"--run={tmp_path}"], capsys)
    (tmp_path / "page.html").write_text("mine")
    assert "give --overwrite" in refused([f"--run={runs['tok']}", f"--out={tmp_path / 'page.html'}"], capsys)
    assert (tmp_path / "page.html").read_text() == "mine"
    broken = bare_copy(runs["tok"], tmp_path / "broken")
    (broken / "evaluations" / "9.json").write_text("{}")
    assert "9.json: not an evaluation" in refused([f"--run={broken}"], capsys)


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_browser_shows_every_page_without_sideways_scrolling_or_errors(pages, tmp_path):
    """Uses frames, since a window cannot be as narrow as a phone. Blocked resources would be logged as errors."""
    frames = [
        f'<iframe srcdoc="{html.escape(page)}" width={width} height=900></iframe>'
        for page in pages.values()
        for width in WIDTHS
    ]
    measure = """<script>onload = () => { document.title = [...document.querySelectorAll("iframe")].map(frame =>
        frame.contentDocument.documentElement.scrollWidth + "/" + frame.contentWindow.innerWidth).join() }</script>"""
    (tmp_path / "frames.html").write_text(f"<meta charset=utf-8>{measure}{''.join(frames)}")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
    command.append(f"file://{tmp_path}/frames.html")
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120)
    widths = [tuple(map(int, pair)) for pair in re.findall(r"(\d+)/(\d+)", shown.stdout.partition("</title>")[0])]
    assert [offered for _, offered in widths] == WIDTHS * len(pages)
    assert all(used <= offered for used, offered in widths)
    assert "CONSOLE" not in shown.stderr
