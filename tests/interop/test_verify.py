"""PyTorch's side: our module takes the weights strictly and computes the golden numbers; convert --verify tells where
the two sides part."""

import json

import numpy as np
import pytest
from support import released
from support.published_files import GENERATOR_FIELDS, save_as_released, state_dict_of

from ibq_jax.__main__ import main
from ibq_jax.pretrained.tensor_files import open_tensors, read_tensors, write_tensors

torch = pytest.importorskip("torch")
torch_model = pytest.importorskip("ibq_jax.interop.torch_model")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The golden networks as files that say what they are; the generator's by way of a run, which is told its grid."""
    folder = tmp_path_factory.mktemp("files")
    for network in ("tokenizer", "ar"):
        save_as_released(folder / f"{network}.ckpt", state_dict_of(network))
    assert main(["convert", f"--in={folder / 'tokenizer.ckpt'}", f"--out={folder / 'tokenizer.safetensors'}"]) == 0
    assert main(["convert", f"--in={folder / 'ar.ckpt'}", f"--out={folder / 'ar'}", *GENERATOR_FIELDS]) == 0
    assert main(["convert", f"--in={folder / 'ar'}", f"--out={folder / 'ar.pt'}"]) == 0
    return folder


@pytest.mark.parametrize("weights", ["raw", "ema"])
def test_our_pytorch_tokenizer_computes_the_golden_numbers(files, weights):
    golden, prefix = released.tokenizer()[2], "ema_" if weights == "ema" else ""
    tokenizer = torch_model.load(files / "tokenizer.safetensors", weights)
    pictures, codes = tokenizer(torch.from_numpy(golden["image"]))
    np.testing.assert_array_equal(codes.flatten(), golden[f"{prefix}indices"])
    released.assert_close(pictures, golden[f"{prefix}reconstruction"], 1e-5)


def test_our_pytorch_generator_computes_the_golden_numbers(files):
    golden = released.load("ar")
    generator = torch_model.load(files / "ar.pt")
    labels = torch.from_numpy(golden["labels"][:, 0]).long()
    tokens = torch.from_numpy(golden["tokens"]).long()
    released.assert_close(generator(tokens, labels), golden["logits"], 1e-5)
    released.assert_close(generator.loss(tokens, labels), golden["loss"], 1e-6)
    for scale in (1.5, 2.25):
        expected = golden[f"greedy_cfg_{scale}"]
        drawn = generator.sample(labels[: len(expected)], cfg_scale=scale, temperature=0.0)
        np.testing.assert_array_equal(drawn.flatten(1), expected)


def test_pytorch_draws_what_is_asked(files):
    generator = torch_model.load(files / "ar.pt")
    labels = torch.tensor([1, 2])
    prefix = torch.tensor([[5, 6, 7], [8, 9, 10]])

    def draw(seed: int, **settings):
        return generator.sample(labels, random=torch.Generator().manual_seed(seed), prefix=prefix, **settings)

    assert draw(0).shape == (2, 4, 4) and torch.equal(draw(0).flatten(1)[:, :3], prefix)
    assert torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1))
    greedy = generator.sample(labels, temperature=0.0, prefix=prefix)
    assert torch.equal(draw(0, top_k=1), greedy) and torch.equal(draw(0, top_p=1e-6), greedy)


def test_a_file_that_does_not_say_what_it_is_is_refused(tmp_path):
    write_tensors(tmp_path / "bare.safetensors", state_dict_of("ar"), {})
    with pytest.raises(ValueError, match="does not say how large"):
        torch_model.load(tmp_path / "bare.safetensors")


@pytest.mark.parametrize("network", ["tokenizer.safetensors", "tokenizer.ckpt", "ar", "ar.pt"])
def test_both_sides_agree(files, network, capsys):
    assert main(["convert", f"--in={files / network}", "--verify"]) == 0
    said = capsys.readouterr().out
    agreeing, codes = said.split(" codes ")[0].split(" of ")
    assert agreeing == codes.split()[0] and "tensors compared" in said


def test_where_they_part_is_named(files, tmp_path, capsys):
    """A bias that is off shows in its layer first, and its weight before all layers."""
    tensors, about = read_tensors(files / "tokenizer.safetensors"), open_tensors(files / "tokenizer.safetensors").about
    from ibq_jax.interop.load import load_tokenizer
    from ibq_jax.interop.verify import verify_tokenizer

    model, params = load_tokenizer(files / "tokenizer.safetensors", use_ema=True)
    bias = "model_ema.decodermidblock_1conv1bias"
    tensors[bias] = tensors[bias] + np.float32(1.0)
    write_tensors(tmp_path / "off.safetensors", tensors, about)
    images = np.random.default_rng(0).uniform(-1, 1, (2, 32, 32, 3)).astype(np.float32)
    report = verify_tokenizer(model, params, tmp_path / "off.safetensors", images)
    assert report.first_beyond.name == "weight decoder.mid.block_1.conv1.bias"
    layers = [difference for difference in report.differences if not difference.name.startswith("weight")]
    first = next(difference for difference in layers if difference.relative > 1e-3)
    assert first.name == "decoder.mid.block_1.conv1" and first.largest == pytest.approx(1.0, abs=1e-3)
    assert len(layers) > 40 and report.agreeing == report.codes


def test_a_difference_is_exit_code_one(files, capsys, monkeypatch):
    from ibq_jax.interop import verify

    monkeypatch.setattr(verify, "TOLERANCE", 1e-12)
    assert main(["convert", f"--in={files / 'ar.pt'}", "--verify"]) == 1
    assert "is the first to differ" in capsys.readouterr().err


def test_the_hubs_layout(files, tmp_path):
    assert main(["convert", f"--in={files / 'ar'}", f"--out={tmp_path / 'hub'}", "--hub"]) == 0
    names = {path.name for path in (tmp_path / "hub").iterdir()}
    assert names == {"model.safetensors", "config.json", "README.md", "torch_model.py", "modeling_ibq.py"}
    told = json.loads((tmp_path / "hub" / "config.json").read_text())
    assert told["architecture"]["n_layer"] == 2 and told["config"]["model"]["grid"] == [4, 4]
    card = (tmp_path / "hub" / "README.md").read_text()
    for section in ("## Data", "## Recipe", "## Numbers", "license:"):
        assert section in card
    assert "{" not in card and torch_model.load(tmp_path / "hub" / "model.safetensors").grid == (4, 4)
