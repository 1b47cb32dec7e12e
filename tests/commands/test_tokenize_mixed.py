"""The tokenize command on images of mixed sizes: what it prints, stores and refuses."""

import jax
import numpy as np
import pytest
from PIL import Image
from support.mixed_images import COUNT, write_folder
from support.mixed_images import job as mixed_job
from support.small_runs import generator_arguments

from ibq_jax import Tokenizer
from ibq_jax.__main__ import main
from ibq_jax.data.mixed_cache import MixedCache
from ibq_jax.data.raw_images import find_images
from ibq_jax.evaluate.check_mixed_cache import check_mixed_cache
from ibq_jax.tokenizer.restore import restore_run

pytestmark = pytest.mark.slow
BOUNDS = ("--min-pixels=100", "--max-pixels=300", "--max-shapes=2")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("images") / "in")


def test_a_folder_is_tokenized_and_a_generator_refuses_it(images, tokenizer, tmp_path, capsys):
    out = tmp_path / "codes"
    assert main(["tokenize", f"--run={tokenizer}", f"--out={out}", f"--images={images}", *BOUNDS]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "13 images of 4 sizes get 2 shapes"
    assert printed[1] == f"{out}/ holds the codes of {images} by {tokenizer}, step 7, ema weights"
    assert printed[2].startswith(f"  {COUNT} images in 2 shapes, ") and " of 64 codes used, " in printed[2]
    assert printed[3].endswith("the others changed their aspect ratio by at most 66.7% (--max-shapes)")
    assert printed[4] == "  texts: json, txt"
    assert printed[5] == f"  skipped 3 images, listed in {out}/images/*.json:"
    cache = MixedCache(out)
    tokens = sum(image.codes.size for image in cache)
    assert printed[9] == f"  0 of {tokens:,} sampled codes differ from full float32"
    assert printed[10] == f"look at {out}/decoded.png: images, each above what its codes decode to"
    assert len(printed) == 11
    with Image.open(out / "decoded.png") as sheet:
        assert sheet.size[0] > 8 * 64 and sheet.size[1] > 4 * 64  # ten images: two rows of originals, two of decoded
    api = Tokenizer.load(tokenizer)
    [image] = [image for image in cache if image.name == "01.png"]
    np.testing.assert_array_equal(image.codes, api.encode_image(f"{images}/01.png", 100, 300))

    trainer, restored = restore_run(tokenizer)
    other = jax.tree.map(lambda leaf: leaf[::-1], restored.state.weights("ema"))
    job = mixed_job(find_images(images), min_pixels=100, max_pixels=300, max_shapes=2)
    compared = check_mixed_cache(out, cache.manifest, trainer.model, other, job)["compared_with_float32"]
    assert compared["sampled_codes"] == tokens and compared["differing_codes"] > tokens / 2

    assert main(generator_arguments(tmp_path / "ar", out)) == 2
    error = capsys.readouterr().err
    assert "holds images of mixed sizes; this needs codes of one grid" in error and error.count("\n") == 1
    assert main(["tokenize", f"--run={tokenizer}", f"--out={out}"]) == 2
    assert "does not fit: version: the cache has 3, this command asks for 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--images=IN", "--views=flip", "--data=x"), "--views, --data cannot go with --images: "),
        (("--images=IN", "--format=megatron"), "this layout states no rows, and the images are of mixed sizes"),
        (("--images=IN", "--format=jsonl", "--compact=lost.npy"), "lost.npy: "),
        (("--max-shapes=3",), "--max-shapes needs --images: "),
        (("--images=IN", "--min-pixels=500", "--max-pixels=300"), "min_pixels=500 and max_pixels=300"),
        (("--images=/nowhere",), "--images=/nowhere: no folder, and no file matches it"),
    ],
)
def test_what_does_not_fit_is_one_line(flags, words, images, tokenizer, tmp_path, capsys):
    flags = [flag.replace("IN", images) for flag in flags]
    assert main(["tokenize", f"--run={tokenizer}", f"--out={tmp_path / 'codes'}", *flags]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert not (tmp_path / "codes").exists()
