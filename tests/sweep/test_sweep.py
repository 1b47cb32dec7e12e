"""Sweeps: the points of a grid, the status of each way that a point can end, and the tables of the results."""

import csv
import itertools
import json
import re
import shlex
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from support.jobs import ended, last_step, wait_for_step
from support.small_runs import ROOT, SMALL, STEPS

from ibq_jax.__main__ import main
from ibq_jax.base.config import PREFIX, load_config, save_config
from ibq_jax.base.errors import UsageError
from ibq_jax.sweep.grid import Grid, parse_over, read_study
from ibq_jax.sweep.results import DONE, OUTCOME, read_result

pytestmark = pytest.mark.slow

SPEC = f"{ROOT}/configs/tokenizer.py:openmoji32"

# Stands in for python -m ibq_jax: writes what a run would, and ends as the codebook size selects. Size 4 with seed 1
# waits for a signal; a second signal would find no handler.
TRAIN = """
import json, os, pathlib, signal, sys, time
from ibq_jax.base.config import load_config, save_config
flags = dict(argument.removeprefix("--").split("=", 1) for argument in sys.argv[2:4])
config, workdir = load_config(flags["config"], sys.argv[4:]), pathlib.Path(flags["workdir"])
print("started", flush=True)
size, words = config.codebook.size, "step 1: the codebook has collapsed"
if size == 5:
    sys.exit("ibq_jax train: codebook.size=5 is not allowed")
save_config(config, workdir / "config.json")
row = {"step": size, "validation/psnr": 10.0 * size, "validation/images": 64}
(workdir / "metrics.jsonl").write_text(json.dumps(row) + "\\n")
def save(*_):
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(0.2)
    sys.exit(143)
if size == 4 and config.seed and not (workdir / "ready").exists():
    signal.signal(signal.SIGTERM, save)
    (workdir / "ready").touch()
    time.sleep(60)
if size == 6:
    (workdir / "stopped_step6_process0.json").write_text(json.dumps({"step": 6, "reason": words}))
    sys.exit(f"ibq_jax train: {words}")
if size == 7:
    os.kill(os.getpid(), signal.SIGKILL)
if size == 8:
    raise MemoryError("RESOURCE_EXHAUSTED: no room for 8 codes")
if size == 9:
    print("hosts.sh: what is this?")
    sys.exit(9)
"""


def sweep(workdir: Path, sizes: str, *flags: str) -> list[str]:
    return ["sweep", f"--config={SPEC}", f"--over=codebook.size={sizes}", f"--workdir={workdir}", *flags]


@pytest.fixture
def launcher(tmp_path):
    (tmp_path / "train.py").write_text(TRAIN)
    return f"--launcher={shlex.join([sys.executable, str(tmp_path / 'train.py')])}"


def unpadded(table: str) -> str:
    """Returns a Markdown table without the spaces that align its columns."""
    return re.sub(" +", " ", table).replace("| |", "|  |")


def results(workdir: Path) -> dict[str, dict]:
    return {point["name"]: point for point in json.loads((workdir / "results.json").read_text())["points"]}


# Grids


def test_points_are_a_product_with_readable_names():
    over = parse_over(
        ["codebook.size=256,1024", "model.channel_multipliers=(1,2),(1,2,2)", "optimizer.learning_rate=1e-3"]
    )
    points = Grid(SPEC, over, seeds=2, overrides=(f"{PREFIX}train.steps=5",)).points()
    assert [point.index for point in points] == list(range(8))
    assert points[0].name == "size=256_channel_multipliers=1x2_learning_rate=0.001_seed=0"
    assert points[7].name == "size=1024_channel_multipliers=1x2x2_learning_rate=0.001_seed=1"
    config = points[7].config
    assert (config.codebook.size, config.model.channel_multipliers, config.seed) == (1024, (1, 2, 2), 1)
    assert points[7].values["model.channel_multipliers"] == (1, 2, 2) and config.train.steps == 5


def test_fields_that_end_alike_keep_their_full_names_and_values_fit_a_folder_name():
    over = parse_over(["model.channels=32", "discriminator.channels=16,32", "data.dir=/data/my set"])
    first, _ = Grid(SPEC, over).points()
    assert first.name == "model.channels=32_discriminator.channels=16_dir=-data-my-set_seed=0"


