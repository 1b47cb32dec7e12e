"""The evaluate command on a generator: its likelihood and its samples; of one that was imported, too."""

import json

import jax
import numpy as np
import pytest
from support.generator_runs import copied, logged, refused
from support.small_runs import STEPS, generator_arguments

from ibq_jax import Generator
from ibq_jax.__main__ import main
from ibq_jax.data.token_cache import open_token_cache
from ibq_jax.pretrained.tensor_files import read_tensors, write_tensors

pytestmark = pytest.mark.slow


def test_validation_loss_is_that_of_the_public_class(run, codes, tmp_path, capsys):
    numbers = tmp_path / "numbers.json"
    assert main(["evaluate", f"--run={run}", f"--json={numbers}"]) == 0
    out, measured = capsys.readouterr().out, json.loads(numbers.read_text())
    assert "unigram entropy of the codes" in out and "uniform, log K" in out
    generator, source = Generator.load(run), list(open_token_cache(codes, "validation"))
    stored = np.stack([image["codes"][0] for image in source]).astype(np.int32)
    logits = generator.logits(stored, np.array([image["label"] for image in source]))
    log_p = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), stored.reshape(len(stored), -1, 1), 2)
    assert measured["images"] == len(stored) == 40
    assert measured["metrics"]["loss"] == pytest.approx(-log_p.mean(), rel=1e-5)
    assert measured["metrics"]["uniform"] == pytest.approx(np.log(64))
    histogram = np.bincount(stored.reshape(-1)) / stored.size
    assert measured["metrics"]["order_0"] == pytest.approx(-sum(p * np.log(p) for p in histogram if p))


def test_an_imported_generator_is_evaluated_and_trained_on(run, codes, tmp_path, capsys):
    """The file has no metadata, like the published ones."""
    assert main(["convert", f"--in={run}", f"--out={tmp_path / 'with_metadata.safetensors'}"]) == 0
    file, imported = tmp_path / "weights.safetensors", tmp_path / "imported"
    write_tensors(file, read_tensors(tmp_path / "with_metadata.safetensors"), {})
    fields = ["--config.model.num_heads=2", "--config.model.grid=(8, 8)"]
    assert main(["convert", f"--in={file}", f"--out={imported}", *fields]) == 0
    assert "give --token-cache=FOLDER" in refused(["evaluate", f"--run={imported}"], capsys)
    assert "give --reference=FILE.npz" in refused(["evaluate", f"--run={imported}", "--num=8"], capsys)
    assert not (imported / "samples").exists()  # it is refused before anything is drawn
    losses = []
    for folder in (run, imported):
        numbers = tmp_path / f"{folder.name}.json"
        assert main(["evaluate", f"--run={folder}", f"--codes={codes}", f"--json={numbers}"]) == 0
        losses.append(json.loads(numbers.read_text())["metrics"]["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)  # bfloat16 there, float32 here
    assert main(generator_arguments(imported, codes)) == 0
    assert "continuing from the weights of step 0" in capsys.readouterr().out
    trained = [row["loss/total"] for row in logged(imported) if "loss/total" in row]
    assert len(trained) == STEPS and abs(trained[0] - losses[0]) < 0.5
    assert "reads a token cache: --token-cache" in refused(["evaluate", f"--run={imported}", "--data=openmoji"], capsys)


@pytest.mark.usefixtures("optimized")  # the features of all originals take longer than to compile their network
def test_drawn_samples_are_compared_with_the_originals_and_kept(run, tmp_path, capsys):
    command = ["evaluate", f"--run={run}", "--num=16", "--batch-size=8", f"--json={tmp_path / 'numbers.json'}"]
    assert main(command) == 0
    first, printed = json.loads((tmp_path / "numbers.json").read_text()), capsys.readouterr().out
    assert "against the originals of openmoji/train[:96]" in printed and "16 images, the protocol has 50,000" in printed
    assert first["metrics"]["FD-EfficientNetLite0"] > 0 and 0 <= first["metrics"]["recall (EfficientNetLite0)"] <= 1
    assert first["samples"]["pictures"] == 16 and first["step"] == STEPS and first["protocol"]["name"] == "adm"
    drawn = run / "samples" / f"{STEPS:07}-ema-16.npz"
    written = drawn.stat().st_mtime_ns
    assert main([*command, f"--reference={drawn}", "--protocol=clean"]) == 0
    second = json.loads((tmp_path / "numbers.json").read_text())
    assert drawn.stat().st_mtime_ns == written, "the set exists: it is not drawn again"
    assert abs(second["metrics"]["FD-EfficientNetLite0"]) < 1e-6 and second["reference"] == drawn.name
    kept = {path.name for path in (run / "evaluations").iterdir()}
    assert {f"{STEPS:07}-ema-{name}-{drawn.stem}.json" for name in ("adm", "clean")} <= kept


def test_codes_of_another_kind_are_refused_in_evaluation(run, codes, tmp_path, capsys):
    other = copied(codes, tmp_path / "codes", codebook_size=128)
    error = refused(["evaluate", f"--run={run}", f"--codes={other}"], capsys)
    assert "model.vocab_size=64, the token cache has 128" in error
