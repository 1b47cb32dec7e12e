"""The tokenize command killed, stopped, shared by processes and started again, on what is there; and used wrongly."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from support.small_runs import ROOT, save_run
from support.tokenizing import SPLITS, command, files, noisy, stored_codes

from ibq_jax.__main__ import main
from ibq_jax.commands import tokenize
from ibq_jax.data import store
from ibq_jax.data.token_cache import read_manifest
from ibq_jax.tokenizer import tokenize as library

pytestmark = pytest.mark.slow

NEW_KEYS = ("machine", "compared_with_float32")  # of a manifest, which caches of earlier versions lack


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


def interrupt(*_) -> None:
    raise KeyboardInterrupt


def one_error(capsys) -> str:
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_a_half_written_cache_is_not_continued_on_another_platform_or_at_another_precision(
    run, tmp_path, monkeypatch, capsys
):
    out, settings_file = tmp_path / "codes", tmp_path / "codes" / "settings.json"
    with monkeypatch.context() as patch:
        patch.setattr(library, "finish", interrupt)
        assert main(command(run, out)) == 130
    before, settings = files(out), json.loads(settings_file.read_text())
    capsys.readouterr()
    assert main(command(run, out, SPLITS, "--precision=bfloat16")) == 2
    assert "precision: the cache has float32, this command asks for bfloat16" in one_error(capsys)
    assert files(out) == before
    settings["machine"] = {"platform": "gpu", "device_kind": "NVIDIA H100"}
    settings_file.write_text(json.dumps(settings))
    assert main(command(run, out)) == 2
    assert "machine.platform: the cache has gpu, this command asks for cpu (--overwrite" in one_error(capsys)
    del settings["machine"]
    settings_file.write_text(json.dumps(settings))
    assert main(command(run, out)) == 2
    assert "was begun by an earlier version, which did not note the machine" in one_error(capsys)
    settings_file.write_bytes(before["settings.json"])
    assert main(command(run, out)) == 0


def test_a_complete_cache_of_an_earlier_version_is_left_alone(whole, run, tmp_path, capsys):
    shutil.copytree(whole, tmp_path / "codes")
    (tmp_path / "codes" / "decoded.png").unlink()
    for name in ("token_cache.json", "settings.json"):
        path = tmp_path / "codes" / name
        fields = json.loads(path.read_text())
        path.write_text(json.dumps({key: fields[key] for key in fields if key not in NEW_KEYS}))
    before = files(tmp_path / "codes")
    assert main(command(run, tmp_path / "codes")) == 0
    printed = capsys.readouterr().out
    assert "is complete already" in printed and "sampled codes" not in printed and "decoded.png" not in printed
    assert files(tmp_path / "codes") == before


@pytest.mark.parametrize("shards", [0, 9])
def test_stopped_while_it_writes_and_started_again_it_ends_the_same_to_the_byte(
    shards, whole, run, tmp_path, monkeypatch, capsys
):
    written = []

    def interrupted(path, records):
        if len(written) == shards:
            path.write_bytes(records.tobytes()[:100])
            raise KeyboardInterrupt
        written.append(records)
        original(path, records)

    original = library.write_records
    with monkeypatch.context() as patch:
        patch.setattr(library, "write_records", interrupted)
        assert main(command(run, tmp_path / "codes")) == 130
    assert not (tmp_path / "codes" / "token_cache.json").exists()
    for partial in tmp_path.rglob("*.partial"):
        partial.write_bytes(b"what a SIGKILL would have left")
    capsys.readouterr()
    assert main(command(run, tmp_path / "codes")) == 0
    images = sum(map(len, written))
    assert (f"continuing: {images} of 120 images are encoded" in capsys.readouterr().out) == (shards > 0)
    assert files(tmp_path / "codes") == files(whole)


def test_killed_and_started_again_it_ends_the_same_to_the_byte(whole, run, tmp_path):
    killed, environment = tmp_path / "killed", os.environ | {"JAX_NUM_CPU_DEVICES": "8"}
    process = subprocess.Popen([sys.executable, "-m", "ibq_jax", *command(run, killed)], cwd=ROOT, env=environment)
    while process.poll() is None and len(list(killed.glob("train/*.array_record"))) < 2:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "token_cache.json").exists()
    assert main(command(run, killed)) == 0
    assert files(killed) == files(whole)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_processes_write_what_one_does(order, whole, run, tmp_path, monkeypatch, capsys):
    out = tmp_path / "codes"
    for index in order:
        process = SimpleNamespace(process_index=lambda index=index: index, process_count=lambda: 2)
        monkeypatch.setattr(tokenize, "jax", process)
        capsys.readouterr()
        assert main(command(run, out)) == 0
        if index == order[0]:
            assert "this process is done; the last process to finish completes" in capsys.readouterr().out
            numbers = {int(path.name[:5]) % 2 for path in out.rglob("*.array_record")}
            assert numbers == {index} and not (out / "token_cache.json").exists()
    assert f"{out}/ holds the codes of openmoji" in capsys.readouterr().out
    assert files(out) == files(whole)
    assert main(command(run, out, SPLITS, "--overwrite")) == 2
    assert "--overwrite is for one process, not 2: remove " in capsys.readouterr().err


def test_a_cache_of_another_tokenizer_needs_a_decision(whole, run, data_dir, tmp_path, capsys):
    out, other = tmp_path / "codes", save_run(tmp_path / "other", data_dir, "codebook.size=512")
    shutil.copytree(whole, out)
    before = files(out)
    assert main(command(other, out, "--views=centre", SPLITS)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--overwrite replaces it" in error
    for words in (
        "tokenizer.fingerprint: the cache has ",
        "codebook_size: the cache has 64, this command asks for 512",
    ):
        assert words in error
    assert "data.splits.train.views: the cache has ('centre', 'flip'), this command asks for ('centre',)" in error
    assert files(out) == before
    other = save_run(tmp_path / "alike", data_dir, "seed=1")  # its programs are compiled
    assert main(command(other, out, "--views=centre", SPLITS, "--overwrite")) == 0
    assert read_manifest(out)["tokenizer"]["path"] == str(other)
    assert stored_codes(out, "train").shape == (100, 1, 8, 8)
    assert main(command(run, out, SPLITS, "--overwrite")) == 0
    assert files(out) == before


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--views=centre,left"], "there is no view 'left'; the views are centre, flip, ten_crop"),
        (["--views=centre,centre"], "--views=centre,centre repeats a crop"),
        (["--views=centre,ten_crop"], "repeats a crop; ten_crop includes the centre and its flip"),
        (
            ["--views=ten_crop"],
            "images resized to 16 pixels leave no room around crops of 16; give --resize=18, or more",
        ),
        (["--views=ten_crop", "--resize=17"], "ten_crop would store equal crops"),
        (["--resize=15"], "resize=15 is smaller than image_size=16: a crop would not fit"),
        (["--resize=0"], "'0' is not an integer of at least 1"),
        (["--batch-size=12"], "--batch-size=12 does not divide over 8 devices; use a multiple of 8"),
        (["--data=photos"], "no data set 'photos' in "),
        (["--data-dir=/nowhere"], "no data set 'openmoji' in /nowhere: make it with "),
        (["--splits=train"], "'train' is not two splits separated by a comma"),
        (["--splits=train,test"], "has no split 'test'; it has train, validation"),
        (["--splits=train[:0],validation"], "has no images in split 'train[:0]'"),
        (["--splits=train[7,validation"], "has no split 'train[7': Unrecognized split format"),
        (["--weights=best"], "invalid choice: 'best'"),
        (["--precision=float16"], "invalid choice: 'float16'"),
        (["--run=nowhere"], "nowhere/config.json does not exist"),
        (["--size=3"], "unrecognized arguments: --size=3"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(flags, words, run, tmp_path, capsys):
    assert main(command(run, tmp_path / "codes", *flags)) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and error.startswith("ibq_jax tokenize: ")
    assert not list(tmp_path.iterdir())


def test_an_out_that_is_something_else_is_left_alone(run, tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("precious")
    for out, words in ((file, "is a file: the token cache needs a folder"), (run, "is not a token cache, it holds ")):
        assert main(command(run, out, SPLITS, "--overwrite")) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1
    assert file.read_text() == "precious" and sorted(os.listdir(run)) == ["checkpoints", "config.json"]


def test_a_run_of_another_stage_is_refused(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "run")
    config = json.loads((run / "config.json").read_text()) | {"stage": "autoregressive"}
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    assert main(command(tmp_path / "run", tmp_path / "codes")) == 2
    assert "is a run of stage 'autoregressive'; this needs a tokenizer" in capsys.readouterr().err
    assert not (tmp_path / "codes").exists()


def test_a_record_that_is_no_image_is_named_and_what_is_whole_is_kept(run, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(store, "decode_image", lambda encoded: None)
        store.write_dataset(noisy("bad", ("a",), broken=17), tmp_path, {})
    capsys.readouterr()
    assert main(command(run, tmp_path / "codes", "--data=bad", f"--data-dir={tmp_path}")) == 2
    error = capsys.readouterr().err
    assert f"data set bad in {tmp_path}, split 'train', record 17 is no image" in error and error.count("\n") == 1
    assert len(list(tmp_path.rglob("*-of-00008.array_record"))) == 4  # records 15 to 18 are the fifth shard
    assert not (tmp_path / "codes" / "token_cache.json").exists()


def test_a_full_disk_is_one_line_and_it_goes_on_when_there_is_room(whole, run, tmp_path, capsys):
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", tmp_path], capture_output=True)
    if mounted.returncode:
        pytest.skip("only root can mount a small disk")
    try:
        assert main(command(run, tmp_path / "codes")) == 2
        error = capsys.readouterr().err
        assert "the disk is full; free room and rerun" in error and error.count("\n") == 1
        subprocess.run(["mount", "-o", "remount,size=20m", tmp_path], check=True)
        assert main(command(run, tmp_path / "codes")) == 0
        assert "continuing: " in capsys.readouterr().out
        assert files(tmp_path / "codes") == files(whole)
    finally:
        subprocess.run(["umount", tmp_path], check=True)
