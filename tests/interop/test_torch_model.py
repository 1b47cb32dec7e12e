"""A PyTorch user's way, as README tells it: one file of weights, one file of code, and no JAX anywhere."""

import importlib.metadata
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.small_runs import ROOT, save_run

from ibq_jax import Tokenizer
from ibq_jax.__main__ import main
from ibq_jax.data.openmoji import openmoji
from ibq_jax.data.preprocess import decode_image
from ibq_jax.interop import torch_model

torch = pytest.importorskip("torch")
INSTALLED = ("torch", "numpy", "safetensors", "pillow")


def with_requirements(packages: tuple[str, ...]) -> set[str]:
    """Distributions, with all that they need and that is installed."""
    found, waiting = set(), list(packages)
    while waiting:
        name = waiting.pop().lower()
        try:
            needed = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # of another platform
        if name not in found:
            found.add(name)
            waiting += [re.split(r"[^\w.-]", requirement)[0] for requirement in needed if "extra ==" not in requirement]
    return found


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Path:
    """Returns the Python of an environment with PyTorch and without JAX, linked to the packages installed here."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, with_pip=False, symlinks=True)
    site = next(folder.glob("lib/python*/site-packages"))
    for name in with_requirements(INSTALLED):
        distribution = importlib.metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files if file.parts[0] not in ("..", "__pycache__")}:
            link = site / top
            if not link.exists():
                link.symlink_to(distribution.locate_file(top))
    return folder / "bin" / "python"


def test_codes_are_computed_without_tf32(tmp_path):
    run = save_run(tmp_path / "run", tmp_path, "dtype=float32")
    assert main(["convert", f"--in={run}", f"--out={tmp_path / 'tokenizer.safetensors'}"]) == 0
    tokenizer, seen = torch_model.load(tmp_path / "tokenizer.safetensors"), []
    backends = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    tokenizer.quant_conv.register_forward_hook(lambda *_: seen.append([owner.fp32_precision for owner in backends]))
    before = [owner.fp32_precision for owner in backends]
    try:
        for owner in backends:
            owner.fp32_precision = "tf32"
        tokenizer.encode(torch.zeros(1, 3, 16, 16))
        assert seen == [["ieee", "ieee"]]
        assert [owner.fp32_precision for owner in backends] == ["tf32", "tf32"]
    finally:
        for owner, precision in zip(backends, before, strict=True):
            owner.fp32_precision = precision


def test_from_our_file_to_a_reconstructed_picture_without_jax(python, tmp_path):
    run = save_run(tmp_path / "run", tmp_path, "dtype=float32")
    assert main(["convert", f"--in={run}", f"--out={tmp_path / 'tokenizer.safetensors'}"]) == 0
    shutil.copy(torch_model.__file__, tmp_path)
    picture = decode_image(next(iter(openmoji(size=32).examples())).read())
    Image.fromarray(picture).save(tmp_path / "image.png")
    (lines,) = re.findall(r"```python\n([^`]*torch_model[^`]*)```", (ROOT / "README.md").read_text())
    no_jax = "import importlib.util\nassert importlib.util.find_spec('jax') is None\n"
    subprocess.run([python, "-c", no_jax + lines], cwd=tmp_path, check=True)

    tokenizer = Tokenizer.load(run)
    expected = np.clip(tokenizer.decode(tokenizer.encode(picture[None])), -1, 1)[0]
    drawn = np.asarray(Image.open(tmp_path / "reconstructed.png"), np.float32) / 127.5 - 1
    assert np.abs(drawn - expected).max() < 1.01 / 127.5
    assert expected.std() > 0.01 and sys.executable != str(python)
