"""The prepare command: from files to a data set that the pipeline reads, and every way in which files can be wrong."""

import fcntl
import json
import os
import re
import shutil

import pytest
import tensorflow_datasets as tfds
from support.image_files import fake_imagenet, noise_file, write_tar

from ibq_jax.base.errors import UsageError
from ibq_jax.commands import prepare
from ibq_jax.data import store
from ibq_jax.data.pipeline import evaluation_batches, open_split
from ibq_jax.data.preprocess import decode_image


def jpeg(seed: int) -> bytes:
    return noise_file(seed, 40, 40, "JPEG")


@pytest.fixture
def photos(tmp_path):
    """A folder with two classes of ten images; one is cut off, one is text, and one more is a dangling link."""
    for label, name in enumerate(("cat", "dog")):
        (tmp_path / "My Photos" / name).mkdir(parents=True)
        for i in range(10):
            (tmp_path / "My Photos" / name / f"{i}.jpg").write_bytes(jpeg(10 * label + i))
    folder = tmp_path / "My Photos"
    (folder / "cat" / "3.jpg").write_bytes(jpeg(3)[:500])
    (folder / "dog" / "5.jpg").write_text("not found")
    (folder / "dog" / "gone.jpg").symlink_to("nowhere.jpg")
    return folder


def run(*argv: str, data_dir) -> None:
    prepare.main([*argv, f"--data_dir={data_dir}"])


