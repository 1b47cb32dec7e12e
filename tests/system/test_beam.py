"""prepare --beam: the records and order of prepare without Beam, despite kills; every error is one line.

Most of it needs apache-beam, in an environment of its own: VENV=.venv-beam bash launch/setup.sh pytest beam.
"""

import importlib.util
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.image_files import fake_imagenet, noise_file, write_tar

from ibq_jax.__main__ import main
from ibq_jax.base.errors import Failed, UsageError
from ibq_jax.commands import prepare
from ibq_jax.data import beam_dataset, store
from ibq_jax.data.beam_map import beam_map, find_beam
from ibq_jax.data.pipeline import open_split, training_batches
from ibq_jax.data.sources import Example, ImageCollection

HAS_BEAM = importlib.util.find_spec("apache_beam") is not None
needs_beam = pytest.mark.skipif(not HAS_BEAM, reason="apache-beam is not installed")
# Quicker than processes, which one test has.
IN_THREADS = "--beam_options=--direct_num_workers=2 --direct_running_mode=multi_threading"


def write_shards(folder: Path, shards: int, images: int, side: int = 24) -> Path:
    """Writes tar shards with named classes; an image of shard 2 and the second half of shard 3 are cut off."""
    folder.mkdir()
    for shard in range(shards):
        members = []
        for i in range(images):
            content = noise_file(1000 * shard + i, side, side, "JPEG")
            content = content[:300] if (shard, i) == (2, 1) else content
            members += [(f"{i:04}.jpg", content), (f"{i:04}.cls", f"kind {(shard + i) % 3}".encode())]
        path = write_tar(folder / f"s-{shard:02}.tar", members)
        if shard == 3:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return folder


def flags(folder: Path, data_dir: Path, *more: str) -> list[str]:
    return ["tar", f"--in={folder}/*.tar", "--name=web", f"--data_dir={data_dir}", "--validation=0.2", *more]


def records(name: str, data_dir: Path, split: str) -> list[tuple]:
    """Returns (file name, class, bytes) of each record, in order."""
    source = open_split(name, data_dir, split)
    names = [bytes(record["file_name"]).decode() for record in source._records]
    return [
        (file_name, source.class_names[record["label"]] if source.class_names else None, record["image"])
        for file_name, record in zip(names, source, strict=True)
    ]


def check_same(name: str, one: Path, other: Path) -> None:
    for split in ("train", "validation"):
        assert records(name, one, split) == records(name, other, split)
    [one], [other] = (list((data_dir / name).iterdir()) for data_dir in (one, other))
    for file in ("features.json", "metadata.json"):  # settings and skipped images included
        assert json.loads((one / file).read_text()) == json.loads((other / file).read_text())


@needs_beam
def test_tar_shards_become_the_local_data_set(tmp_path, capsys):
    shards = write_shards(tmp_path / "in", 5, 8)
    prepare.main(flags(shards, tmp_path / "local"))
    local = capsys.readouterr()
    prepare.main(flags(shards, tmp_path / "beam", "--beam", IN_THREADS))
    beam = capsys.readouterr()
    assert len(records("web", tmp_path / "beam", "train")) > 20
    check_same("web", tmp_path / "local", tmp_path / "beam")
    told = beam.out.replace("/beam", "/local").splitlines()
    assert sorted(told) == sorted(local.out.splitlines())  # the order of the splits may differ
    assert "2 unreadable, skipped" in beam.out
    for skipped in ("skipped s-02.tar:0001.jpg: ", "skipped s-03.tar: the rest of the shard is unreadable"):
        assert skipped in beam.err and skipped in local.err
    one, other = (
        next(training_batches(open_split("web", folder, "train"), image_size=16, resize=20, batch_size=8, seed=3))
        for folder in (tmp_path / "local", tmp_path / "beam")
    )
    assert all((one[key] == other[key]).all() for key in one)


@needs_beam
def test_a_folder_and_imagenet_too(tmp_path, monkeypatch):
    monkeypatch.setattr("ibq_jax.data.folders.IMAGES_PER_PART", 3)
    for i in range(14):
        path = tmp_path / "photos" / f"class {i % 2}" / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(noise_file(i))
    (tmp_path / "photos" / "class 0" / "04.png").write_text("not found")
    command = ["folder", f"--in={tmp_path}/photos", "--validation=0.3"]
    prepare.main([*command, f"--data_dir={tmp_path}/local"])
    prepare.main([*command, f"--data_dir={tmp_path}/beam", "--beam", IN_THREADS])
    check_same("photos", tmp_path / "local", tmp_path / "beam")
    shutil.rmtree(tmp_path / "local")
    shutil.rmtree(tmp_path / "beam")

    monkeypatch.setattr("ibq_jax.data.imagenet.SYNSETS_PER_PART", 1)
    monkeypatch.setattr("ibq_jax.data.imagenet.IMAGES_PER_PART", 2)
    tars = fake_imagenet(tmp_path)
    monkeypatch.setattr(beam_dataset, "MAX_ITEMS", 500)  # so that an item has several parts, and many have no image
    prepare.main(["imagenet", f"--tars={tars}", f"--data_dir={tmp_path}/local"])
    prepare.main(["imagenet", f"--tars={tars}", f"--data_dir={tmp_path}/beam", "--beam", IN_THREADS])
    check_same("imagenet2012", tmp_path / "local", tmp_path / "beam")


