"""Token caches of mixed sizes: codes as one at a time, killed and shared work, bad files, texts, shapes."""

import json
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from support import released
from support.mixed_images import COUNT, brightness_codes, job, readable, unreadable, write_folder, write_shards

from ibq_jax import Tokenizer
from ibq_jax.base.errors import UsageError
from ibq_jax.data import raw_images
from ibq_jax.data.any_size import read_upright, resize_to
from ibq_jax.data.mixed_cache import MixedCache, is_mixed
from ibq_jax.data.token_cache import open_token_cache
from ibq_jax.tokenizer import progress
from ibq_jax.tokenizer import tokenize_mixed as library
from ibq_jax.tokenizer.tokenize_mixed import MixedJob, tokenize_mixed

ORIGIN = {"path": "tokenizer.ckpt", "step": 0, "weights": "raw", "config": {}}


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_torch(*released.tokenizer()[:2])


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    """Windows of photographs, of two sizes."""
    data = pytest.importorskip("skimage.data")
    folder = tmp_path_factory.mktemp("photographs")
    for name in ("astronaut", "chelsea", "coffee", "rocket"):
        pixels = getattr(data, name)()
        for at in range(3):
            window = pixels[40 * at : 40 * at + (24, 32, 24)[at], 60 * at : 60 * at + (32, 24, 32)[at]]
            Image.fromarray(window).save(folder / f"{name}{at}.png")
    return folder


@pytest.fixture
def plain_encoder(monkeypatch):
    monkeypatch.setattr(library, "_encoder", lambda *_: lambda pixels: brightness_codes(pixels))


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(raw_images, "IMAGES_PER_PART", 4)


def tokenized(tokenizer: Tokenizer, job: MixedJob, out: Path, index: int = 0, count: int = 1, overwrite: bool = False):
    processes = dict(process_index=index, process_count=count)
    return tokenize_mixed(tokenizer.model, tokenizer.params, job, out, ORIGIN, overwrite=overwrite, **processes)


def files(folder: Path) -> dict:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_codes_are_those_of_one_image_at_a_time(tokenizer, photographs, tmp_path, monkeypatch):
    """In batches of 7; on several devices, tests/commands/test_tokenize_mixed.py has the same."""
    [first, *_] = jax.devices()
    monkeypatch.setattr(jax, "local_devices", lambda: [first])
    manifest = tokenized(tokenizer, job(str(photographs), max_pixels=600, batch_tokens=1500), tmp_path / "codes")
    cache = MixedCache(tmp_path / "codes")
    assert [image.name for image in cache] == sorted(path.name for path in photographs.iterdir())
    assert len({image.codes.shape for image in cache}) == len(manifest["shapes"]) == 2
    assert len(np.unique(np.concatenate([image.codes.reshape(-1) for image in cache]))) > 10
    for image in cache:
        codes = tokenizer.encode_image(photographs / image.name, min_pixels=100, max_pixels=600)
        np.testing.assert_array_equal(image.codes, codes)
        assert image.codes.dtype == np.uint8


def test_a_limit_on_shapes_stretches_to_the_nearest(tokenizer, plain_encoder, tmp_path):
    where = write_folder(tmp_path / "in")
    manifest = tokenized(tokenizer, job(where, max_shapes=1), tmp_path / "codes")
    assert manifest["shapes"] == [[6, 10]] or manifest["shapes"] == [[8, 8]]  # 12x20 pixels occur once more
    [[h, w]] = manifest["shapes"]
    own = [Image.open(tmp_path / "in" / name).size == (2 * w, 2 * h) for name in readable()]
    assert manifest["counts"]["own_size"] == sum(own) < COUNT and manifest["counts"]["aspect_change"] > 0.6
    for image in MixedCache(tmp_path / "codes"):
        pixels = resize_to(read_upright(tmp_path / "in" / image.name), (2 * w, 2 * h))
        np.testing.assert_array_equal(image.codes, brightness_codes(pixels[None])[0])