def test_a_folder_becomes_a_data_set(photos, tmp_path, capsys):
    run("folder", f"--in={photos}", "--validation=0.2", data_dir=tmp_path / "data")
    out, err = capsys.readouterr()
    for skipped in ("cat/3.jpg: ", "dog/5.jpg: no image of a known format", "dog/gone.jpg: [Errno 2]"):
        assert f"skipped {skipped}" in err
    assert "3 unreadable, skipped" in out
    assert f"wrote {tmp_path}/data/my_photos/1.0.0" in out
    assert "--config.data.name=my_photos" in out.splitlines()[-1]

    train, validation = (open_split("my_photos", tmp_path / "data", split) for split in ("train", "validation"))
    assert train.class_names == ("cat", "dog")
    assert len(train) + len(validation) == 18
    assert re.search(rf"train: {len(train)} images \(\d cat, \d dog\)", out)
    stored = {record["image"]: record["label"] for source in (train, validation) for record in source}
    assert stored == {jpeg(i): i // 10 for i in range(20) if i not in (3, 15)}  # byte for byte
    metadata = json.loads((tmp_path / "data/my_photos/1.0.0/metadata.json").read_text())
    assert [line.split(":")[0] for line in metadata["skipped"]] == ["cat/3.jpg", "dog/5.jpg", "dog/gone.jpg"]


@pytest.mark.parametrize(("size", "preset"), [(16, "openmoji64"), (32, "openmoji32")])
def test_openmoji_end_to_end(size, preset, tmp_path, capsys):
    run("openmoji", f"--size={size}", data_dir=tmp_path)
    out = capsys.readouterr().out
    assert "train: 1,709 images (77 Activities," in out
    assert "validation: 189 images (8 Activities," in out
    assert "OpenMoji" in out and "CC BY-SA 4.0" in out
    assert out.splitlines()[-1].startswith(f"next: python -m ibq_jax train --config=configs/tokenizer.py:{preset} ")
    batches = evaluation_batches(
        open_split("openmoji", tmp_path, "validation"), image_size=16, resize=16, batch_size=64
    )
    assert sum(batch["mask"].sum() for batch in batches) == 189


def test_photographs_end_to_end(tmp_path, capsys):
    run("photos", "--size=32", "--windows=2", data_dir=tmp_path)
    out = capsys.readouterr().out
    assert "train: 12 images (2 astronaut, 2 galaxies, 2 motorcycle, 2 retina, 2 rocket, 2 tissue)" in out
    assert "validation: 4 images of none of the classes" in out
    assert "NASA, public domain" in out and "Stefan van der Walt, CC0" in out
    assert "--config=configs/tokenizer.py:photos32 --config.data.dir=" in out.splitlines()[-1]
    train, validation = (open_split("photos32", tmp_path, split) for split in ("train", "validation"))
    assert sorted(record["label"] for record in train) == sorted([*range(6)] * 2)
    assert [record["label"] for record in validation] == [-1] * 4
    assert decode_image(train[0]["image"]).shape == (32, 32, 3)
    metadata = json.loads((tmp_path / "photos32/1.0.0/dataset_info.json").read_text())
    assert "coffee: Rachel Michetti, CC0" in metadata["redistributionInfo"]["license"]


def test_windows_of_a_folder(photos, tmp_path, capsys):
    run("folder", f"--in={photos}", "--windows=3", "--size=16", "--validation=0.2", data_dir=tmp_path)
    err = capsys.readouterr().err
    train, validation = (open_split("my_photos", tmp_path, split) for split in ("train", "validation"))
    assert len(train) + len(validation) == 3 * 18
    assert err.count("skipped cat/3.jpg: ") == 1  # not once per window
    stored = [record["image"] for source in (train, validation) for record in source]
    assert {decode_image(image).shape for image in stored} == {(16, 16, 3)}
    run("folder", f"--in={photos}", "--windows=3", "--size=16", "--validation=0.2", "--name=again", data_dir=tmp_path)
    assert [record["image"] for record in open_split("again", tmp_path, "train")] == stored[: len(train)]
    with pytest.raises(UsageError, match="was made with size=16, not size=32"):
        run("folder", f"--in={photos}", "--windows=3", "--size=32", "--validation=0.2", data_dir=tmp_path)


def test_tar_shards_end_to_end(tmp_path, capsys):
    for shard in range(2):
        samples = [
            (f"{i}.{suffix}", content)
            for i in range(5)
            for suffix, content in (("jpg", jpeg(i)), ("cls", b"%d" % (i % 2)))
        ]
        write_tar(tmp_path / f"s-{shard}.tar", samples)
    run("tar", f"--in={tmp_path}/s-*.tar", "--name=shards", "--validation=0", data_dir=tmp_path)
    assert "train: 10 images (6 0, 4 1)" in capsys.readouterr().out
    source = open_split("shards", tmp_path, "train")
    assert [record["label"] for record in source] == [0, 1, 0, 1, 0] * 2


def test_imagenet_is_laid_out_as_tfds_does(tmp_path, capsys):
    run("imagenet", f"--tars={fake_imagenet(tmp_path)}", data_dir=tmp_path / "data")
    out = capsys.readouterr().out
    assert "warning: ImageNet 2012 has 1,281,167 there; results will not be comparable with published numbers" in out
    assert "train: 4 images of 1,000 classes, 0 to 2 each" in out
    builder = tfds.builder("imagenet2012", data_dir=tmp_path / "data")
    records = builder.as_data_source("train", decoders={"image": tfds.decode.SkipDecoding()})
    assert [(record["file_name"], record["label"]) for record in records] == [
        (b"n01443537_0.JPEG", 1),
        (b"n01443537_1.JPEG", 1),
        (b"n01440764_0.JPEG", 0),
        (b"n01440764_1.JPEG", 0),
    ]
    assert len(open_split("imagenet2012", tmp_path / "data", "validation")) == 3


def test_what_is_there_already_is_left_alone(photos, tmp_path, capsys):
    run("folder", f"--in={photos}", "--name=x", data_dir=tmp_path)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "x").rglob("*")}
    capsys.readouterr()
    run("folder", f"--in={photos}", "--name=x", data_dir=tmp_path)
    assert "there already" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "x").rglob("*")} == before


def test_other_settings_need_a_decision(photos, tmp_path):
    run("folder", f"--in={photos}", "--name=x", data_dir=tmp_path)
    other = ("folder", f"--in={photos}", "--name=x", "--validation=0.5")
    with pytest.raises(UsageError, match=r"was made with validation=0.05, not validation=0.5: pass --overwrite"):
        run(*other, data_dir=tmp_path)
    run(*other, "--overwrite", data_dir=tmp_path)
    assert len(open_split("x", tmp_path, "validation")) > 5


