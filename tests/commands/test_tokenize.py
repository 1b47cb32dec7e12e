"""The tokenize command: what a token cache holds, of any tokenizer, at any precision, on any devices."""

import functools
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from PIL import Image
from support import released
from support.small_runs import arguments
from support.tokenizing import SIDE, SPLITS, command, encoded, expected_codes, noisy, stored_codes

from ibq_jax import Tokenizer
from ibq_jax.__main__ import main
from ibq_jax.base.precision import PRECISIONS
from ibq_jax.base.saved_run import SavedRun
from ibq_jax.base.sharding import make_mesh
from ibq_jax.commands import tokenize
from ibq_jax.data import store
from ibq_jax.data.pipeline import open_split
from ibq_jax.data.preprocess import decode_image, resize_shorter_side, views
from ibq_jax.data.token_cache import open_token_cache, read_manifest, record_type
from ibq_jax.evaluate.check_cache import check_token_cache
from ibq_jax.tokenizer import tokenize as library
from ibq_jax.tokenizer.restore import restore_run
from ibq_jax.tokenizer.tokenize import TokenizeJob, encode_crops, fingerprint

pytestmark = pytest.mark.slow


@pytest.fixture
def data_dir(pictures):
    return pictures


@pytest.fixture
def run(tokenizer):
    """The tokenizer's run."""
    return tokenizer


@pytest.fixture
def whole(whole_cache):
    return whole_cache


def test_a_cache_holds_the_codes_that_the_tokenizer_gives(run, data_dir, tmp_path, capsys):
    out = tmp_path / "codes"
    assert main(command(run, out)) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == f"{out}/ holds the codes of openmoji by {run}, step 7, ema weights"
    assert printed[1].startswith("  train: 100 images (centre, flip), 12,800 tokens; ")
    assert " of 64 codes used, " in printed[1]
    assert printed[2].startswith("  validation: 20 images (centre), 1,280 tokens; ") and printed[2].endswith(" nats")
    train = f"train --config=configs/autoregressive.py:openmoji32 --config.token_cache={out} --workdir=runs/ar"
    assert printed[3:] == [
        "  0 of 4,096 sampled codes differ from full float32",
        f"look at {out}/decoded.png: stored crops, each above what its codes decode to",
        f"next: python -m ibq_jax {train}",
    ]

    for split, names, size in (("train", ("centre", "flip"), 100), ("validation", ("centre",), 20)):
        source, cached = open_split("openmoji", data_dir, f"{split}[:{size}]"), open_token_cache(out, split)
        assert (len(cached), cached.codebook_size, cached.grid, cached.views) == (size, 64, (8, 8), names)
        assert cached.class_names == source.class_names
        assert [image["label"] for image in cached] == [record["label"] for record in source]
        assert [image["index"] for image in cached] == list(range(size))
        codes = stored_codes(out, split)
        np.testing.assert_array_equal(codes, expected_codes(run, source, names))
        assert codes.dtype == np.uint8 and len({image.tobytes() for image in codes[:, 0]}) > 0.9 * size


def test_the_manifest_describes_the_codes(whole, run, data_dir):
    manifest = open_token_cache(whole, "train").manifest
    tokenizer = Tokenizer.load(run)
    assert manifest["tokenizer"].pop("config")["codebook"]["size"] == 64
    assert manifest["tokenizer"] == {
        "fingerprint": fingerprint(tokenizer.model, tokenizer.params),
        "path": str(run),
        "step": 7,
        "weights": "ema",
    }
    assert manifest["data"]["name"] == "openmoji" and manifest["data"]["dir"] == str(data_dir)
    assert manifest["data"]["splits"]["train"] == {
        "source": "train[:100]",
        "images": 100,
        "views": ["centre", "flip"],
        "crops": 2,
        "shards": 8,
    }
    assert manifest["preprocessing"] == {"image_size": 16, "resize": 16, "antialias": True}
    assert [manifest[name] for name in ("precision", "codebook_size", "grid", "dtype")] == [
        "float32",
        64,
        [8, 8],
        "uint8",
    ]
    assert manifest["machine"] == {"platform": "cpu", "device_kind": "cpu"}
    assert manifest["compared_with_float32"] == {"sampled_codes": 64 * 8 * 8, "differing_codes": 0}
    source = open_split("openmoji", data_dir, "train[:100]")
    labels = np.bincount([record["label"] for record in source], minlength=source.num_classes)
    assert manifest["splits"]["train"]["labels"] == labels.tolist()


