"""Folders of weights as they are published: Emu3.5's tokenizer with made-up weights, to codes and back to a file."""

import json
from pathlib import Path

import numpy as np
import pytest
from support import released

from ibq_jax import Tokenizer
from ibq_jax.__main__ import main
from ibq_jax.base.errors import UsageError
from ibq_jax.interop.recognize import Contents, check, recognize, run_config
from ibq_jax.interop.weights import holds_weights, open_weights
from ibq_jax.pretrained.tensor_files import read_tensors, write_tensors

torch = pytest.importorskip("torch")
torch_model = pytest.importorskip("ibq_jax.interop.torch_model")

EMU35 = json.loads((released.GOLDEN / "published_tokenizers.json").read_text())["others"]["Emu3.5-VisionTokenizer"]
SMALL = {"ch": 32, "ch_mult": [1, 2, 4], "num_res_blocks": 1, "z_channels": 32, "resolution": 64}
SIZES = ((4, 4), (3, 5), (7, 2), (1, 6))  # codes, four aspect ratios


def configuration(**changes) -> dict:
    """The configuration of Emu3.5's tokenizer as config.yaml has it, with other values in ddconfig."""
    sizes = {"n_embed": 4096, "embed_dim": 32} if changes else {}
    return EMU35["config"] | sizes | {"ddconfig": EMU35["config"]["ddconfig"] | changes}


def flat(published: dict) -> dict:
    """The same as Emu3.5's config.json has it."""
    sizes = {"codebook_size": published["n_embed"], "embed_dim": published["embed_dim"]}
    return {"model_type": "Emu3p5VisionVQ", "architectures": ["Emu3p5VisionVQModel"], **published["ddconfig"], **sizes}


def made_up(published: dict) -> dict[str, np.ndarray]:
    """Weights drawn by seeds from their names, so that activations stay near 1."""
    with torch.device("meta"):
        tensors = torch_model.Tokenizer.of(published).state_dict()
    return released.stand_ins_like(tensors)


def write_folder(folder: Path, published: dict, config_json: bool = True) -> Path:
    folder.mkdir()
    write_tensors(folder / "model.safetensors", made_up(published), {"format": "pt"})
    if config_json:
        (folder / "config.json").write_text(json.dumps(flat(published)))
    else:
        (folder / "config.yaml").write_text(
            json.dumps(published | {"beta": 0.25, "use_entropy_loss": False})
        )  # is YAML
    return folder