def test_nothing_readable_leaves_nothing(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_text("text")
    with pytest.raises(UsageError, match=r"x: 1 images found and none can be read, the first a.png: no image"):
        run("folder", f"--in={tmp_path}/in", "--name=x", data_dir=tmp_path / "data")
    assert not list((tmp_path / "data").rglob("*.*"))
    with pytest.raises(UsageError, match="no data set 'x'"):
        open_split("x", tmp_path / "data", "train")


def test_a_failed_overwrite_keeps_what_was_there(photos, tmp_path):
    run("folder", f"--in={photos}", "--name=x", data_dir=tmp_path)
    shutil.rmtree(photos / "cat")
    shutil.rmtree(photos / "dog")
    (photos / "a.png").write_text("text")
    with pytest.raises(UsageError, match="none can be read"):
        run("folder", f"--in={photos}", "--name=x", "--overwrite", data_dir=tmp_path)
    assert open_split("x", tmp_path, "train").class_names == ("cat", "dog")


def test_a_killed_run_leaves_nothing_that_looks_finished(photos, tmp_path):
    command = ("folder", f"--in={photos}", "--name=x")
    run(*command, data_dir=tmp_path)
    (tmp_path / "x/1.0.0").rename(tmp_path / "x/1.0.0.incomplete")  # what SIGKILL leaves, at its most complete
    with pytest.raises(UsageError, match="no data set 'x'"):
        open_split("x", tmp_path, "train")
    run(*command, data_dir=tmp_path)
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["1.0.0"]


def test_two_runs_do_not_write_one_data_set(photos, tmp_path):
    unfinished = tmp_path / "x" / "1.0.0.incomplete"
    unfinished.mkdir(parents=True)
    other = os.open(unfinished, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    with pytest.raises(UsageError, match="being written by another process"):
        run("folder", f"--in={photos}", "--name=x", data_dir=tmp_path)
    os.close(other)


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        RuntimeError("write() failed: No space left on device; writing x; at byte 2076672"),  # as ArrayRecord says it
    ],
)
def test_a_full_disk_is_said_so(photos, tmp_path, monkeypatch, error):
    def fail(self):
        raise error

    monkeypatch.setattr(tfds.core.SequentialWriter, "close_all", fail)
    with pytest.raises(UsageError, match=r"x/1.0.0: the disk is full; nothing was kept"):
        run("folder", f"--in={photos}", "--name=x", data_dir=tmp_path)
    assert not list((tmp_path / "x").iterdir())


def test_oversized_files_are_skipped(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(store, "MAX_ENCODED_BYTES", 2**20)
    (photos / "cat" / "huge.jpg").write_bytes(jpeg(0) + bytes(2**20))
    run("folder", f"--in={photos}", data_dir=tmp_path)
    assert "skipped cat/huge.jpg: larger than 1 MiB" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "arguments are required: SOURCE"),
        (["cifar"], "invalid choice: 'cifar'"),
        (["openmoji", "--sise=64"], "unrecognized arguments: --sise=64"),
        (["openmoji", "--size=big"], "argument --size: invalid int value: 'big'"),
        (["folder"], "arguments are required: --in"),
        (["photos", "--size=4"], "--size=4: windows have 8 to 1024 pixels per side"),
        (["photos", "--windows=0"], "argument --windows: '0' is not an integer of at least 1"),
        (["folder", "--in=.", "--size=64", "--name=x"], "--size and --seed are of windows: they go with --windows=N"),
        (["folder", "--in=/nowhere", "--validation=1"], "'1' is not a fraction"),
        (["folder", "--in=/nowhere", "--validation=some"], "'some' is not a fraction"),
        (["folder", "--in=/nowhere"], "/nowhere is not a folder"),
        (["folder", "--in=/"], "/ does not give a data set's name: choose one with --name=NAME"),
        (["tar", "--in=*.tar"], "arguments are required: --name"),
        (["tar", "--in=*.tar", "--name=A-b"], "'A-b' is not a data set's name"),
        (["imagenet", "--tars=/nowhere"], "lacks ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar"),
    ],
)
def test_wrong_use_is_one_line(argv, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=f"^[^\n]*{re.escape(message)}[^\n]*$"):
        prepare.main(argv)
    assert not list(tmp_path.iterdir())


def test_flags_may_have_dashes(photos, tmp_path):
    prepare.main(["folder", "--in", str(photos), f"--data-dir={tmp_path}/some-where"])
    assert open_split("my_photos", tmp_path / "some-where", "train").num_classes == 2


def test_help_is_no_error(capsys):
    with pytest.raises(SystemExit) as stopped:
        prepare.main(["folder", "--help"])
    assert stopped.value.code == 0
    assert "--validation FRACTION" in capsys.readouterr().out