@pytest.mark.parametrize(("file", "group"), [("autoregressive", ""), ("joint", "generator.")])
def test_sizes_that_training_filled_in_are_no_other_config(tmp_path, file, group):
    point = Grid(f"{ROOT}/configs/{file}.py:openmoji32", {}, seeds=2).points()[0]
    sizes = [f"{PREFIX}{group}model.{name}" for name in ("vocab_size=64", "grid=(4,4)", "num_classes=9")]
    (tmp_path / point.name).mkdir()
    save_config(load_config(f"{ROOT}/configs/{file}.py:openmoji32", sizes), tmp_path / point.name / "config.json")
    (tmp_path / point.name / OUTCOME).write_text(json.dumps({"status": DONE, "reason": ""}))
    assert read_result(tmp_path, point).status == DONE
    other = Grid(f"{ROOT}/configs/{file}.py:openmoji32", {}, seeds=2, overrides=(sizes[0].replace("64", "32"),))
    assert "vocab_size: 64 -> 32" in read_result(tmp_path, other.points()[0]).reason


WRONG = [
    (["--over=codebook.sise=1,2"], "--over codebook.sise=1: the config has no field 'codebook.sise'; did you mean"),
    (["--over=codebook.size=1,two"], "--over codebook.size=two: codebook.size is of type int"),
    (["--over=model.channel_multipliers=(1,2"], "which '(1,2' is not"),
    (["--over=codebook.size"], "write --over FIELD=VALUE,VALUE"),
    (["--over=codebook.size="], "there is no value"),
    (["--over=codebook.size=1", "--over=codebook.size=2"], "codebook.size is swept twice"),
    (["--over=codebook.size=8,8"], "two points would have the folder size=8_seed=0"),
    (["--over=seed=1,2"], "seed is swept by --seeds=N"),
    (["--seeds=2", "--config.seed=1"], "seed is swept by --seeds=N"),
    (["--over=codebook.size=8", "--config.codebook.size=9"], "codebook.size is both swept and overridden"),
    ([], "nothing is swept"),
    (["--seeds=0"], "'0' is not an integer of at least 1"),
    (["--seeds=2", "--point=2"], "the points are 0 to 1"),
    (["--seeds=2", "--list", "--table"], "not allowed with argument"),
    (["--seeds=2", "--launcher=no-such-command run"], "is not a command on this machine"),
    (["--seeds=2", "--sizes=3"], "unknown argument --sizes=3"),
    (["--seeds=2", "--study=x.py"], "give either --config=FILE.py:PRESET with --over, or --study"),
]


@pytest.mark.parametrize(("flags", "message"), WRONG)
def test_wrong_use_is_one_line_before_anything_starts(tmp_path, capsys, flags, message):
    assert main(["sweep", f"--config={SPEC}", f"--workdir={tmp_path / 'sweep'}", *flags]) == 2
    err = capsys.readouterr().err
    assert message in err and len(err.splitlines()) == 1 and not (tmp_path / "sweep").exists()


STUDY = """
CONFIG = {spec!r}
OVER = {{"codebook.size": (256, 1024), "model.channel_multipliers": [(1, 2), (1, 2, 2)]}}
SEEDS = 2
OVERRIDES = {{"train.steps": 7}}
"""


def test_a_study_defines_the_same_points_as_the_flags(tmp_path, capsys):
    study = tmp_path / "study.py"
    study.write_text(STUDY.format(spec=SPEC))
    over = parse_over(["codebook.size=256,1024", "model.channel_multipliers=(1,2),(1,2,2)"])
    points = Grid(SPEC, over, 2, (f"{PREFIX}train.steps=7",)).points()
    assert [point.config for point in read_study(str(study)).points()] == [point.config for point in points]
    arguments = ["sweep", f"--study={study}", f"--workdir={tmp_path / 'sweep'}", "--list"]
    assert main([*arguments, "--seeds=1", "--config.train.steps=9"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 4 and out[0] == "0  size=256_channel_multipliers=1x2_seed=0  pending"
    assert main([*arguments, "--over=codebook.dim=8"]) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("OVERIDES = {}", "a study has no OVERIDES; did you mean OVERRIDES"),
        ("OVER = {}", "CONFIG is missing or not of type str"),
        ("CONFIG = 'a.py:b'\nOVER = {'codebook.size': 8}", r"OVER\['codebook.size'\] is not a list of values"),
        ("CONFIG = 'a.py:b'\nOVER = {}\nSEEDS = 0", "SEEDS=0"),
    ],
)
def test_a_wrong_study_is_refused(tmp_path, text, message):
    (tmp_path / "study.py").write_text(text)
    with pytest.raises(UsageError, match=message):
        read_study(str(tmp_path / "study.py"))


