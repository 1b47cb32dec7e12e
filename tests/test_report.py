"""Reports: one page with everything in it, of whatever a run has, and nothing but text where text is meant."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from small_runs import arguments, generator_arguments, save_run

from ibq_jax.__main__ import main
from ibq_jax.evaluate.history import read_history
from ibq_jax.evaluate.judges import FD

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    assert main(["prepare", "openmoji", "--size=16", f"--data_dir={folder}"]) == 0
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory, data_dir) -> dict[str, Path]:
    """A tokenizer's run and one of another learning rate, a few steps long, and a generator's."""
    folder = tmp_path_factory.mktemp("runs")
    fields = ("train.steps=6", "evaluate.every=3", "log.images_every=6", "checkpoint.every=3", "checkpoint.keep_last=1")
    judged = ("evaluate.judges=efficientnet", f"checkpoint.best_metric=-validation/{FD}", "checkpoint.keep_best=1")
    assert main(arguments(folder / "tok", data_dir, *fields, *judged)) == 0
    assert main(["evaluate", f"--run={folder / 'tok'}", "--examples=20"]) == 0
    shutil.copytree(folder / "tok", folder / "faster")
    config = json.loads((folder / "faster" / "config.json").read_text())
    config["optimizer"]["learning_rate"] = 0.01
    (folder / "faster" / "config.json").write_text(json.dumps(config))
    codes = ["tokenize", f"--tokenizer={folder / 'tok'}", f"--out={folder / 'codes'}"]
    assert main([*codes, "--splits=train[:96],validation[:40]"]) == 0
    assert main(generator_arguments(folder / "ar", folder / "codes", "train.steps=6", "evaluate.every=3")) == 0
    assert main(["evaluate", f"--run={folder / 'ar'}"]) == 0
    return {name: folder / name for name in ("tok", "faster", "ar")}


def test_a_run_is_judged_while_it_trains_and_keeps_its_best_step(runs):
    distances = read_history(runs["tok"] / "metrics.jsonl")[f"validation/{FD}"]
    assert distances.steps.tolist() == [3, 6] and (distances.values > 0).all()
    best = int(distances.steps[distances.values.argmin()])
    assert {int(path.name) for path in (runs["tok"] / "checkpoints").iterdir()} == {best, 6}


def report(folder: Path, *runs: Path) -> str:
    out = folder / "page.html"
    assert main(["report", f"--workdir={','.join(map(str, runs))}", f"--out={out}", "--overwrite"]) == 0
    return out.read_text()


@pytest.fixture(scope="module")
def pages(runs, tmp_path_factory) -> dict[str, str]:
    return {name: report(tmp_path_factory.mktemp("pages"), runs[name]) for name in ("tok", "ar")}


def headings(html: str) -> list[str]:
    return re.findall(r"<h2>(.*?)</h2>", html)


def test_a_tokenizers_page_shows_all_there_is(runs, tmp_path):
    html = report(tmp_path, runs["tok"])
    assert headings(html) == [
        "Doctor",
        "Numbers and their protocols",
        "Reconstructions",
        "Curves",
        "Codebook",
        "Config",
    ]
    assert "PSNR on validation images" in html and "Share of all tokens, by rank" in html
    assert html.count('alt="code ') == 32
    assert "Not comparable: 20 images, the protocol has 189" in html and "Protocol <b>clean</b>" in html
    assert "&#34;learning_rate&#34;" in html


def test_a_generators_page_shows_samples_by_class(pages):
    html = pages["ar"]
    assert headings(html) == ["Doctor", "Numbers and their protocols", "Samples by class", "Curves", "Config"]
    assert "codes alone" in html and "log K" in html and "perplexity by position" in html


def test_a_page_needs_nothing_from_elsewhere(pages):
    for html in pages.values():
        addresses = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"')>\s]+)""", html)
        assert addresses and all(address.startswith(("data:image/png", "#")) for address in addresses)
        assert "<script" not in html and "@import" not in html


def test_several_runs_stand_side_by_side(runs, tmp_path):
    html = report(tmp_path, runs["tok"], runs["faster"])
    assert "optimizer.learning_rate" in html and "0.01" in html and "Where the runs differ" in headings(html)
    assert "tok validation/psnr" in html and "faster validation/psnr" in html


def test_a_run_without_checkpoint_or_data_still_has_a_page(runs, data_dir, tmp_path, capsys):
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(runs["tok"] / "config.json", bare)
    html = report(tmp_path, bare)
    assert "has no checkpoint yet" in html and "there are no curves" in html
    save_run(tmp_path / "elsewhere", tmp_path / "no_data")
    html = report(tmp_path, tmp_path / "elsewhere")
    assert "no reconstructions and no use of codes" in html and "no curves" in capsys.readouterr().out


def test_what_comes_from_a_run_is_text(runs, tmp_path):
    run = tmp_path / "run<b>"
    shutil.copytree(runs["tok"], run, ignore=shutil.ignore_patterns("checkpoints"))
    found = next((run / "evaluations").iterdir())
    record = json.loads(found.read_text())
    record["split"] = "<script>alert(1)</script>"
    record["metrics"]["<i>"] = 1.0
    found.write_text(json.dumps(record))
    html = report(tmp_path, run)
    assert "<script" not in html and "<i>" not in html and "run<b>" not in html
    assert "&lt;script&gt;" in html


def refused(arguments, capsys) -> str:
    assert main(["report", *arguments]) == 2
    said = capsys.readouterr().err.strip()
    assert "\n" not in said
    return said


def test_what_cannot_be_reported_is_one_line(runs, tmp_path, capsys):
    assert "config.json does not exist" in refused([f"--workdir={tmp_path / 'none'}"], capsys)
    assert "no numbers in common" in refused([f"--workdir={runs['tok']},{runs['ar']}"], capsys)
    assert "names no run" in refused(["--workdir=,"], capsys)
    (tmp_path / "page.html").write_text("mine")
    assert "give --overwrite" in refused([f"--workdir={runs['tok']}", f"--out={tmp_path / 'page.html'}"], capsys)
    assert (tmp_path / "page.html").read_text() == "mine"
    broken = tmp_path / "broken"
    shutil.copytree(runs["tok"], broken)
    (broken / "evaluations" / "9.json").write_text("{}")
    assert "9.json: not an evaluation" in refused([f"--workdir={broken}"], capsys)


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [390, 1200])
def test_no_width_makes_a_browser_scroll_sideways(pages, tmp_path, width):
    measure = "<script>document.title = document.documentElement.scrollWidth + '/' + innerWidth</script></html>"
    (tmp_path / "measured.html").write_text(pages["tok"].replace("</html>", measure))
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},900", "--dump-dom"]
    dumped = subprocess.run([*command, f"file://{tmp_path}/measured.html"], capture_output=True, text=True, timeout=120)
    used, offered = re.search(r"<title>(\d+)/(\d+)</title>", dumped.stdout).groups()
    assert int(used) <= int(offered)
