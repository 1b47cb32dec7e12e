"""Folders for the hub and graphs: what transformers and onnxruntime load is what torch_model.py computes.

The golden networks, which have random weights, and averages unlike the raw ones.
"""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from support.published_files import save_as_released, state_dict_of

from ibq_jax.__main__ import main
from ibq_jax.interop.hub_layout import own_tensors
from ibq_jax.pretrained.tensor_files import read_tensors

torch = pytest.importorskip("torch")
from ibq_jax.interop import torch_model  # noqa: E402

SHAPES = ((1, 3, 32, 32), (3, 3, 64, 48), (1, 3, 20, 128))  # the networks halve sides

# Runs without this package: only what is in the folder, and transformers.
WITH_TRANSFORMERS = """
import sys, torch
from transformers import AutoModel
tokenizer = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
generator = AutoModel.from_pretrained(sys.argv[2], trust_remote_code=True)
images = torch.load(sys.argv[3])
with torch.no_grad():
    codes = tokenizer.encode(images)
    results = codes, tokenizer.decode(codes), *tokenizer(images), generator.sample(torch.arange(3), temperature=0)
torch.save(results, sys.argv[4])
assert not tokenizer.training and "jax" not in sys.modules and "ibq_jax" not in sys.modules
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two folders for the hub and the tokenizer's graphs, made from files as they are published."""
    folder = tmp_path_factory.mktemp("hub")
    for name in ("tokenizer", "ar"):
        save_as_released(folder / f"{name}.ckpt", state_dict_of(name))
        assert main(["convert", f"--in={folder / name}.ckpt", f"--out={folder / name}", "--hub"]) == 0
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return torch_model.load(folder / "tokenizer" / "model.safetensors")


def images(shape):
    return torch.from_numpy(np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32))


def test_a_folder_holds_the_averages_alone_under_plain_names(folder):
    tensors, published = read_tensors(folder / "tokenizer" / "model.safetensors"), state_dict_of("tokenizer")
    assert not any(name.startswith(("loss.", "model_ema.")) for name in tensors) and len(tensors) > 50
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(tensor, published["model_ema." + name.replace(".", "")])
    raw = {name: tensor for name, tensor in published.items() if not name.startswith("model_ema.")}
    assert set(own_tensors(raw)) == set(tensors)
    np.testing.assert_array_equal(own_tensors(raw)["quant_conv.weight"], published["quant_conv.weight"])
    assert not any(name.startswith("transformer.") for name in read_tensors(folder / "ar" / "model.safetensors"))
    told = json.loads((folder / "tokenizer" / "config.json").read_text())
    assert told["auto_map"]["AutoModel"] == "modeling_ibq.IbqTokenizer" and told["architecture"]["n_embed"] == 64
    assert "ch_mult:" in (folder / "tokenizer" / "config.yaml").read_text()


def test_the_folder_is_read_back_as_a_run(folder, tmp_path, tokenizer):
    assert main(["convert", f"--in={folder / 'tokenizer'}", f"--out={tmp_path / 'run'}"]) == 0
    out = tmp_path / "again.safetensors"
    assert main(["convert", f"--in={tmp_path / 'run'}", f"--out={out}", "--weights=raw"]) == 0
    for name, tensor in tokenizer.state_dict().items():
        np.testing.assert_array_equal(read_tensors(out)[name], tensor)


def test_transformers_computes_the_same(folder, tmp_path, tokenizer):
    pytest.importorskip("transformers")
    torch.save(images(SHAPES[0]), tmp_path / "images.pt")
    arguments = folder / "tokenizer", folder / "ar", tmp_path / "images.pt", tmp_path / "results.pt"
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache"), "PATH": os.environ["PATH"]}
    command = [sys.executable, "-c", WITH_TRANSFORMERS, *map(str, arguments)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    codes, decoded, reconstructions, again, sampled = torch.load(tmp_path / "results.pt")
    generator = torch_model.load(folder / "ar" / "model.safetensors")
    assert torch.equal(codes, tokenizer.encode(images(SHAPES[0]))) and torch.equal(again, codes)
    assert torch.equal(decoded, tokenizer.decode(codes)) and torch.equal(reconstructions, decoded)
    assert torch.equal(sampled, generator.sample(torch.arange(3), temperature=0))


def graphs(folder, tmp_path, suffix):
    """Returns encode and decode as functions of torch tensors, from the command's files."""
    source = f"--in={folder / 'tokenizer' / 'model.safetensors'}"
    assert main(["convert", source, f"--out={tmp_path / 'graphs'}", f"--graphs={suffix}"]) == 0
    files = [tmp_path / "graphs" / f"{name}.{suffix}" for name in ("encode", "decode")]
    if suffix == "pt2":
        return [torch.export.load(file).module() for file in files]
    runtime = pytest.importorskip("onnxruntime")

    def function(file):
        session = runtime.InferenceSession(file)
        name = session.get_inputs()[0].name
        return lambda values: torch.from_numpy(session.run(None, {name: values.numpy()})[0])

    return [function(file) for file in files]


@pytest.mark.parametrize("suffix", ["onnx", "pt2"])
def test_graphs_of_any_size_give_the_same_codes_and_images(folder, tmp_path, tokenizer, suffix):
    encode, decode = graphs(folder, tmp_path, suffix)
    for shape in SHAPES:
        codes = tokenizer.encode(images(shape))
        assert codes.unique().numel() > 10 and torch.equal(encode(images(shape)), codes)
        assert (decode(codes) - tokenizer.decode(codes)).abs().max() < 1e-4


def test_wrong_use_is_one_line(folder, tmp_path, capsys):
    source = f"--in={folder / 'ar' / 'model.safetensors'}"
    assert main(["convert", source, f"--out={tmp_path / 'graphs'}", "--graphs=pt2"]) == 2
    assert "graphs are written of tokenizers" in capsys.readouterr().err and not (tmp_path / "graphs").exists()