@pytest.mark.parametrize("write", [write_folder, write_shards])
def test_texts_travel_and_bad_images_are_named(write, tokenizer, plain_encoder, tmp_path):
    manifest = tokenized(tokenizer, job(write(tmp_path / "in")), tmp_path / "codes")
    images = {image.name.rpartition(":")[2]: image for image in MixedCache(tmp_path / "codes")}
    assert images["01.png"].texts["txt"].startswith("a caption")
    assert manifest["texts"] == (["json", "txt"] if write is write_folder else ["cls", "txt"])
    skipped = "\n".join(manifest["skipped"])
    assert "03_cut.jpg: image file is truncated" in skipped and "05_junk.png: no image of a known" in skipped
    assert "07_thin.png: 1x5000 pixels" in skipped
    assert ("the rest of the shard is unreadable" in skipped) == (write is write_shards)
    counts = manifest["counts"]
    assert counts["skipped"] == len(unreadable()) + (write is write_shards)
    assert counts["images"] == len(images) == (COUNT if write is write_folder else len(images))
    histogram = Counter(np.concatenate([image.codes.reshape(-1) for image in images.values()]).tolist())
    stored = np.load(tmp_path / "codes" / "histogram.npy")
    assert {code: count for code, count in enumerate(stored) if count} == histogram
    assert counts["num_tokens"] == histogram.total() and counts["used"] == len(histogram)


@pytest.mark.parametrize("at", [0, 1, 2])
def test_killed_twice_and_continued_it_ends_the_same_to_the_byte(
    at, tokenizer, plain_encoder, small_parts, tmp_path, monkeypatch, capsys
):
    where = write_folder(tmp_path / "in")
    tokenized(tokenizer, job(where), tmp_path / "whole")
    original, calls = library.write_part_file, []

    def killed(path, partial, *rest):
        calls.append(path)
        original(path, partial, *rest)
        if len(calls) in (at + 1, at + 2):
            partial.write_bytes(b"half of it")
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(library, "write_part_file", killed)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                tokenized(tokenizer, job(where), tmp_path / "codes")
    assert not (tmp_path / "codes" / "token_cache.json").exists()
    with pytest.raises(UsageError, match="is unfinished: rerun the same tokenize command"):
        MixedCache(tmp_path / "codes")
    capsys.readouterr()
    tokenized(tokenizer, job(where), tmp_path / "codes")
    assert f"continuing: {13 * at // 4} of 13 images are encoded" in capsys.readouterr().out or at == 0
    assert files(tmp_path / "codes") == files(tmp_path / "whole")
    before = files(tmp_path / "whole")
    tokenized(tokenizer, job(where), tmp_path / "whole")
    assert "is complete already" in capsys.readouterr().out and files(tmp_path / "whole") == before


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_processes_write_what_one_does(order, tokenizer, plain_encoder, small_parts, tmp_path):
    where = write_folder(tmp_path / "in")
    tokenized(tokenizer, job(where), tmp_path / "whole")
    assert tokenized(tokenizer, job(where), tmp_path / "codes", order[0], 2) is None
    numbers = {int(path.name[:5]) % 2 for path in tmp_path.glob("codes/images/*.array_record")}
    assert numbers == {order[0]}
    assert tokenized(tokenizer, job(where), tmp_path / "codes", order[1], 2) is not None
    assert files(tmp_path / "codes") == files(tmp_path / "whole")
    with pytest.raises(UsageError, match="--overwrite is for one process, not 2"):
        tokenized(tokenizer, job(where), tmp_path / "codes", 0, 2, overwrite=True)


