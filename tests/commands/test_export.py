"""The export and detokenize commands, on caches of both kinds, and tokenize --format."""

import numpy as np
import pytest
from PIL import Image
from support.mixed_images import write_folder
from support.tokenizing import command

from ibq_jax import Tokenizer
from ibq_jax.__main__ import main
from ibq_jax.data.code_export import open_codes
from ibq_jax.data.preprocess import to_uint8
from ibq_jax.data.token_cache import open_token_cache

pytestmark = pytest.mark.slow
SPLITS = "--splits=train[:9],validation[:2]"


@pytest.fixture(scope="module")
def square(tmp_path_factory, tokenizer):
    """A token cache of one grid, and its JSON lines."""
    out = tmp_path_factory.mktemp("caches") / "square"
    assert main(command(tokenizer, out, SPLITS, "--format=jsonl")) == 0
    return out


def decoded(run, codes) -> np.ndarray:
    return np.asarray(to_uint8(Tokenizer.load(run).decode(codes)))


def images_in(folder) -> dict[str, np.ndarray]:
    return {path.name: np.asarray(Image.open(path)) for path in sorted(folder.iterdir())}


def test_files_that_tokenize_wrote_decode_to_images(square, tokenizer, tmp_path, capsys):
    lines = square / "jsonl"
    assert len(list(lines.glob("train-*.jsonl"))) == 8
    assert main(["detokenize", f"--run={tokenizer}", f"--codes={lines}", f"--out={tmp_path / 'a'}", "--num=5"]) == 0
    assert f"{tmp_path / 'a'}/ holds 5 images, decoded from {lines}\n" == capsys.readouterr().out
    stored = open_token_cache(square, "train")
    expected = decoded(tokenizer, np.concatenate([stored[i]["codes"] for i in range(3)])[:5])
    found = images_in(tmp_path / "a")
    assert list(found) == [f"{i:06}_train_{i // 2}_{i % 2}.png" for i in range(5)]
    np.testing.assert_array_equal(np.stack(list(found.values())), expected)


def test_compact_tokens_of_mixed_sizes_decode_to_the_images_of_the_cache(tokenizer, tmp_path, capsys):
    where, cache, out = write_folder(tmp_path / "in"), tmp_path / "codes", tmp_path / "megatron"
    bounds = ("--min-pixels=100", "--max-pixels=300", "--max-shapes=1")
    assert main(["tokenize", f"--run={tokenizer}", f"--out={cache}", f"--images={where}", *bounds]) == 0
    flags = ["--format=megatron", "--layout=emu35", "--compact=used"]
    assert main(["export", f"--codes={cache}", f"--out={out}", *flags]) == 0
    used = int((open_codes(cache).counts() > 0).sum())
    printed = capsys.readouterr().out.splitlines()[-3:]
    assert printed[0] == f"{out}/ holds the codes of 10 images of {cache} as megatron, in 1 parts"
    assert printed[1] == f"  {used} of 64 codes, renumbered by {out}/old_to_new.npy"
    assert main(["detokenize", f"--run={tokenizer}", f"--codes={out}", f"--out={tmp_path / 'a'}"]) == 0
    assert main(["detokenize", f"--run={tokenizer}", f"--codes={cache}", f"--out={tmp_path / 'b'}"]) == 0
    first, second = images_in(tmp_path / "a"), images_in(tmp_path / "b")
    assert list(second)[:2] == ["000000_00.png", "000001_01.png"] and len(first) == len(second) == 10
    for one, other in zip(first.values(), second.values(), strict=True):
        np.testing.assert_array_equal(one, other)
    assert "note: " not in capsys.readouterr().out
    prune = ["--prune", f"--codes={cache}", "--multiple-of=1"]
    assert main(["convert", f"--in={tokenizer}", f"--out={tmp_path / 'pruned'}", *prune]) == 0
    np.testing.assert_array_equal(np.load(tmp_path / "pruned" / "old_to_new.npy"), np.load(out / "old_to_new.npy"))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--format=jsonl", "--layout=emu35"), "--layout goes with --format=megatron"),
        (("--format=parquet", "--offset=3"), "--offset goes with --format=megatron"),
        (("--format=megatron", "--layout=emu"), "there is no layout 'emu'"),
        (("--format=parquet", "--compact=none.npy"), "none.npy: "),
    ],
)
def test_what_does_not_fit_is_one_line(flags, words, square, tmp_path, capsys):
    assert main(["export", f"--codes={square}", f"--out={tmp_path / 'out'}", *flags]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_a_cache_keeps_the_tokenizers_codes(tokenizer, tmp_path, capsys):
    assert main(command(tokenizer, tmp_path / "codes", SPLITS, "--compact=used")) == 2
    words = "--compact goes with --format; a token cache has compact codes by convert --prune and --renumber"
    assert words in capsys.readouterr().err
