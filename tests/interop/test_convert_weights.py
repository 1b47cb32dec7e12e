"""convert between PyTorch's files and runs: published names, golden networks, exact both ways; and bad files."""

import json
from pathlib import Path

import numpy as np
import pytest
from support import released
from support.published_files import GENERATOR_FIELDS, save_as_released, state_dict_of
from support.small_runs import arguments, save_run

from ibq_jax import Generator, Tokenizer
from ibq_jax.__main__ import main
from ibq_jax.base.errors import UsageError
from ibq_jax.pretrained.tensor_files import open_tensors, read_tensors, write_tensors

pytestmark = pytest.mark.slow

torch = pytest.importorskip("torch")

SUFFIXES = ("ckpt", "pt", "safetensors")


def assert_same_tensors(path: Path, expected: dict[str, np.ndarray]) -> None:
    found = read_tensors(path)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, strict=True, err_msg=name)


@pytest.fixture(scope="module")
def tokenizer_run(tmp_path_factory) -> Path:
    """The golden tokenizer, imported."""
    folder = tmp_path_factory.mktemp("tokenizer")
    file = save_as_released(folder / "golden.ckpt", state_dict_of("tokenizer"), legacy=True)
    assert main(["convert", f"--in={file}", f"--out={folder / 'run'}", "--config.dtype=float32"]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def generator_run(tmp_path_factory) -> Path:
    """The golden generator, imported."""
    folder = tmp_path_factory.mktemp("generator")
    file = save_as_released(folder / "golden.ckpt", state_dict_of("ar"))
    assert main(["convert", f"--in={file}", f"--out={folder / 'run'}", *GENERATOR_FIELDS]) == 0
    return folder / "run"


@pytest.mark.parametrize("use_ema", [False, True])
def test_an_imported_tokenizer_computes_what_the_released_one_did(tokenizer_run, use_ema):
    golden, prefix = released.tokenizer()[2], "ema_" if use_ema else ""
    tokenizer = Tokenizer.load(tokenizer_run, use_ema)
    codes = tokenizer.encode(released.nhwc(golden["image"]))
    np.testing.assert_array_equal(codes.reshape(-1), golden[f"{prefix}indices"])
    released.assert_close(tokenizer.decode(codes), released.nhwc(golden[f"{prefix}reconstruction"]), 1e-4)


@pytest.mark.parametrize("source", ["run", "file"])
def test_parts_that_are_not_needed_stay_out_of_memory(tokenizer_run, source):
    golden, path = released.tokenizer()[2], tokenizer_run if source == "run" else tokenizer_run.parent / "golden.ckpt"
    encoder = Tokenizer.load(path, parts=("encoder", "codebook"))
    assert set(encoder.params) == {"encoder", "quant_conv", "quantize"}
    codes = encoder.encode(released.nhwc(golden["image"]))
    np.testing.assert_array_equal(codes.reshape(-1), golden["ema_indices"])
    with pytest.raises(UsageError, match=r"decode needs the decoder, which .* left out"):
        encoder.decode(codes)
    with pytest.raises(UsageError, match="to_torch needs the decoder"):
        encoder.to_torch()
    decoder = Tokenizer.load(path, parts=("codebook", "decoder"))
    assert set(decoder.params) == {"quantize", "post_quant_conv", "decoder"}
    released.assert_close(decoder.decode(codes), released.nhwc(golden["ema_reconstruction"]), 1e-4)
    with pytest.raises(UsageError, match="encode needs the encoder"):
        decoder.encode(released.nhwc(golden["image"]))
    with pytest.raises(UsageError, match="there is no part 'quantizer'; the parts are encoder, codebook, decoder"):
        Tokenizer.load(path, parts=("quantizer",))


def test_an_imported_generator_computes_what_the_released_one_did(generator_run):
    golden = released.load("ar")
    generator = Generator.load(generator_run)
    released.assert_close(generator.logits(golden["tokens"], golden["labels"][:, 0]), golden["logits"], 1e-4)
    assert generator.model.num_heads == 2


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("network", ["tokenizer", "ar"])
def test_exported_again_every_tensor_is_the_same_to_the_bit(tokenizer_run, generator_run, tmp_path, network, suffix):
    run = tokenizer_run if network == "tokenizer" else generator_run
    assert main(["convert", f"--in={run}", f"--out={tmp_path / f'again.{suffix}'}"]) == 0
    assert_same_tensors(tmp_path / f"again.{suffix}", state_dict_of(network))


@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_one_set_of_weights_under_plain_names(tokenizer_run, tmp_path, weights):
    out = tmp_path / "one.safetensors"
    assert main(["convert", f"--in={tokenizer_run}", f"--out={out}", f"--weights={weights}"]) == 0
    golden = state_dict_of("tokenizer")
    plain = {name for name in golden if not name.startswith(("loss.", "model_ema."))}
    stored = {name: "model_ema." + name.replace(".", "") if weights == "ema" else name for name in plain}
    assert_same_tensors(out, {name: golden[stored[name]] for name in plain})


def test_an_exported_file_says_what_it_is(tokenizer_run, tmp_path):
    for suffix in ("safetensors", "ckpt"):
        assert main(["convert", f"--in={tokenizer_run}", f"--out={tmp_path / f'told.{suffix}'}"]) == 0
        about = open_tensors(tmp_path / f"told.{suffix}").about
        assert json.loads(about["architecture"])["ddconfig"]["ch_mult"] == [1, 2]
        assert json.loads(about["config"])["codebook"]["size"] == 64
        assert (about["stage"], about["step"], about["weights"]) == ("tokenizer", "0", "all")
        assert len(about["revision"]) >= 7 and json.loads(about["metrics"]) == {}


def test_files_become_files_with_their_tensors_as_they_are(tmp_path):
    golden = state_dict_of("ar")
    source = save_as_released(tmp_path / "golden.ckpt", golden)
    assert main(["convert", f"--in={source}", f"--out={tmp_path / 'new.safetensors'}"]) == 0
    assert_same_tensors(tmp_path / "new.safetensors", golden)
    assert json.loads(open_tensors(tmp_path / "new.safetensors").about["architecture"])["n_layer"] == 2


def test_a_trained_run_has_every_published_name(tmp_path):
    """Averages of the discriminator and their settings too, which a strict load of the released code looks for."""
    run = save_run(tmp_path / "run", tmp_path)
    assert main(["convert", f"--in={run}", f"--out={tmp_path / 'run.ckpt'}"]) == 0
    tensors = read_tensors(tmp_path / "run.ckpt")
    assert tensors["model_ema.num_updates"] == 7 and tensors["model_ema.decay"].dtype == np.float32
    plain = [name for name in tensors if not name.startswith("model_ema.")]
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    averaged = {"model_ema." + name.replace(".", "") for name in plain if not name.endswith(buffers)}
    assert tensors.keys() == {*plain, *averaged, "model_ema.decay", "model_ema.num_updates"}
    assert any(name.startswith("loss.discriminator.main.") for name in plain)
    assert main(["convert", f"--in={tmp_path / 'run.ckpt'}", f"--out={tmp_path / 'again'}"]) == 0
    before, after = (Tokenizer.load(place, use_ema) for place in (run, tmp_path / "again") for use_ema in (True,))
    assert before.to_torch().keys() == after.to_torch().keys()
    for name, array in before.to_torch().items():
        np.testing.assert_array_equal(after.to_torch()[name], array)


def test_an_imported_tokenizer_is_evaluated_and_trained_on(data_dir, tmp_path, capsys):
    """With another learning rate: of weights that were not trained on yet, only the networks are fixed."""
    file = tmp_path / "run.safetensors"
    run = save_run(tmp_path / "run", data_dir)
    assert main(["convert", f"--in={run}", f"--out={file}"]) == 0
    assert main(["convert", f"--in={file}", f"--out={tmp_path / 'imported'}"]) == 0
    assert "other fields as in the run that it was made of" in capsys.readouterr().out
    assert main(["evaluate", f"--run={tmp_path / 'imported'}", "--examples=16"]) == 0
    changed = ("optimizer.learning_rate=3e-5", "train.steps=3", "evaluate.every=3", "log.images_every=3")
    assert main(arguments(tmp_path / "imported", data_dir, *changed)) == 0
    assert "continuing from the weights of step 0" in capsys.readouterr().out
    steps = [json.loads(line) for line in (tmp_path / "imported" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps if "loss/total" in line] == [1, 2, 3]
    trained, before = (Tokenizer.load(place, use_ema=False).to_torch() for place in (tmp_path / "imported", run))
    difference = trained["decoder.conv_out.weight"] - before["decoder.conv_out.weight"]
    assert 0 < np.abs(difference).max() < 1e-3
    assert main(arguments(tmp_path / "imported", data_dir, *changed, "optimizer.learning_rate=1e-5")) == 2
    assert main(["convert", f"--in={tmp_path / 'imported'}", f"--out={tmp_path / 'trained.ckpt'}"]) == 0
    assert read_tensors(tmp_path / "trained.ckpt")["model_ema.num_updates"] == 3
    assert main(["convert", f"--in={tmp_path / 'imported'}", f"--out={tmp_path / 'more'}", "--codebook-size=128"]) == 0


def test_a_generator_with_its_tokenizer_beside_it_becomes_two_runs_and_draws(tmp_path, tokenizer_run):
    beside = {f"first_stage_model.{name}": array for name, array in state_dict_of("tokenizer").items()}
    both = {f"transformer.{name}": array for name, array in state_dict_of("ar").items()} | beside
    file = save_as_released(tmp_path / "both.ckpt", both)
    assert main(["convert", f"--in={file}", f"--out={tmp_path / 'run'}", *GENERATOR_FIELDS]) == 0
    assert main(["sample", f"--run={tmp_path / 'run'}", f"--out={tmp_path / 'sheet.png'}", "--labels=1,2"]) == 0
    assert main(["convert", f"--in={tmp_path / 'run'}", f"--out={tmp_path / 'again.ckpt'}"]) == 0
    assert_same_tensors(tmp_path / "again.ckpt", both)


def test_an_imported_generator_is_told_its_tokenizer_later(tmp_path, generator_run, tokenizer_run, capsys):
    command = ["sample", f"--run={generator_run}", f"--out={tmp_path / 'sheet.png'}", "--labels=1"]
    assert main(command) == 2
    assert "give --tokenizer=RUN" in capsys.readouterr().err
    assert main([*command, f"--tokenizer={tokenizer_run}"]) == 0


# ---- what cannot be read ---------------------------------------------------------------------------------------------


class Harmful:
    def __reduce__(self):
        return Path.touch, (Path("harm_was_done"),)


def refused(arguments: list[str], capsys) -> str:
    """The one line that the command answers."""
    assert main(["convert", *arguments]) == 2
    said = capsys.readouterr().err.strip()
    assert "\n" not in said
    return said


def test_whatever_is_wrong_with_tensors_is_named_and_nothing_written(tmp_path, capsys):
    tensors = state_dict_of("tokenizer") | {
        "extra": np.zeros(1, np.float32),
        "quant_conv.bias": np.zeros(3, np.float32),
    }
    del tensors["encoder.conv_in.bias"], tensors["decoder.conv_out.weight"]
    write_tensors(tmp_path / "bad.safetensors", tensors, {})
    said = refused([f"--in={tmp_path / 'bad.safetensors'}", f"--out={tmp_path / 'run'}"], capsys)
    for complaint in (
        "encoder.conv_in.bias is missing",
        "decoder.conv_out.weight is missing",
        "extra is unknown",
        "quant_conv.bias has shape (3,) instead of (16,)",
    ):
        assert complaint in said
    assert [path.name for path in tmp_path.iterdir()] == ["bad.safetensors"]


def test_a_harmful_pickle_does_not_run(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {"a": torch.ones(2)}, "hook": Harmful()}, tmp_path / "harmful.ckpt")
    said = refused([f"--in={tmp_path / 'harmful.ckpt'}", f"--out={tmp_path / 'run'}"], capsys)
    assert "could run code" in said and sorted(path.name for path in tmp_path.iterdir()) == ["harmful.ckpt"]


@pytest.mark.parametrize("kept", [0.5, 0.999])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_that_was_cut_short_is_refused(tmp_path, capsys, suffix, kept):
    path = tmp_path / f"whole.{suffix}"
    write_tensors(path, state_dict_of("ar"), {})
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
    said = refused([f"--in={path}", f"--out={tmp_path / 'run'}"], capsys)
    assert "cut short" in said and not (tmp_path / "run").exists()


def test_other_wrong_uses_are_one_line(tmp_path, capsys, tokenizer_run, generator_run):
    write_tensors(tmp_path / "neither.safetensors", {"a": np.zeros(1, np.float32)}, {})
    (tmp_path / "there").mkdir()
    for wrong, complaint in (
        ([f"--in={tmp_path / 'neither.safetensors'}", f"--out={tmp_path / 'run'}"], "neither a tokenizer"),
        ([f"--in={tmp_path / 'absent.ckpt'}", f"--out={tmp_path / 'run'}"], "no such file"),
        ([f"--in={tokenizer_run}", f"--out={tmp_path / 'there'}"], "exists already"),
        ([f"--in={tokenizer_run}", f"--out={tmp_path / 'run'}"], "a run becomes a file"),
        ([f"--in={tokenizer_run}"], "give --out"),
        ([f"--in={tokenizer_run}", f"--out={tmp_path / 'x.npz'}"], "a run becomes a file"),
        ([f"--in={generator_run}", f"--out={tmp_path / 'run'}", "--codebook-size=128"], "is a run of stage"),
    ):
        assert complaint in refused(wrong, capsys), wrong
    with pytest.raises(ValueError, match="holds a generator; this needs a tokenizer"):
        write_tensors(tmp_path / "ar.safetensors", state_dict_of("ar"), {})
        Tokenizer.load(tmp_path / "ar.safetensors")