def image_of(height: int, width: int, factor: int) -> np.ndarray:
    """An image of [height, width] codes, of squares of half a code's side, float32 [1, H, W, 3] in [-1, 1]."""
    coarse = np.random.default_rng(height).uniform(-1, 1, (1, 2 * height, 2 * width, 3)).astype(np.float32)
    return np.repeat(np.repeat(coarse, factor // 2, axis=1), factor // 2, axis=2)


def in_pytorch(images: np.ndarray) -> "torch.Tensor":
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def assert_codes_are_pytorchs(folder: Path, exported: Path, sizes) -> None:
    """All codes of an image of each size are those of our PyTorch module in float32; so are the last one's pixels."""
    tokenizer, module, seen = Tokenizer.load(folder), torch_model.load(exported), set()
    factor = 2 ** (len(tokenizer.model.channel_multipliers) - 1)
    for height, width in sizes:
        image = image_of(height, width, factor)
        codes = np.asarray(tokenizer.encode(image))
        assert codes.shape == (1, height, width)
        with torch.inference_mode():
            np.testing.assert_array_equal(codes, module.encode(in_pytorch(image)))
        seen |= set(codes.flat)
    assert len(seen) > 10
    with torch.inference_mode():
        pixels = module.decode(torch.tensor(codes).long()).permute(0, 2, 3, 1)
    released.assert_close(tokenizer.decode(codes), pixels.numpy(), 1e-4)


@pytest.mark.slow
def test_emu35s_tokenizer_comes_goes_and_has_the_same_codes_at_any_aspect_ratio(tmp_path):
    folder = write_folder(tmp_path / "Emu3.5-VisionTokenizer", configuration(**SMALL))
    before = read_tensors(folder / "model.safetensors")
    assert main(["convert", f"--in={folder}", f"--out={tmp_path / 'run'}"]) == 0
    assert main(["convert", f"--in={tmp_path / 'run'}", f"--out={tmp_path / 'again.safetensors'}"]) == 0
    after = read_tensors(tmp_path / "again.safetensors")
    assert after.keys() == before.keys()
    for name, array in before.items():
        np.testing.assert_array_equal(after[name], array, strict=True, err_msg=name)
    assert_codes_are_pytorchs(folder, tmp_path / "again.safetensors", SIZES)


@pytest.mark.long
def test_emu35s_tokenizer_at_its_own_size_has_the_same_codes_at_any_aspect_ratio(tmp_path, optimized):
    """455 M parameters, 131,072 codes."""
    folder = write_folder(tmp_path / "Emu3.5-VisionTokenizer", configuration())
    assert main(["convert", f"--in={folder}", f"--out={tmp_path / 'with_sizes.safetensors'}"]) == 0
    assert_codes_are_pytorchs(folder, tmp_path / "with_sizes.safetensors", SIZES)


def test_both_forms_of_a_configuration_say_the_same(tmp_path):
    published = configuration(**SMALL)
    for name, config_json in (("flat", True), ("nested", False)):
        file = open_weights(write_folder(tmp_path / name, published, config_json))
        found = json.loads(file.about["architecture"])
        assert found == published, name
        check(file.shapes, Contents("tokenizer", found))


def test_a_folder_is_told_from_a_run(tmp_path):
    assert not holds_weights(tmp_path) and holds_weights(tmp_path / "model.safetensors")
    with pytest.raises(UsageError, match=r"config\.json does not exist"):
        Tokenizer.load(tmp_path)
    (tmp_path / "model.ckpt").write_bytes(b"")
    assert holds_weights(tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("config.json", "{", "config.json: not readable as a configuration"),
        ("config.json", "[]", "config.json: not a configuration, which has named fields"),
        ("config.yaml", "a: [", "config.yaml: not readable as a configuration"),
        ("config.json", '{"model_type": "Emu3p5VisionVQ", "ch": 32}', "configuration of the tokenizer: .* is missing"),
        ("config.json", json.dumps(flat(configuration(**SMALL | {"ch": 64}))), r"conv_in.weight has shape \(32, 3, 3"),
        ("config.json", json.dumps(flat(configuration(**SMALL, double_z=True))), "double_z is True"),
    ],
)
def test_a_configuration_that_does_not_fit_is_one_line(tmp_path, name, text, complaint):
    write_tensors(tmp_path / "model.safetensors", made_up(configuration(**SMALL)), {})
    (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match=complaint):
        Tokenizer.load(tmp_path)


def test_a_configuration_of_another_network_is_left_to_the_shapes(tmp_path):
    write_tensors(tmp_path / "model.safetensors", made_up(configuration(**SMALL)), {})
    (tmp_path / "config.json").write_text('{"model_type": "another"}')
    assert "architecture" not in open_weights(tmp_path).about
    assert Tokenizer.load(tmp_path).codebook_size == 4096


@pytest.mark.slow
def test_a_quantizer_of_directions_is_one_in_every_form(tmp_path):
    """`l2_normalize` leaves no trace in the tensors, and without it PyTorch would choose other codes."""
    folder = write_folder(tmp_path / "nested", configuration(**SMALL) | {"l2_normalize": True}, config_json=False)
    assert main(["convert", f"--in={folder}", f"--out={tmp_path / 'run'}"]) == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["quantizer"]["l2_normalize"] is True
    assert main(["convert", f"--in={tmp_path / 'run'}", f"--out={tmp_path / 'again.safetensors'}"]) == 0
    assert_codes_are_pytorchs(folder, tmp_path / "again.safetensors", SIZES[:1])
    module = torch_model.load(tmp_path / "again.safetensors")
    with torch.inference_mode():
        expected = module.encode(in_pytorch(image_of(4, 4, 4)))
        module.quantize.l2_normalize = False
        assert torch.any(module.encode(in_pytorch(image_of(4, 4, 4))) != expected)


def test_whether_a_bare_file_is_of_directions_can_be_told(tmp_path):
    write_tensors(tmp_path / "bare.safetensors", made_up(configuration(**SMALL)), {})
    file = open_weights(tmp_path / "bare.safetensors")
    contents = recognize(file.shapes, file.about, "bare")
    assert not run_config(contents, "bare")[0].quantizer.l2_normalize
    assert run_config(contents, "bare", overrides=["--config.quantizer.l2_normalize=True"])[0].quantizer.l2_normalize