def test_ten_crops_of_larger_images_and_other_weights(run, data_dir, tmp_path):
    flags = ("--views=ten_crop", "--resize=20", "--splits=train[:9],validation[:3]", "--weights=raw")
    assert main(command(run, tmp_path / "codes", *flags, "--threads=1")) == 0
    codes = stored_codes(tmp_path / "codes", "train")
    source = open_split("openmoji", data_dir, "train[:9]")
    assert codes.shape == (9, 10, 8, 8)
    np.testing.assert_array_equal(codes, expected_codes(run, source, ("ten_crop",), resize=20, use_ema=False))
    assert open_token_cache(tmp_path / "codes", "train").manifest["tokenizer"]["weights"] == "raw"
    assert stored_codes(tmp_path / "codes", "validation").shape == (3, 1, 8, 8)


def test_a_complete_cache_is_left_alone(whole, run, capsys):
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    assert main(command(run, whole)) == 0
    assert f"{whole} is complete already; --overwrite makes it again" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before


def sampled_crops(data_dir: Path) -> np.ndarray:
    """Returns the first crops of 64 of the 100 training images, spread evenly: uint8 [64, S, S, 3]."""
    source = open_split("openmoji", data_dir, "train[:100]")
    records = [source[number * 100 // 64] for number in range(64)]
    return np.concatenate([views(decode_resized(record), ("centre",), SIDE) for record in records])


def decode_resized(record) -> np.ndarray:
    return resize_shorter_side(decode_image(record["image"]), SIDE)


def test_the_share_of_codes_that_differ_from_float32_is_counted(whole, run, data_dir, tmp_path, capsys):
    out = tmp_path / "codes"
    assert main(command(run, out, SPLITS, "--precision=bfloat16")) == 0
    crops = sampled_crops(data_dir)
    low, full = (encoded(Tokenizer.load(run, precision=name), crops) for name in ("bfloat16", "float32"))
    stored = np.stack([open_token_cache(out, "train")[number * 100 // 64]["codes"][0] for number in range(64)])
    differing = int((stored != full).sum())
    assert 0 < differing < 0.2 * full.size
    # In bfloat16 XLA rounds in other places for batches of another shape. Codes of other weights differ nearly all.
    assert (stored != low).sum() < 0.05 * full.size
    manifest = read_manifest(out)
    assert manifest["precision"] == "bfloat16"
    assert manifest["compared_with_float32"] == {"sampled_codes": full.size, "differing_codes": differing}
    assert manifest["tokenizer"]["fingerprint"] != read_manifest(whole)["tokenizer"]["fingerprint"]
    share = f"{differing} of 4,096 sampled codes ({100 * differing / full.size:.2f}%) differ from full float32"
    assert f"  {share}; --precision=float32 gives none\n" in capsys.readouterr().out


def test_what_no_flag_says_is_as_in_the_config(run, tmp_path):
    config, chosen = SavedRun.find(run).config, []
    config.encode.precision = "tf32"
    for flags in ((), ("--precision=float32", "--batch-size=16")):
        job = tokenize._job(tokenize.parser().parse_args(command(run, tmp_path, SPLITS, *flags)[1:]), config)
        chosen.append((job.precision, job.batch_size))
    assert chosen == [("tf32", 8), ("float32", 16)]


def job_and_tokenizer(run: Path, data_dir: Path):
    """Returns (a job of the images and crops of `whole`, the tokenizer's model, its parameters)."""
    trainer, restored = restore_run(run)
    sources = {"train": open_split("openmoji", data_dir, "train[:100]")}
    names = {"train": ("centre", "flip")}
    job = TokenizeJob(sources, names, SIDE, SIDE, batch_size=8, num_threads=1, precision="float32")
    return job, trainer.model, restored.state.weights("ema")


def change_code(folder: Path, image: int) -> None:
    """Changes the first code of one training image of the first shard."""
    [shard] = folder.glob("train/00000-of-*")
    cached = open_token_cache(folder, "train")
    dtype = record_type("train", cached.manifest)
    records = np.zeros(100 // 8, dtype)
    for record, stored in zip(records, cached, strict=False):
        record["index"], record["label"], record["codes"] = (stored[name] for name in ("index", "label", "codes"))
    records["codes"][image, 0, 0, 0] = (records["codes"][image, 0, 0, 0] + 1) % 64
    library.write_records(shard, records)


def test_the_sheet_shows_stored_crops_above_what_their_codes_decode_to(whole, run, data_dir, tmp_path):
    """So a wrong code is seen, and counted."""
    with Image.open(whole / "decoded.png") as image:
        sheet = np.asarray(image)
    side, gap, factor = 64, 4, 64 // SIDE
    margin = sheet.shape[1] - 8 * (side + gap)
    assert sheet.shape[0] == 4 * (side + gap) + gap  # 2 rows of 8 originals, 2 of 8 decoded
    rows = sheet[gap:].reshape(4, side + gap, *sheet.shape[1:])[:, :side:factor, margin:]
    shown = rows.reshape(4, SIDE, 8, side + gap, 3).swapaxes(1, 2)[:, :, :, :side:factor]  # [4, 8, S, S, 3]
    crops = sampled_crops(data_dir)[::4]
    np.testing.assert_array_equal(shown[[0, 2]].reshape(crops.shape), crops)
    tokenizer = Tokenizer.load(run)
    decoded = np.round((np.clip(tokenizer.decode(tokenizer.encode(crops)), -1, 1) + 1) * 127.5)
    assert np.abs(shown[[1, 3]].reshape(crops.shape) - decoded).max() <= 1

    shutil.copytree(whole, tmp_path / "wrong")
    change_code(tmp_path / "wrong", image=0)
    job, model, params = job_and_tokenizer(run, data_dir)
    settings = json.loads((whole / "settings.json").read_text())
    found = check_token_cache(tmp_path / "wrong", settings, model, params, job)
    assert found == {"compared_with_float32": {"sampled_codes": 4_096, "differing_codes": 1}}
    with Image.open(tmp_path / "wrong" / "decoded.png") as image:
        changed = (np.asarray(image) != sheet).any(axis=(1, 2))
    assert changed.any() and not changed[: side + gap].any() and not changed[2 * (side + gap) :].any()


@pytest.mark.usefixtures("optimized")  # what LLVM does to the sums is part of the promise
@pytest.mark.parametrize("count", [1, 5, 16])
def test_an_images_codes_are_the_same_alone_and_in_any_batch_place_and_number_of_devices(count, run, data_dir):
    jax.clear_caches()  # of programs that other tests compiled with few optimizations
    _, model, params = job_and_tokenizer(run, data_dir)
    model, params = model.for_encoding("float32"), jax.device_get(params)
    crops = sampled_crops(data_dir)[:16]
    mesh = make_mesh({"data": -1}, jax.devices())
    on_all_devices = library._encoder(model.clone(mesh=mesh), params, mesh)
    expected = np.asarray(on_all_devices(crops))
    np.testing.assert_array_equal(np.asarray(on_all_devices(crops[::-1]))[::-1], expected)
    encode = jax.jit(functools.partial(encode_crops, model.clone(mesh=None)))
    for first in range(0, 16, 3):
        chosen = np.arange(first, first + count) % 16
        np.testing.assert_array_equal(encode(params, crops[chosen]), expected[chosen])
    neighbours = np.random.default_rng(0).integers(0, 256, (count, SIDE, SIDE, 3), np.uint8)
    for place in range(count):
        batch = np.concatenate([neighbours[:place], crops[:1], neighbours[place + 1 :]])
        np.testing.assert_array_equal(encode(params, batch)[place], expected[0])


@pytest.mark.long  # tests of reports and of other quantizers tokenize what they trained
def test_a_trained_run_is_tokenized(data_dir, tmp_path):
    run, out = tmp_path / "tok", tmp_path / "codes"
    assert main(arguments(run, data_dir, "train.steps=1")) == 0
    assert main(command(run, out)) == 0
    source = open_split("openmoji", data_dir, "train[:100]")
    np.testing.assert_array_equal(stored_codes(out, "train"), expected_codes(run, source, ("centre", "flip")))


def test_one_device_gives_the_codes_of_eight(whole, run, tmp_path, monkeypatch):
    [first, *_] = jax.devices()
    monkeypatch.setattr(jax, "local_devices", lambda: [first])
    assert main(command(run, tmp_path / "codes")) == 0
    for split in ("train", "validation"):
        np.testing.assert_array_equal(stored_codes(tmp_path / "codes", split), stored_codes(whole, split))


def test_a_moved_run_is_the_same_tokenizer_and_the_flags_earlier_name_works(whole, run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "moved")
    assert main(["tokenize", f"--tokenizer={tmp_path}/moved", f"--out={whole}", SPLITS]) == 0
    assert "is complete already" in capsys.readouterr().out


def test_a_fingerprint_is_of_the_weights_and_the_architecture_alone(run, data_dir, tmp_path):
    tokenizer = Tokenizer.load(run)
    model, params = tokenizer.model, tokenizer.params
    print_ = fingerprint(model, params)
    assert len(print_) == 64
    assert fingerprint(model.for_encoding("float32"), params) == print_
    precisions = {fingerprint(model.for_encoding(name), params) for name in PRECISIONS}
    assert len(precisions) == len(PRECISIONS) and print_ in precisions
    mesh = make_mesh({"codebook": 8})
    sharded = jax.tree.map(np.asarray, params)
    sharded["quantize"]["codebook"] = jax.device_put(
        params["quantize"]["codebook"], NamedSharding(mesh, PartitionSpec("codebook"))
    )
    settings = model.quantizer_settings.copy({"block_size": 8, "beta": 0.5})
    assert fingerprint(model.clone(mesh=mesh, remat="blocks", quantizer_settings=settings), sharded) == print_
    raw = Tokenizer.load(run, use_ema=False)
    other_bias = jax.tree.map(np.array, params)
    other_bias["quant_conv"]["bias"][0] += 1e-6
    others = [
        fingerprint(raw.model, raw.params),
        fingerprint(model, other_bias),
        fingerprint(model.clone(dtype=jnp.bfloat16), params),
        fingerprint(model.clone(resolution=32), params),
    ]
    assert len({print_, *others}) == 5


def test_an_imported_tokenizer_tokenizes_too(data_dir, tmp_path):
    state_dict, config, _ = released.tokenizer()
    tokenizer = Tokenizer.from_torch(state_dict, config)
    again = Tokenizer.from_torch(tokenizer.to_torch(), config)
    assert fingerprint(again.model, again.params) == fingerprint(tokenizer.model, tokenizer.params)
    sources = {split: open_split("openmoji", data_dir, f"{split}[:10]") for split in ("train", "validation")}
    names = {"train": ("flip",), "validation": ("centre",)}
    job = TokenizeJob(sources, names, image_size=SIDE, resize=SIDE, batch_size=8, num_threads=1, precision="float32")
    origin = {"path": "tokenizer.ckpt", "step": 0, "weights": "raw", "config": config}
    where = dict(check=lambda folder, settings: {}, overwrite=False, process_index=0, process_count=1)
    manifest = library.tokenize(tokenizer.model, tokenizer.params, job, tmp_path / "codes", origin, **where)
    assert manifest["tokenizer"]["config"] == config
    crops = [resize_shorter_side(decode_image(record["image"]), SIDE)[:, ::-1] for record in sources["train"]]
    np.testing.assert_array_equal(stored_codes(tmp_path / "codes", "train")[:, 0], tokenizer.encode(np.stack(crops)))


def test_images_without_classes_are_labelled_minus_one(run, tmp_path):
    store.write_dataset(noisy("plain", (), broken=None), tmp_path, {})
    assert main(command(run, tmp_path / "codes", "--data=plain", f"--data-dir={tmp_path}", "--views=centre")) == 0
    source = open_token_cache(tmp_path / "codes", "train")
    assert source.num_classes == 0 and {image["label"] for image in source} == {-1}