def test_other_images_bounds_or_weights_do_not_continue_a_cache(tokenizer, plain_encoder, tmp_path):
    where = write_folder(tmp_path / "in")
    tokenized(tokenizer, job(where), tmp_path / "codes")
    with pytest.raises(UsageError, match=r"preprocessing.max_pixels: the cache has 400, this command asks for 500"):
        tokenized(tokenizer, job(where, max_pixels=500), tmp_path / "codes")
    (tmp_path / "in" / "new.png").write_bytes(readable()["00.png"])
    with pytest.raises(UsageError, match=r"images\.names"):
        tokenized(tokenizer, job(where), tmp_path / "codes")
    manifest = tokenized(tokenizer, job(where), tmp_path / "codes", overwrite=True)
    assert manifest["counts"]["images"] == COUNT + 1
    assert set(files(tmp_path / "codes")) == {
        *("token_cache.json", "settings.json", "shapes.json", "histogram.npy", "survey/00000-of-00001.json"),
        *("images/00000-of-00001.array_record", "images/00000-of-00001.json"),
    }


def test_what_needs_one_grid_refuses_it_in_one_line(tokenizer, plain_encoder, tmp_path):
    tokenized(tokenizer, job(write_folder(tmp_path / "in")), tmp_path / "codes")
    assert is_mixed(tmp_path / "codes")
    with pytest.raises(UsageError, match=r"holds images of mixed sizes; this needs codes of one grid[^\n]*$"):
        open_token_cache(tmp_path / "codes", "train")


def test_no_image_that_can_be_encoded_is_one_line(tokenizer, plain_encoder, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(b"junk")
    with pytest.raises(UsageError, match="none of the images states a size"):
        tokenized(tokenizer, job(str(tmp_path / "in")), tmp_path / "codes")
    (tmp_path / "in" / "a.png").write_bytes(readable()["00.png"][:60])
    with pytest.raises(UsageError, match=r"none of 1 images can be encoded, the first a\.png: "):
        tokenized(tokenizer, job(str(tmp_path / "in")), tmp_path / "other")


@pytest.mark.parametrize("field", ["num_threads", "max_shapes", "batch_tokens"])
def test_numbers_below_one_are_refused(field, tokenizer, tmp_path):
    with pytest.raises(UsageError, match=rf"{field}=0.*at least 1"):
        tokenized(tokenizer, job(write_folder(tmp_path / "in"), **{field: 0}), tmp_path / "codes")


@pytest.mark.parametrize(
    ("devices", "tokens", "size"), [(1, 64, 1), (1, 63, 1), (1, 640, 10), (8, 640, 8), (8, 1088, 16)]
)
def test_a_batch_is_within_the_budget_and_a_multiple_of_the_devices(devices, tokens, size):
    assert library.ShapedBatches(lambda pixels: pixels, tokens, devices).size((8, 8)) == size


def test_the_number_of_programs_is_that_of_the_shapes(tokenizer, photographs, tmp_path, monkeypatch):
    """All batches of a shape have one size, the last one too."""
    seen = set()

    def encode(pixels):
        seen.add(pixels.shape)
        return brightness_codes(pixels)

    monkeypatch.setattr(library, "_encoder", lambda *_: encode)
    manifest = tokenized(tokenizer, job(str(photographs), batch_tokens=700), tmp_path / "codes")
    assert len(seen) == len(manifest["shapes"]) == 2
    assert all(len(jax.local_devices()) <= shape[0] for shape in seen)
    assert json.loads((tmp_path / "codes" / "shapes.json").read_text())["shapes"] == manifest["shapes"]


def test_without_a_terminal_lines_say_the_rate_and_the_time_left(monkeypatch, capsys):
    clock = iter(range(0, 10_000, 10))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(clock)))
    with progress.Progress(total=1000, done=400) as shown:
        for _ in range(7):
            shown.add(5, 300)
    assert capsys.readouterr().out.splitlines() == [
        "420 of 1,000 images, 0.5 images/s, 30 tokens/s, 0:19:20 left",
        "435 of 1,000 images, 0.5 images/s, 30 tokens/s, 0:18:50 left",
    ]
