"""Token caches of compact codes: a pruned tokenizer's, encoded or renumbered, up to the samples of their generator."""

import json

import numpy as np
import pytest
from support.generator_runs import refused
from support.small_runs import generator_arguments, save_run
from support.tokenizing import command, files, stored_codes

from ibq_jax import Generator, Tokenizer
from ibq_jax.__main__ import main
from ibq_jax.base.errors import UsageError
from ibq_jax.data.preprocess import to_uint8
from ibq_jax.data.token_cache import read_manifest
from ibq_jax.data.token_cache_writer import list_shards
from ibq_jax.interop.renumber import RenumberedCodes

pytestmark = pytest.mark.slow
FEW = "--splits=train[:9],validation[:2]"


@pytest.fixture(scope="module")
def made(tmp_path_factory, tokenizer):
    """A folder with a token cache, "codes", and the tokenizer without the codes that do not occur there, "pruned"."""
    folder = tmp_path_factory.mktemp("compact")
    assert main(command(tokenizer, folder / "codes", FEW)) == 0
    prune = ["--prune", f"--codes={folder / 'codes'}", "--multiple-of=1"]
    assert main(["convert", f"--in={tokenizer}", f"--out={folder / 'pruned'}", *prune]) == 0
    assert main(command(folder / "pruned", folder / "compact", FEW, f"--renumber={folder / 'codes'}")) == 0
    return folder


def test_pruning_keeps_the_codes_of_the_token_cache(made):
    counts = sum(np.load(made / "codes" / f"{split}_histogram.npy") for split in ("train", "validation"))
    old_to_new = np.load(made / "pruned" / "old_to_new.npy")
    np.testing.assert_array_equal(old_to_new >= 0, counts > 0)
    assert 0 < old_to_new.max() + 1 < 64


def test_renumbered_codes_are_those_of_the_pruned_tokenizer_to_the_byte(made, tmp_path):
    """The cache names the pruned tokenizer, has its codebook size and the numbers of the map."""
    assert main(command(made / "pruned", tmp_path / "encoded", FEW)) == 0
    assert files(tmp_path / "encoded") == files(made / "compact")
    old_to_new = np.load(made / "pruned" / "old_to_new.npy")
    for split in ("train", "validation"):
        codes = stored_codes(made / "compact", split)
        np.testing.assert_array_equal(codes, old_to_new[stored_codes(made / "codes", split)])
    manifest = json.loads((made / "compact" / "token_cache.json").read_text())
    assert manifest["codebook_size"] == old_to_new.max() + 1
    assert manifest["compared_with_float32"]["differing_codes"] == 0


def test_a_generator_of_compact_codes_draws_what_the_first_tokenizer_decodes(made, tokenizer, tmp_path):
    run, out = tmp_path / "ar", tmp_path / "samples.npz"
    overrides = ("train.steps=2", "log.images_every=1000", "evaluate.every=1000")
    assert main(generator_arguments(run, made / "compact", *overrides)) == 0
    assert main(["sample", f"--run={run}", f"--out={out}", "--num=4", "--labels=0,1", "--cfg-scale=1"]) == 0
    old_to_new = np.load(made / "pruned" / "old_to_new.npy")
    generator = Generator.load(run)
    assert generator.model.vocab_size == old_to_new.max() + 1
    codes = np.asarray(generator.sample([0, 1, 0, 1], cfg_scale=1.0, temperature=1.0))
    decoded = to_uint8(Tokenizer.load(tokenizer).decode(np.flatnonzero(old_to_new >= 0)[codes]))
    np.testing.assert_array_equal(np.load(out)["arr_0"], decoded)


def test_detokenize_gives_the_same_images_of_both(made, tokenizer, tmp_path):
    for run, codes in ((tokenizer, "codes"), (made / "pruned", "compact")):
        words = [f"--run={run}", f"--codes={made / codes}", f"--out={tmp_path / codes}", "--num=4"]
        assert main(["detokenize", *words]) == 0
    assert len(files(tmp_path / "codes")) == 4 and files(tmp_path / "codes") == files(tmp_path / "compact")


def test_what_does_not_fit_is_one_line(made, tokenizer, pictures, tmp_path, capsys):
    out, codes, pruned = tmp_path / "out", made / "codes", made / "pruned"
    other = save_run(tmp_path / "other", pictures, "seed=1")
    for words, argv in (
        ("old_to_new.npy", command(tokenizer, out, FEW, f"--renumber={codes}")),
        ("data.splits.train.views", command(pruned, out, FEW, f"--renumber={codes}", "--views=centre")),
        ("precision", command(pruned, out, FEW, f"--renumber={codes}", "--precision=bfloat16")),
        ("--renumber cannot go with --images", command(pruned, out, f"--renumber={codes}", "--images=photos")),
        ("there is no token cache in", command(pruned, out, FEW, "--renumber=nowhere")),
        ("says which codes --prune keeps", ["convert", f"--in={tokenizer}", f"--out={out}", f"--codes={codes}"]),
        ("does not fit", ["convert", f"--in={other}", f"--out={out}", "--prune", f"--codes={codes}"]),
    ):
        assert words in refused(argv, capsys), words
        assert not out.exists()


def test_an_image_with_a_dropped_code_is_named(made):
    manifest = read_manifest(made / "codes")
    old_to_new, [shard, *_] = np.load(made / "pruned" / "old_to_new.npy"), list_shards(made / "codes", manifest)
    lost = stored_codes(made / "codes", "train").flat[0]
    old_to_new[lost] = -1
    with pytest.raises(UsageError, match=rf"image 0 of .* has 1 codes that were dropped, such as {lost}: "):
        list(RenumberedCodes(made / "codes", manifest, old_to_new).images(shard))


def test_another_tokenizer_with_the_same_map_is_refused(made, pictures, tmp_path, capsys):
    old_to_new = np.load(made / "pruned" / "old_to_new.npy")
    other = save_run(tmp_path / "other", pictures, f"codebook.size={old_to_new.max() + 1}")
    np.save(other / "old_to_new.npy", old_to_new)
    line = refused(command(other, tmp_path / "out", FEW, f"--renumber={made / 'codes'}"), capsys)
    assert "its weights or its precision differ" in line
