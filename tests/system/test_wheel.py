"""The wheel in an environment of its own, away from the checkout: its files, its script, its presets and its API."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from support.small_runs import ROOT, arguments

import ibq_jax

SOURCES = ("pyproject.toml", "README.md", "LICENSE", "ibq_jax", "configs")
GENERATED = shutil.ignore_patterns("__pycache__")
API = """
import sys
import numpy as np
import ibq_jax
from ibq_jax import Generator, Tokenizer, load_config, train
images = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
codes = [Tokenizer.load(path).encode(images) for path in sys.argv[1:]]
assert codes[0].shape == (2, 8, 8) and codes[0].max() < 64, codes[0]
np.testing.assert_array_equal(*codes)
print(ibq_jax.__version__, ibq_jax.__file__)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built without the network from a copy of the sources, so that no build folder is left in them."""
    copy, out = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=GENERATED)
        else:
            shutil.copy(ROOT / name, copy)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, f"--wheel-dir={out}", copy], check=True)
    (built,) = out.iterdir()
    return built


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory) -> Path:
    """An environment that has the wheel, and the dependencies from the running one, through a .pth file.

    A .pth file adds a folder without reading the .pth files in it, so an editable install there has no effect.
    """
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    pip = [sys.executable, "-m", "pip", f"--python={folder / 'bin' / 'python'}", "install", "--quiet", "--no-index"]
    subprocess.run([*pip, "--no-deps", wheel], check=True)
    site = next(folder.glob("lib/python*/site-packages"))
    (site / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n{sysconfig.get_path('platlib')}\n")
    return folder


@pytest.fixture
def run(environment, tmp_path, monkeypatch):
    """Runs a program of the environment in an empty folder and returns what it printed."""
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.chdir(tmp_path)

    def _run(program: str, *argv: str | Path) -> str:
        return subprocess.check_output([environment / "bin" / program, *argv], text=True)

    return _run


def test_the_wheel_holds_every_file_of_the_package_and_the_presets(wheel):
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
        licenses = {Path(name).name for name in archive.namelist() if "/licenses/" in name}
    files = [path for name in ("ibq_jax", "configs") for path in (ROOT / name).rglob("*") if path.is_file()]
    names = {path.relative_to(ROOT).as_posix() for path in files if "__pycache__" not in path.parts}
    assert packed == {name if name.startswith("ibq_jax/") else f"ibq_jax/{name}" for name in names}
    assert licenses == {"LICENSE", "lpips_heads.LICENSE"}
    assert wheel.name.startswith(f"ibq_jax-{ibq_jax.__version__}-")


@pytest.mark.slow
def test_from_an_installed_wheel_a_tokenizer_is_trained_and_loaded(run, environment, tmp_path):
    run("ibq-jax", "prepare", "openmoji", "--size=16", "--data_dir=data")
    argv = arguments(Path("run"), Path("data"), "train.steps=2", "checkpoint.every=2", "evaluate.every=2")
    run("ibq-jax", *(word.replace(f"{ROOT}/", "") for word in argv))
    run("ibq-jax", "convert", "--in=run", "--out=tokenizer.safetensors")
    version, file = run("python", "-c", API, "run", "tokenizer.safetensors").split()
    assert version == ibq_jax.__version__
    assert Path(file).is_relative_to(environment) and not environment.is_relative_to(ROOT)


def test_the_script_is_the_same_as_the_module(run, environment):
    assert run("ibq-jax", "--help") == run("python", "-m", "ibq_jax", "--help")
    wrong = subprocess.run([environment / "bin" / "ibq-jax", "trian"], capture_output=True, text=True, env=os.environ)
    assert wrong.returncode == 2 and "trian" in wrong.stderr