@needs_beam
def test_killed_and_started_again_only_the_missing_shards_are_made(tmp_path):
    shards = write_shards(tmp_path / "in", 24, 150, side=160)
    data_dir = tmp_path / "beam"
    command = [sys.executable, "-m", "ibq_jax", "prepare", *flags(shards, data_dir, "--beam")]  # in processes
    results, data = data_dir / "web/beam.incomplete/shards", data_dir / "web/beam.incomplete/data"
    started = time.monotonic()
    running = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True)
    while len(list(results.glob("*.json"))) < 4:
        assert running.poll() is None and time.monotonic() - started < 120
        time.sleep(0.01)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    time.sleep(3)  # workers are process groups of their own: they end when they miss the runner
    done = sorted(path.stem for path in results.glob("*.json"))
    assert 4 <= len(done) < 24
    with pytest.raises(UsageError, match="no data set 'web'"):
        open_split("web", data_dir, "train")
    before = {path.name: path.stat().st_mtime_ns for path in data.glob("*-*.array_record-*") if path.name[-5:] in done}
    assert len(before) == 2 * len(done)
    damaged = f"web-train.array_record-{done[0]}"
    (data / damaged).write_bytes(b"")
    del before[damaged], before[damaged.replace("train", "validation")]

    assert main(["prepare", *flags(shards, data_dir, "--beam", IN_THREADS)]) == 0
    assert [path.name for path in (data_dir / "web").iterdir()] == ["1.0.0"]
    after = {path.name: path.stat().st_mtime_ns for path in (data_dir / "web/1.0.0").iterdir()}
    assert {name: after[name] for name in before} == before
    assert not [name for name in after if "partial" in name]
    prepare.main(flags(shards, tmp_path / "local"))
    check_same("web", tmp_path / "local", data_dir)


@needs_beam
def test_what_has_changed_is_made_again(tmp_path):
    (folder := tmp_path / "results").mkdir()
    inputs = [tmp_path / f"{name}.txt" for name in "abc"]
    for path in inputs:
        path.write_text("1")
    runner = find_beam("DirectRunner", IN_THREADS.partition("=")[2])

    def results(identity: str = "", keep=lambda result: True) -> list:
        return beam_map(_length, inputs, folder=folder, runner=runner, identity=identity, still_whole=keep)

    def times() -> list[int]:
        return [path.stat().st_mtime_ns for path in sorted(folder.iterdir())]

    assert results() == [1, 1, 1]
    first = times()
    assert results() == [1, 1, 1] and times() == first
    inputs[1].write_text("12")
    assert results() == [1, 2, 1]
    assert [a == b for a, b in zip(first, times(), strict=True)] == [True, False, True]
    second = times()
    assert results(keep=lambda result: result == 2) == [1, 2, 1]
    assert [a == b for a, b in zip(second, times(), strict=True)] == [False, True, False]
    third = times()
    assert results("other settings") == [1, 2, 1]
    assert not set(third) & set(times())


def _length(path: Path) -> int:
    return len(path.read_text())


@needs_beam
def test_what_a_worker_cannot_do_is_one_line_and_the_rest_is_kept(tmp_path):
    (folder := tmp_path / "results").mkdir()
    runner = find_beam("DirectRunner", IN_THREADS.partition("=")[2])
    with pytest.raises(
        UsageError, match=r"^on \S+: .*No such file.*/1' \(and 1 others; what could be done was kept\)$"
    ):
        beam_map(_length_of, [f"{tmp_path}/1", f"{tmp_path}/2"], folder=folder, runner=runner)
    (tmp_path / "1").write_text("a")
    with pytest.raises(UsageError, match=r"^on \S+: .*/2'$"):
        beam_map(_length_of, [f"{tmp_path}/1", f"{tmp_path}/2"], folder=folder, runner=runner)
    assert (folder / "00000.json").exists()
    with pytest.raises(
        Failed, match=r"^DirectRunner gave up \([^\n]*; what is whole was kept, the same command continues$"
    ):
        beam_map(_divide, [0], folder=tmp_path / "other", runner=runner)