# Points, with a stand-in for `train`


def test_every_way_a_point_ends_is_reported_and_the_others_go_on(tmp_path, launcher, start):
    """The sweep's own process has no devices: only the points' processes may use them."""
    workdir = tmp_path / "sweep"
    arguments = sweep(workdir, "3,5,6,7,8,9", launcher, "--metrics=validation/psnr,validation/absent")
    ((code, out),) = ended(start(arguments, JAX_PLATFORMS="nowhere"))
    assert code == 1 and out.splitlines()[-1].startswith("ibq_jax sweep: 5 of 6 points are not done (size=5_seed=0 is")
    found = results(workdir)
    assert [(point["status"], point["reason"]) for point in found.values()] == [
        ("done", ""),
        ("failed", "codebook.size=5 is not allowed"),
        ("stopped", "step 1: the codebook has collapsed"),
        ("failed", "ended by SIGKILL, possibly because memory ran out"),
        ("failed", "MemoryError: RESOURCE_EXHAUSTED: no room for 8 codes"),
        ("failed", "exit code 9: hosts.sh: what is this?"),
    ]
    table = unpadded((workdir / "table.md").read_text())
    assert "| 3 | done | 30.00 |" in table and "| 6 | stopped | 60.00 |" in table and "| 7 | failed |  |" in table
    assert "- size=6_seed=0: stopped at step 6 (validated at step 6): step 1: the codebook has collapsed\n" in table
    assert "- no point has logged validation/absent\n" in table
    assert {path.name for path in (workdir / "plots").iterdir()} == {
        "validation_psnr_over_size.png",
        "validation_psnr_over_steps.png",
    }

    assert ended(start(arguments, JAX_PLATFORMS="nowhere"))[0][0] == 1
    started = {point: (workdir / point / "log.txt").read_text().count("started") for point in found}
    assert [*started.values()] == [1, 2, 1, 2, 2, 2]  # what failed is tried again, what ended is not


def test_ctrl_c_reaches_the_point_once_and_the_same_command_continues(tmp_path, launcher, start):
    workdir = tmp_path / "sweep"
    arguments = sweep(workdir, "4,3", launcher, "--seeds=2")
    (process,) = start(arguments)
    while not (workdir / "size=4_seed=1/ready").exists():
        assert process.poll() is None, ended([process])
        time.sleep(0.02)
    locked = sweep(workdir, "4,3", launcher, "--seeds=2", "--point=1")
    ((code, out),) = ended(start(locked))
    assert code == 1 and "size=4_seed=1: another process is training it" in out
    process.send_signal(signal.SIGINT)
    ((code, out),) = ended([process])
    assert code == 130, out
    assert out.endswith("ibq_jax sweep: SIGINT: size=4_seed=1 was stopped; the same command continues\n")
    assert "size=3" not in out
    ((code, out),) = ended(start(arguments))
    assert code == 0 and "size=4_seed=0: done already" in out and "| 4 | 2 done | 40.00 |" in unpadded(out)


def test_points_can_be_trained_one_by_one(tmp_path, launcher, capsys):
    workdir = tmp_path / "sweep"
    assert main(sweep(workdir, "2,3,7", launcher, "--point=1")) == 0
    assert main(sweep(workdir, "2,3,7", launcher, "--point=2")) == 1
    assert not (workdir / "table.md").exists()
    capsys.readouterr()
    assert main(sweep(workdir, "2,3,7", "--list")) == 0
    assert [line.split()[2] for line in capsys.readouterr().out.splitlines()] == ["pending", "done", "failed"]
    assert main(sweep(workdir, "2,3,7", "--table")) == 0
    assert [point["status"] for point in results(workdir).values()] == ["pending", "done", "failed"]
    assert main(sweep(workdir, "3", "--table", "--config.codebook.dim=7")) == 0
    (point,) = results(workdir).values()
    assert point["status"] == "pending" and "another config (codebook.dim: 32 -> 7)" in point["reason"]
    assert point["metrics"] == {}