def _length_of(path: str) -> int:
    return _length(Path(path))


def _divide(number: int) -> float:
    return 1 / number


@needs_beam
def test_a_worker_that_does_not_see_the_input_says_so(tmp_path):
    writer = beam_dataset._ShardWriter(ImageCollection("x", "", tuple), tmp_path)
    with pytest.raises(UsageError, match=r"^the worker \S+ does not see /nowhere/a.tar: it needs it under this path$"):
        writer((0, Path("/nowhere/a.tar")))


@needs_beam
def test_nothing_readable_leaves_no_data_set(tmp_path):
    write_tar(tmp_path / "a.tar", [("1.jpg", b"text")])
    with pytest.raises(UsageError, match=r"^web: 1 images found and none can be read, the first a.tar:1.jpg: no image"):
        prepare.main(flags(tmp_path, tmp_path / "data", "--beam", IN_THREADS))
    with pytest.raises(UsageError, match="no data set 'web'"):
        open_split("web", tmp_path / "data", "train")


@needs_beam
def test_two_runs_do_not_write_one_data_set(tmp_path):
    shards = write_shards(tmp_path / "in", 1, 2)
    with store.locked(tmp_path / "data/web/beam.incomplete"):
        with pytest.raises(UsageError, match="being written by another process"):
            prepare.main(flags(shards, tmp_path / "data", "--beam", IN_THREADS))


@needs_beam
@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--beam=NoRunner"], "--beam=NoRunner: Unexpected pipeline runner: NoRunner. Valid values are DataflowRunner"),
        (["--beam=no.such.Runner"], "--beam=no.such.Runner: No module named 'no'"),
        (["--beam", "--beam_options=--runner=Nothing"], "--beam=Nothing: Unexpected pipeline runner"),
        (["--beam", "--beam_options=--nonsense=3"], "Beam has no option --nonsense"),
        (["--beam", "--beam_options=--direct_num_workers=x"], "argument --direct_num_workers: invalid int value: 'x'"),
        (["--beam", "--beam_options='"], "--beam-options=': No closing quotation"),
        (["--beam=DataflowRunner"], "DataflowRunner gave up (Pipeline has validations errors: Missing GCS path option"),
    ],
)
def test_a_wrong_runner_is_one_line(tmp_path, capsys, more, message):
    shards = write_shards(tmp_path / "in", 1, 2)
    assert main(["prepare", *flags(shards, tmp_path / "data", *more)]) == (1 if "gave up" in message else 2)
    [*_, line] = capsys.readouterr().err.splitlines()
    assert line.startswith("ibq_jax prepare: ") and message in line


def test_options_go_with_beam(tmp_path):
    with pytest.raises(UsageError, match=r"^--beam-options goes with --beam$"):
        prepare.main(flags(tmp_path, tmp_path / "data", "--beam_options=--x=1"))


@pytest.mark.skipif(HAS_BEAM, reason="apache-beam is installed")
def test_without_apache_beam_one_line_says_how_to_get_it(tmp_path, capsys):
    assert main(["prepare", *flags(tmp_path, tmp_path / "data", "--beam")]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("ibq_jax prepare: --beam needs apache-beam, which is not installed here")
    assert "VENV=.venv-beam bash launch/setup.sh beam" in line
    assert not (tmp_path / "data").exists()


def test_parts_are_shared_out_evenly_and_in_order(monkeypatch):
    monkeypatch.setattr(beam_dataset, "MAX_ITEMS", 4)
    items = beam_dataset._items(ImageCollection("x", "", tuple, parts=tuple("abcdefghij")))
    assert [number for number, *_ in items] == [0, 1, 2, 3]
    assert [part for _, *parts in items for part in parts] == list("abcdefghij")
    assert {len(item) - 1 for item in items} == {2, 3}


@pytest.fixture
def few_files():
    """A soft limit of 200 open files while the test runs."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_split_of_many_shards_is_read_where_few_files_are_allowed(tmp_path, monkeypatch, few_files):
    monkeypatch.setattr(store, "EXAMPLES_PER_SHARD", 1)
    image = noise_file(0)
    examples = [Example("train", f"{i}", lambda: image) for i in range(300)]
    store.write_dataset(ImageCollection("many", "", lambda: examples), tmp_path, {})
    source = open_split("many", tmp_path, "train")
    assert sum(record["image"] == image for record in source) == 300
    monkeypatch.setattr(resource, "getrlimit", lambda _: (200, 400))
    with pytest.raises(UsageError, match="split 'train' has 300 shards, and no process may open over 400 files"):
        open_split("many", tmp_path, "train")