# The table


def fabricate(workdir: Path, size: int, seed: int, rows: list[dict], status: str = "done") -> None:
    point = workdir / f"size={size}_seed={seed}"
    point.mkdir(parents=True)
    save_config(load_config(SPEC, [f"{PREFIX}codebook.size={size}", f"{PREFIX}seed={seed}"]), point / "config.json")
    (point / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (point / "outcome.json").write_text(json.dumps({"status": status, "reason": "" if status == "done" else "why"}))


def test_the_spread_covers_the_seeds_that_ended(tmp_path, capsys):
    workdir = tmp_path / "sweep"
    for seed, psnr in enumerate([20.0, 21.0, 25.0]):
        early = {"step": 100, "validation/psnr": 1.0, "codebook/usage": 0.5}
        last = {"step": 200, "validation/psnr": psnr, "validation/usage": 0.25, "validation/images": 100}
        fabricate(workdir, 256, seed, [early, last])
    fabricate(workdir, 1024, 0, [{"step": 200, "validation/psnr": 24.0}])
    fabricate(workdir, 1024, 1, [{"step": 50, "validation/psnr": 12.0}], "stopped")
    fabricate(workdir, 1024, 2, [{"step": 150, "validation/psnr": 99.0}], "failed")
    clock = [
        {"step": 0, "wall": 0, "start": True, "seconds": {}},
        {"step": 10, "wall": 9, "start": False, "seconds": {"first step": 8.0, "step": 1.0}},
        {
            "step": 30,
            "wall": 20,
            "start": False,
            "seconds": {"step": 3.0, "data": 1.0, "evaluation": 4.0, "images": 2.0, "pictures": 1.0},
        },
        {"step": 20, "wall": 30, "start": True, "seconds": {}},
        {"step": 30, "wall": 40, "start": False, "seconds": {"first step": 5.0}},
        {"step": 40, "wall": 50, "start": False, "seconds": {"step": 1.0}},
    ]
    (workdir / "size=1024_seed=0/timing.jsonl").write_text("".join(json.dumps(row) + "\n" for row in clock))
    assert main(sweep(workdir, "256,1024", "--seeds=3", "--table")) == 0

    small, large = csv.DictReader((workdir / "table.csv").open())
    columns = ("validation/psnr", "validation/psnr least", "validation/psnr greatest")
    assert [float(small[column]) for column in columns] == [22.0, 20.0, 25.0]
    assert [float(large[column]) for column in columns] == [18.0, 12.0, 24.0]
    assert large["status"] == "1 done, 1 stopped, 1 failed" and large["validation/usage"] == ""
    table = unpadded((workdir / "table.md").read_text())
    assert "| 256 | 3 done | 22.00 (20.00..25.00) | 25.0% | 50.0% | 200 |" in table
    assert "mean (least..greatest) over the seeds" in table and "![plots/validation_psnr_over_size.png]" in table
    assert table.partition("\n![")[0] in unpadded(capsys.readouterr().out)
    found = results(workdir)
    assert found["size=1024_seed=2"]["metrics"]["validation/psnr"] == {"step": 150, "value": 99.0}
    clocked = found["size=1024_seed=0"]
    assert clocked["seconds"] == 26.0 and clocked["images_per_second"] == 16 * (20 + 10) / (4.0 + 1.0)


def test_the_tables_have_the_means_and_ranges_of_what_was_logged(tmp_path):
    """Against plain Python on the same rows; in three files, of which two state numbers in full."""
    workdir, draws = tmp_path / "sweep", np.random.default_rng(0)
    logged = {size: draws.uniform(15, 25, 3).tolist() for size in (256, 1024)}
    for size, values in logged.items():
        for seed, value in enumerate(values):
            row = {"step": 100 + seed, "validation/psnr": value, **({"loss/l1": value / 100} if seed else {})}
            fabricate(workdir, size, seed, [row])
    metrics = "--metrics=validation/psnr,loss/l1"
    assert main(sweep(workdir, "256,1024", "--seeds=3", "--table", metrics)) == 0
    found = json.loads((workdir / "results.json").read_text())
    table = unpadded((workdir / "table.md").read_text()).splitlines()
    assert len(found["points"]) == 6 and len(found["rows"]) == 2
    for line, row in zip(csv.DictReader((workdir / "table.csv").open()), found["rows"], strict=True):
        psnr = logged[row["values"]["codebook.size"]]
        l1 = [value / 100 for value in psnr[1:]]
        for name, values in {"validation/psnr": psnr, "loss/l1": l1, "steps": [100, 101, 102]}.items():
            expected = [sum(values) / len(values), min(values), max(values)]
            columns = [name, f"{name} least", f"{name} greatest"]
            np.testing.assert_allclose([float(line[column]) for column in columns], expected, rtol=1e-14)
            if name != "steps":
                spread = row["metrics"][name]
                np.testing.assert_allclose([spread[key] for key in ("mean", "low", "high")], expected, rtol=1e-14)
                assert spread["seeds"] == len(values)
        words = f"{sum(psnr) / 3:.2f} ({min(psnr):.2f}..{max(psnr):.2f})"
        assert any(text.startswith(f"| {line['codebook.size']} | 3 done | {words} |") for text in table)
        assert row["statuses"] == {"done": 3} and line["images_per_second"] == ""


def test_every_data_set_has_its_own_plots(tmp_path):
    workdir = tmp_path / "sweep"
    flags = [f"--config={SPEC}", "--over=data.name=openmoji,photos32", "--over=codebook.size=8,16", "--table"]
    for name, size in itertools.product(("openmoji", "photos32"), (8, 16)):
        point = workdir / f"name={name}_size={size}_seed=0"
        point.mkdir(parents=True)
        fields = [f"{PREFIX}data.name={name}", f"{PREFIX}codebook.size={size}", f"{PREFIX}seed=0"]
        save_config(load_config(SPEC, fields), point / "config.json")
        (point / "metrics.jsonl").write_text(json.dumps({"step": 9, "validation/psnr": 20.0 + size}) + "\n")
        (point / "outcome.json").write_text(json.dumps({"status": "done", "reason": ""}))
    assert main(["sweep", *flags, f"--workdir={workdir}"]) == 0
    assert {path.name for path in (workdir / "plots").iterdir()} == {
        f"validation_psnr_over_{over}_{name}.png" for over in ("size", "steps") for name in ("openmoji", "photos32")
    }


def evaluation(step: int, protocol: str = "clean", weights: str = "ema", **metrics: float) -> dict:
    return {
        "stage": "tokenizer",
        "run": "",
        "step": step,
        "weights": weights,
        "split": "validation",
        "images": 9,
        "protocol": {"name": protocol, "description": "as it is", "images": 0},
        "marks": [],
        "metrics": metrics,
    }


def test_the_table_has_what_was_evaluated_later(tmp_path, capsys):
    workdir = tmp_path / "sweep"
    for seed in range(2):
        fabricate(workdir, 8, seed, [{"step": 10, "validation/psnr": 20.0}])
        folder = workdir / f"size=8_seed={seed}" / "evaluations"
        folder.mkdir()
        records = [
            evaluation(5, ssim=0.1),
            evaluation(10, ssim=0.5 + seed / 4, rFID=float("nan")),
            evaluation(10, "seed_voken", "raw", usage=0.25),
        ]
        for number, record in enumerate(records):
            (folder / f"{number}.json").write_text(json.dumps(record))
    assert main(sweep(workdir, "8", "--seeds=2", "--table")) == 0
    table = unpadded((workdir / "table.md").read_text())
    names = ("validation/psnr", "evaluation/clean/ssim", "evaluation/seed_voken/raw/usage")
    assert f"| {' | '.join(names)} |" in table
    assert "| 8 | 2 done | 20.00 | 0.625 (0.5..0.75) | 25.0% | 10 |" in table
    (workdir / "size=8_seed=0/evaluations/0.json").write_text("{}")
    capsys.readouterr()
    assert main(sweep(workdir, "8", "--seeds=2", "--table")) == 2
    assert "evaluations/0.json: not an evaluation that `evaluate` wrote" in capsys.readouterr().err


def test_two_sweeps_share_the_points(tmp_path, launcher, start):
    """Each takes what the other has not begun."""
    workdir = tmp_path / "sweep"
    arguments = sweep(workdir, "4,3", launcher, "--seeds=2")
    first = start(arguments)
    while not (workdir / "size=4_seed=1/ready").exists():
        assert first[0].poll() is None, ended(first)
        time.sleep(0.02)
    ((code, out),) = ended(start(arguments))
    assert code == 1 and "size=4_seed=1: another process is training it" in out
    assert {name: point["status"] for name, point in results(workdir).items()} == {
        "size=4_seed=0": "done",
        "size=4_seed=1": "pending",
        "size=3_seed=0": "done",
        "size=3_seed=1": "done",
    }
    first[0].send_signal(signal.SIGTERM)
    assert ended(first)[0][0] == 143


def test_a_sweep_over_seeds_alone_has_one_row(tmp_path):
    workdir = tmp_path / "sweep"
    for seed in range(2):
        point = workdir / f"seed={seed}"
        point.mkdir(parents=True)
        save_config(load_config(SPEC, [f"{PREFIX}seed={seed}"]), point / "config.json")
        (point / "metrics.jsonl").write_text(json.dumps({"step": 9, "validation/psnr": 20.0 + seed}) + "\n")
        (point / "outcome.json").write_text(json.dumps({"status": "done", "reason": ""}))
    flags = ["sweep", f"--config={SPEC}", "--seeds=2", "--table", f"--workdir={workdir}"]
    assert main(flags) == 0
    table = unpadded((workdir / "table.md").read_text())
    assert "\n| 2 done | 20.50 (20.00..21.00) | 9 |" in table
    assert {path.name for path in (workdir / "plots").iterdir()} == {"validation_psnr_over_steps.png"}


# A real sweep


def test_a_stopped_sweep_continues_and_its_table_has_what_its_runs_logged(tmp_path, data_dir, start):
    workdir = tmp_path / "sweep"
    fields = [f"{PREFIX}{field}" for field in (*SMALL, "codebook_monitor.grace_steps=0", f"data.dir={data_dir}")]
    arguments = [
        "sweep",
        f"--config={SPEC}",
        "--over=codebook_monitor.usage_floor=0.0,1.0",
        f"--workdir={workdir}",
        *fields,
    ]
    whole, collapsed = (workdir / f"usage_floor={floor}_seed=0" for floor in (0.0, 1.0))
    (process,) = start(arguments, devices=1)
    wait_for_step([process], whole, 2)
    process.send_signal(signal.SIGTERM)
    ((code, out),) = ended([process])
    assert code == 143 and f"SIGTERM: {whole.name} was stopped; the same command continues" in out
    saved = last_step(whole)
    assert 2 <= saved < STEPS and (whole / f"checkpoints/{saved}").is_dir() and not collapsed.exists()

    ((code, out),) = ended(start(arguments, devices=1))
    assert code == 1 and "1 of 2 points are not done (usage_floor=1.0_seed=0 is stopped)" in out
    assert f"continuing from step {saved}" in (whole / "log.txt").read_text()
    found = results(workdir)
    assert found[whole.name]["status"] == "done" and found[whole.name]["step"] == STEPS
    assert "the codebook has collapsed" in found[collapsed.name]["reason"]
    for folder in (whole, collapsed):
        logged = {}
        for line in (folder / "metrics.jsonl").read_text().splitlines():
            row = json.loads(line)
            logged |= {name: {"step": row["step"], "value": value} for name, value in row.items() if name != "step"}
        assert found[folder.name]["metrics"] == logged
    assert found[collapsed.name]["metrics"]["codebook/usage"]["step"] == 1

    logs = {folder: (folder / "log.txt").read_bytes() for folder in (whole, collapsed)}
    assert ended(start(arguments, devices=1))[0][0] == 1
    assert {folder: (folder / "log.txt").read_bytes() for folder in logs} == logs

    ((code, out),) = ended(start([*arguments, "--config.quantizer.beta=0.5", "--point=0"], devices=1))
    assert code == 1 and "holds a run of another config (quantizer.beta: 0.25 -> 0.5); use another --workdir" in out
