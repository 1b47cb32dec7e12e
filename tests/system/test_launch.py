"""The scripts of launch/: linted, their dry runs word for word, and run for real against stand-ins of the programs they
call (ssh, srun, scontrol, gcloud, curl, nvidia-smi, and the interpreter itself)."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
GOLDEN = ROOT / "tests/golden/launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), LAUNCH / "slurm.sbatch", ROOT / ".ci/run"])
POD = ["--name=pod", "--zone=us-west4-a", "--type=v5litepod-64"]
TRAIN = ["train", "--config=configs/tokenizer.py:imagenet256_16384"]
SWEEP = ["sweep", "--config=configs/tokenizer.py:openmoji32", "--over", "codebook.size=8,16,32", "--workdir=runs/s"]
TUPLES = ["--over", "model.channel_multipliers=(1,2),(1,2,2)"]
SLURM_FLAGS = ["--sbatch=--account=me", "--sbatch=--time=8:00:00"]
AWKWARD = ["--config.note=it's $HOME", "two words", "", "a;b", "--workdir=gs://bucket/my run"]

# In the place of python -m ibq_jax: says what it got, and with HANG goes on until SIGTERM. FAIL=INDEX:CODE ends one.
INTERPRETER = """
import json, os, pathlib, signal, sys, time
processes = os.environ.get("IBQ_PROCESSES", "")
index = processes.rpartition(",")[2]
said = {name: value for name, value in os.environ.items() if name in ("IBQ_PROCESSES", "JAX_LOCAL_DEVICE_IDS", "MORE")}
print(json.dumps(said | {"arguments": sys.argv[1:]}), flush=True)
def save(*_):
    print("saved", flush=True)
    pathlib.Path(os.environ["READY"], f"saved-{index}").touch()
    sys.exit(143)
signal.signal(signal.SIGTERM, save)
pathlib.Path(os.environ["READY"], f"ready-{index}").touch()
failing, _, code = os.environ.get("FAIL", "").partition(":")
if code and failing == index:
    sys.exit(int(code))
while "HANG" in os.environ:
    time.sleep(0.05)
"""

# A list of arguments a line, into calls.
RECORD = """
import json, os, pathlib, subprocess, sys
calls = pathlib.Path(os.environ["READY"], "calls")
with calls.open("a") as file:
    print(json.dumps([pathlib.Path(sys.argv[0]).name, *sys.argv[1:]]), file=file)
"""
SSH = RECORD + 'sys.exit(subprocess.call(["sh", "-c", sys.argv[-1]], cwd="/"))'
SCONTROL = RECORD + 'print("node-07\\nnode-08\\nnode-11" if sys.argv[1] == "show" else "", end="")'
SRUN = (
    RECORD
    + """
import signal
if "SCANCEL" in os.environ:
    os.kill(os.getppid(), signal.SIGTERM)
command, a_node = sys.argv[sys.argv.index("bash"):], int(os.environ["A_NODE"])
codes = []
for task in range(3 * a_node):
    place = {"SLURM_NTASKS": 3 * a_node, "SLURM_NNODES": 3, "SLURM_PROCID": task, "SLURM_LOCALID": task % a_node}
    codes.append(subprocess.call(command, env=os.environ | {name: str(value) for name, value in place.items()}))
sys.exit(max(codes))
"""
)
# The state of a TPU, or of a request in the queue, is a file's first line, and each look takes it away but the last.
GCLOUD = (
    RECORD
    + """
states = pathlib.Path(os.environ["READY"], "states")
lines = states.read_text().split() if states.exists() else []
if "describe" in sys.argv:
    if not lines:
        sys.exit("ERROR: NOT_FOUND")
    print(lines[0])
    if lines[1:]:
        states.write_text("\\n".join(lines[1:]))
elif "create" in sys.argv:
    states.write_text("READY" if "tpu-vm" in sys.argv else "WAITING_FOR_RESOURCES PROVISIONING ACTIVE")
elif "delete" in sys.argv:
    states.unlink()
elif sys.argv[-1].endswith("tpu_worker.sh tail"):
    sys.exit(143)
"""
)
GIT = RECORD + 'print(" M README.md" if sys.argv[1] == "status" else "", end="")'
SBATCH = RECORD + 'print("4711;cluster" if "--parsable" in sys.argv else "Submitted batch job 4712")'
SIX_POINTS = """
import json, os, pathlib, sys
print("\\n".join(f"{i}  point  pending" for i in range(6)) if "--list" in sys.argv else json.dumps(sys.argv[1:]))
"""
CURL = (
    RECORD
    + """
import time
taken = pathlib.Path(os.environ["READY"], "taken-away")
while "last_etag=0" not in sys.argv[-1] and not taken.exists():
    time.sleep(0.05)
print("HTTP/1.1 200 OK\\r\\nETag: 5d\\r\\n\\r\\n" + ("TRUE" if taken.exists() else "FALSE"), end="")
"""
)
EIGHT_GPUS = 'print("\\n".join(f"GPU {i}: NVIDIA H100 (UUID: GPU-{i})" for i in range(8)))'
NO_DRIVER = 'import sys\nsys.exit("NVIDIA-SMI has failed")'


class Stand:
    """A folder with stand-ins that come first on PATH, and what they leave."""

    def __init__(self, folder: Path):
        self.folder, self.tools = folder, folder / "tools"
        self.tools.mkdir()
        ours = ("IBQ_", "JAX_", "CUDA_", "SLURM_", "SRUN_")
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)} | {
            "PATH": f"{self.tools}:{os.environ['PATH']}",
            "READY": str(folder),
            "IBQ_LOGS": str(folder / "logs"),
            "IBQ_PYTHON": str(self.tools / "interpreter"),
            "IBQ_STAMP": "STAMP",
            "IBQ_GRACE": "1",
            "IBQ_POLL": "0.1",
        }
        self.have("interpreter", INTERPRETER)
        self.have("nvidia-smi", NO_DRIVER)

    def have(self, name: str, program: str) -> None:
        path = self.tools / name
        path.write_text(f"#!{sys.executable} -IS\n{program}")
        path.chmod(0o755)

    def start(self, script: str, *arguments: str, **environment: str) -> subprocess.Popen:
        return subprocess.Popen(
            ["bash", str(LAUNCH / script), *arguments],
            env=self.environment | environment,
            cwd=self.folder,  # scripts find their own way
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, script: str, *arguments: str, code: int = 0, **environment: str) -> tuple[str, str]:
        process = self.start(script, *arguments, **environment)
        out, err = process.communicate(timeout=60)
        assert process.returncode == code, out + err
        return out, err

    def wait_for(self, *names: str) -> None:
        until = time.monotonic() + 30
        while not all((self.folder / name).exists() for name in names):
            assert time.monotonic() < until, f"none of {names}: {sorted(self.folder.iterdir())}"
            time.sleep(0.02)

    def calls(self, tool: str) -> list[list[str]]:
        path = self.folder / "calls"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [call for name, *call in lines if name == tool]

    def log(self, index: int) -> list[str]:
        (path,) = (self.folder / "logs").glob(f"*/{index}.log")
        return path.read_text().splitlines()


@pytest.fixture
def stand(tmp_path):
    return Stand(tmp_path)


# Text


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_has_nothing_to_say(path):
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    result = subprocess.run([shellcheck, "-x", path], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


DRY_RUNS = {
    "local_one": ("local_gpus.sh", ["--dry-run", *TRAIN, *AWKWARD]),
    "local_cpu": ("local_gpus.sh", ["--dry-run", "--processes=2", "--port=20000", *TRAIN]),
    "local_eight": ("local_gpus.sh", ["--dry-run", "--processes=8", "--port=20000", *TRAIN], {"GPUS": "8"}),
    "local_four_of_eight": ("local_gpus.sh", ["--dry-run", "--processes=4", "--port=20000", *TRAIN], {"GPUS": "8"}),
    "local_visible": (
        "local_gpus.sh",
        ["--dry-run", "--processes=2", "--port=20000", *TRAIN],
        {"GPUS": "8", "CUDA_VISIBLE_DEVICES": "4,5,6,7"},
    ),
    "hosts": ("hosts.sh", ["--dry-run", "--hosts=a,b,c", "--dir=/data/ibq", *TRAIN]),
    "hosts_awkward": (
        "hosts.sh",
        [
            "--dry-run",
            "--hosts=me@a,b",
            "--dir=/data/i b q",
            "--port=9000",
            "--env=XLA_FLAGS=-a -b",
            *TRAIN,
            *AWKWARD,
        ],
    ),
    "sweep_here": ("sweep.sh", ["--dry-run", *SLURM_FLAGS, *SWEEP, *TUPLES]),
    "sweep_slurm": ("sweep.sh", ["--dry-run", *SLURM_FLAGS, *SWEEP, *TUPLES], {"IBQ_PYTHON": "six_points"}),
    "tpu_run": ("tpu_pod.sh", [*POD, "--dry-run", "run", *TRAIN, *AWKWARD]),
    "tpu_run_queued": (
        "tpu_pod.sh",
        [*POD, "--project=p", "--spot", "--queued", "--env=A=b c", "--dry-run", "run", *TRAIN, "--workdir=gs://b/r"],
    ),
    "tpu_create": ("tpu_pod.sh", [*POD[:2], "--type=v6e-16", "--spot", "--dry-run", "create"]),
    "tpu_create_version": ("tpu_pod.sh", [*POD, "--version=v2-alpha-new", "--dry-run", "create"]),
    "tpu_install": ("tpu_pod.sh", [*POD[:2], "--project=p", "--dry-run", "install"]),
    "tpu_start": ("tpu_pod.sh", [*POD[:2], "--dry-run", "start", "evaluate", "--run=gs://b/r", "--num=50000"]),
    "tpu_tail": ("tpu_pod.sh", [*POD[:2], "--dry-run", "tail"]),
    "tpu_status": ("tpu_pod.sh", [*POD[:2], "--dry-run", "status"]),
    "tpu_stop": ("tpu_pod.sh", [*POD[:2], "--dry-run", "stop"]),
    "tpu_delete": ("tpu_pod.sh", [*POD[:2], "--dry-run", "delete"]),
    "tpu_delete_queued": ("tpu_pod.sh", [*POD[:2], "--queued", "--dry-run", "delete"]),
}


@pytest.mark.parametrize("name", DRY_RUNS)
def test_a_dry_run_prints_these_lines_and_runs_none(stand, name):
    script, arguments, *more = DRY_RUNS[name]
    for tool in ("ssh", "gcloud", "git", "curl"):
        stand.have(tool, RECORD)
    environment = {"IBQ_PYTHON": ".venv/bin/python"} | (more[0] if more else {})
    if "GPUS" in environment:
        stand.have("nvidia-smi", EIGHT_GPUS)
    if name == "sweep_slurm":
        stand.have("sbatch", SBATCH)
        stand.have("six_points", SIX_POINTS)
    out, _ = stand.run(script, *arguments, **environment)
    assert out == (GOLDEN / f"{name}.txt").read_text()
    assert not (stand.folder / "calls").exists() and not (stand.folder / "logs").exists()


def test_every_golden_text_is_of_a_dry_run():
    assert {path.stem for path in GOLDEN.iterdir()} == {*DRY_RUNS, "slurm"}


def test_awkward_arguments_arrive_as_they_were():
    *_, line = (GOLDEN / "hosts_awkward.txt").read_text().splitlines()
    typed = shlex.split(shlex.split(line)[-1])
    assert typed[:4] == ["cd", "/data/i b q", "&&", "env"] and typed[-7:] == [*TRAIN, *AWKWARD]


WRONG = [
    ("local_gpus.sh", [], "COMMAND is missing, such as: train --config=... --workdir=..."),
    ("local_gpus.sh", ["--process=2", *TRAIN], "there is no flag --process=2"),
    ("local_gpus.sh", ["--processes=two", *TRAIN], "--processes=two is not a number of processes"),
    ("local_gpus.sh", ["--processes=3", *TRAIN], "8 GPUs cannot be shared evenly by 3 processes"),
    ("local_gpus.sh", ["--port=x", *TRAIN], "--port=x is not a port"),
    ("local_gpus.sh", ["-v"], "there is no flag -v"),
    ("hosts.sh", TRAIN, "--hosts=a,b,c or --hosts=@FILE is missing"),
    ("hosts.sh", ["--hosts=,", *TRAIN], "--hosts=a,b,c or --hosts=@FILE is missing"),
    ("hosts.sh", ["--hosts=@absent", *TRAIN], "the list of hosts absent cannot be read"),
    ("hosts.sh", ["--hosts=a,-b", *TRAIN], "-b is not a host"),
    ("hosts.sh", ["--hosts=a,b"], "COMMAND is missing, such as: train --config=... --workdir=..."),
    ("hosts.sh", ["--hosts=a,b", "--env=A", *TRAIN], "there is no flag --env=A"),
    ("tpu_pod.sh", [], "a verb is missing: run, create, install, start, tail, status, stop or delete"),
    ("tpu_pod.sh", [*POD, "strat", *TRAIN], "there is no verb strat"),
    ("tpu_pod.sh", ["--zone=z", "tail"], "--name=NAME is missing"),
    ("tpu_pod.sh", ["--name=pod", "tail"], "--zone=ZONE is missing"),
    ("tpu_pod.sh", [*POD[:2], "run", *TRAIN], "--type=TYPE is missing, such as v5litepod-64"),
    ("tpu_pod.sh", [*POD, "run"], "COMMAND is missing, such as: train --config=... --workdir=..."),
    ("tpu_pod.sh", [*POD, "delete", "now"], "delete takes nothing after it"),
    ("sweep.sh", ["--dry-rum", *SWEEP], "there is no flag --dry-rum"),
    ("sweep.sh", TRAIN, "write sweep and its flags, such as: sweep --config=... --over FIELD=A,B --workdir=..."),
    ("slurm.sbatch", TRAIN, "type sbatch --nodes=2 launch/slurm.sbatch train ... in the repository's root"),
]


@pytest.mark.parametrize(("script", "arguments", "message"), WRONG)
def test_wrong_use_is_one_line_and_exit_code_2(stand, script, arguments, message):
    stand.have("nvidia-smi", EIGHT_GPUS)
    for tool in ("ssh", "gcloud", "git"):
        stand.have(tool, RECORD)
    out, err = stand.run(script, *arguments, code=2)
    assert (out, err) == ("", f"{script}: {message}\n")
    assert not (stand.folder / "calls").exists()


# One host


def test_one_process_needs_no_settings_and_passes_its_exit_code_on(stand):
    out, err = stand.run("local_gpus.sh", *TRAIN, *AWKWARD)
    assert json.loads(out) == {"arguments": ["-m", "ibq_jax", *TRAIN, *AWKWARD]} and err == ""
    stand.run("local_gpus.sh", *TRAIN, code=9, FAIL=":9")
    assert not (stand.folder / "logs").exists()


def test_several_processes_learn_of_each_other_and_share_the_gpus(stand):
    stand.have("nvidia-smi", EIGHT_GPUS)
    out, err = stand.run("local_gpus.sh", "--processes=2", *TRAIN)
    first, second = json.loads(out), json.loads(*stand.log(1))
    address = first["IBQ_PROCESSES"].split(",")[0]
    assert address.startswith("localhost:") and address in second["IBQ_PROCESSES"]
    assert [said["IBQ_PROCESSES"].split(",")[1:] for said in (first, second)] == [["2", "0"], ["2", "1"]]
    assert [said["JAX_LOCAL_DEVICE_IDS"] for said in (first, second)] == ["0,1,2,3", "4,5,6,7"]
    (folder,) = (stand.folder / "logs").iterdir()
    assert err == f"2 processes; 0 prints here, the others into {folder}/\n"


def test_one_that_fails_takes_the_others_along(stand):
    out, err = stand.run("local_gpus.sh", "--processes=3", *TRAIN, code=7, FAIL="1:7", HANG="1")
    assert "JAX_LOCAL_DEVICE_IDS" not in out and out.endswith("\nsaved\n") and stand.log(2)[-1] == "saved"
    assert "process 1 ended with exit code 7; its output: " in err and "ending the other 2\n" in err


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_all_as_sigterm(stand, sent):
    process = stand.start("local_gpus.sh", "--processes=2", *TRAIN, HANG="1")
    stand.wait_for("ready-0", "ready-1")
    process.send_signal(sent)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 143 and out.endswith("\nsaved\n") and stand.log(1)[-1] == "saved"
    assert err.endswith("stopping: waiting until all have saved\n")


# A list of hosts


def on_hosts(stand: Stand) -> list[str]:
    stand.have("ssh", SSH)
    there = {name: stand.environment[name] for name in ("IBQ_LOGS", "IBQ_PYTHON")}
    return [f"--env={name}={value}" for name, value in there.items()]


def test_hosts_each_run_one_process(stand):
    (stand.folder / "list").write_text("me@a  # the first\n\nb\n")
    flags = [*on_hosts(stand), "--env=MORE=x y", f"--hosts=@{stand.folder}/list"]
    out, _ = stand.run("hosts.sh", *flags, *TRAIN, *AWKWARD)
    for index, said in enumerate([out, *stand.log(1)]):
        assert json.loads(said) == {
            "IBQ_PROCESSES": f"a:8476,2,{index}",
            "MORE": "x y",
            "arguments": ["-m", "ibq_jax", *TRAIN, *AWKWARD],
        }
    assert sorted(call[-2] for call in stand.calls("ssh")) == ["b", "me@a"]


def test_hosts_pass_the_exit_code_of_the_failing_one_on(stand):
    out, err = stand.run("hosts.sh", *on_hosts(stand), "--hosts=a,b,c", *TRAIN, code=7, FAIL="2:7", HANG="1")
    assert out.endswith("\nsaved\n") and stand.log(1)[-1] == "saved"
    assert "process 2 ended with exit code 7; its output: hosts-STAMP/2.log on c\n" in err


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_hosts_save_on_a_signal_and_when_nobody_is_connected(stand, sent):
    process = stand.start("hosts.sh", *on_hosts(stand), "--hosts=a,b", *TRAIN, HANG="1")
    stand.wait_for("ready-0", "ready-1")
    process.send_signal(sent)
    out, _ = process.communicate(timeout=30)
    stand.wait_for("saved-0", "saved-1")
    if sent == signal.SIGKILL:
        return
    assert process.returncode == 143 and out.endswith("\nsaved\n") and stand.log(1)[-1] == "saved"


# Slurm


def submitted(stand: Stand, *arguments: str, code: int = 0, **environment: str) -> str:
    """Runs a copy, as Slurm does."""
    stand.have("scontrol", SCONTROL)
    stand.have("srun", SRUN)
    copy = shutil.copy(LAUNCH / "slurm.sbatch", stand.folder / "slurm_script")
    job = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "123456", "SLURM_JOB_NODELIST": "node-[07-08,11]"}
    out, _ = stand.run(str(copy), *arguments, code=code, **{"A_NODE": "1"} | job | environment)
    return out


@pytest.mark.parametrize("a_node", [1, 8])
def test_slurm_tasks_learn_of_each_other(stand, a_node):
    said = [json.loads(line) for line in submitted(stand, *TRAIN, *AWKWARD, A_NODE=str(a_node)).splitlines()]
    for task, got in enumerate(said):
        gpus = {} if a_node == 1 else {"JAX_LOCAL_DEVICE_IDS": str(task % 8)}
        processes = f"node-07:18456,{3 * a_node},{task}"
        assert got == {"IBQ_PROCESSES": processes, "arguments": ["-m", "ibq_jax", *TRAIN, *AWKWARD]} | gpus
    assert len(said) == 3 * a_node
    assert stand.calls("scontrol") == [["show", "hostnames", "node-[07-08,11]"]]


def test_slurm_queues_again_what_was_stopped_by_the_time_limit_alone(stand):
    requeue = ["requeue", "123456"]
    submitted(stand, *TRAIN, code=1, FAIL="1:1")
    assert requeue not in stand.calls("scontrol")
    submitted(stand, *TRAIN, code=143, FAIL="1:143", SCANCEL="1")  # this reaches the job's shell too
    assert requeue not in stand.calls("scontrol")
    submitted(stand, *TRAIN, code=143, FAIL="1:143")
    assert requeue in stand.calls("scontrol")


def test_slurm_dry_run_and_settings(stand):
    out = submitted(stand, *TRAIN, *AWKWARD, IBQ_DRY_RUN="1")
    assert out == (GOLDEN / "slurm.txt").read_text() and stand.calls("srun") == []
    lines = (LAUNCH / "slurm.sbatch").read_text().splitlines()
    settings = {line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")}
    assert settings >= {"--signal=TERM@300", "--requeue", "--open-mode=append", "--ntasks-per-node=1"}


def test_slurm_trains_a_point_a_job_and_then_writes_the_table(stand):
    stand.have("sbatch", SBATCH)
    stand.have("interpreter", SIX_POINTS)
    out, _ = stand.run("sweep.sh", *SLURM_FLAGS, *SWEEP, *TUPLES)
    assert out == "Submitted batch job 4712\n"
    points, table = stand.calls("sbatch")
    assert "--array=0-5" in points and "--dependency=afterany:4711" in table and "--account=me" in table
    said = []
    for call in (points, table):
        (script,) = (flag.removeprefix("--wrap=") for flag in call if flag.startswith("--wrap="))
        task = stand.environment | {"SLURM_ARRAY_TASK_ID": "5"}
        said.append(json.loads(subprocess.check_output(["sh", "-c", script], env=task, text=True)))
    flags = ["-m", "ibq_jax", *SWEEP, *TUPLES]
    assert said == [[*flags, "--launcher=bash launch/slurm.sbatch", "--point=5"], [*flags, "--table"]]


def test_a_sweep_that_is_wrong_submits_nothing(stand):
    stand.have("sbatch", SBATCH)
    stand.run("sweep.sh", *SWEEP, code=2, FAIL=":2")
    assert stand.calls("sbatch") == []


# A TPU


def verbs(stand: Stand) -> list[str]:
    """tpu-vm create and so on, in their order."""
    return [" ".join(call[2:4]) for call in stand.calls("gcloud")]


@pytest.fixture
def cloud(stand):
    stand.have("gcloud", GCLOUD)
    stand.have("git", GIT)
    return stand


def test_tpu_is_created_where_there_is_none_and_used_again_where_there_is(cloud):
    cloud.run("tpu_pod.sh", *POD, "create")
    assert verbs(cloud) == ["tpu-vm describe", "tpu-vm create"]
    _, err = cloud.run("tpu_pod.sh", *POD, "create")
    assert verbs(cloud) == ["tpu-vm describe", "tpu-vm create", "tpu-vm describe"] and err == "pod is there\n"


@pytest.mark.parametrize("state", ["PREEMPTED", "TERMINATED"])
def test_tpu_that_was_preempted_is_made_again(cloud, state):
    (cloud.folder / "states").write_text(state)
    cloud.run("tpu_pod.sh", *POD, "create")
    assert verbs(cloud) == ["tpu-vm describe", "tpu-vm delete", "tpu-vm create"]


def test_tpu_in_between_is_left_alone(cloud):
    (cloud.folder / "states").write_text("CREATING")
    _, err = cloud.run("tpu_pod.sh", *POD, "create", code=1)
    assert err == "tpu_pod.sh: pod is CREATING; try again when it is READY, or delete it\n"
    assert verbs(cloud) == ["tpu-vm describe"]


def test_tpu_queue_is_waited_for(cloud):
    _, err = cloud.run("tpu_pod.sh", *POD, "--queued", "create")
    assert err.splitlines() == ["pod: WAITING_FOR_RESOURCES", "pod: PROVISIONING", "pod: ACTIVE"]
    looks = ["queued-resources describe"] * 3
    assert verbs(cloud) == ["queued-resources describe", "queued-resources create", *looks]


def test_tpu_queue_that_fails_says_so(cloud):
    (cloud.folder / "states").write_text("PROVISIONING\nFAILED")
    _, err = cloud.run("tpu_pod.sh", *POD, "--queued", "create", code=1)
    assert err.splitlines()[-1] == "tpu_pod.sh: the queue ended with FAILED; the same line asks again"


def test_tpu_run_is_its_parts_and_ends_with_the_exit_code(cloud):
    _, err = cloud.run("tpu_pod.sh", *POD, "run", *TRAIN, "--workdir=runs/x", code=143)
    parts = ["describe", "create", "scp", "ssh", "ssh", "ssh"]
    assert verbs(cloud) == [f"tpu-vm {part}" for part in parts]
    start, show = cloud.calls("gcloud")[-2:]
    command = f"env IBQ_PROCESSES=auto bash launch/tpu_worker.sh start {TRAIN[0]} {TRAIN[1]} --workdir=runs/x"
    assert start[-2:] == ["--worker=all", f"--command=cd ibq_jax && {command}"] and show[-2] == "--worker=0"
    assert "--workdir=runs/x is not gs://..." in err and "changes that are not committed stay here" in err


@pytest.fixture
def worker(stand):
    stand.have("curl", CURL)
    yield stand
    stand.run("tpu_worker.sh", "stop")


def test_tpu_worker_saves_when_its_machine_is_taken_away(worker):
    worker.run("tpu_worker.sh", "start", *TRAIN, *AWKWARD, HANG="1", IBQ_PROCESSES="auto")
    worker.wait_for("ready-auto")
    _, err = worker.run("tpu_worker.sh", "start", *TRAIN, code=2)
    assert "a command runs already" in err
    assert ": runs; " in worker.run("tpu_worker.sh", "status")[0]
    until = time.monotonic() + 30
    while len(worker.calls("curl")) < 2:  # the first asks how it stands
        assert time.monotonic() < until
        time.sleep(0.02)
    (worker.folder / "taken-away").touch()
    out, _ = worker.run("tpu_worker.sh", "tail", code=143)
    first, said, notice, saved, last = out.splitlines()
    assert first.startswith("--- ") and json.loads(said)["arguments"] == ["-m", "ibq_jax", *TRAIN, *AWKWARD]
    assert notice.endswith("this machine is being taken away: SIGTERM") and saved == "saved"
    assert last.endswith("exit code 143")
    assert worker.run("tpu_worker.sh", "status")[0].endswith(": ended with exit code 143\n")
    assert [call[-1].partition("&last_etag=")[2] for call in worker.calls("curl")] == ["0", "5d"]


def test_tpu_worker_stops_and_goes_on(worker):
    worker.run("tpu_worker.sh", "start", *TRAIN, HANG="1", IBQ_PROCESSES="auto")
    worker.wait_for("ready-auto")
    assert worker.run("tpu_worker.sh", "stop")[0].endswith(": ended with exit code 143\n")
    worker.run("tpu_worker.sh", "start", *TRAIN, IBQ_PROCESSES="auto")
    out, _ = worker.run("tpu_worker.sh", "tail")
    assert out.count('"IBQ_PROCESSES": "auto"') == 2 and out.splitlines()[-1].endswith("exit code 0")


# Kubernetes


def test_jobset_is_consistent(stand):
    jobset = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert jobset["spec"]["network"]["enableDNSHostnames"] is True
    (hosts,) = jobset["spec"]["replicatedJobs"]
    job = hosts["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    environment = {entry["name"]: entry for entry in container["env"]}
    assert hosts["replicas"] == 1 and job["completionMode"] == "Indexed" and job["backoffLimit"] == 0
    assert str(job["completions"]) == str(job["parallelism"]) == environment["IBQ_COUNT"]["value"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}

    # A stop with everything saved, and an eviction, end the Job for a reason that restarts the JobSet without end.
    (rule,) = jobset["spec"]["failurePolicy"]["rules"]
    assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts" and rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    saved, evicted = job["podFailurePolicy"]["rules"]
    assert saved["action"] == evicted["action"] == "FailJob"
    assert saved["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [143]}
    assert evicted["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    assert pod["restartPolicy"] == "Never" and pod["terminationGracePeriodSeconds"] == 300

    # The command, run as the kubelet would, but for tini.
    stand.have("tini", "import os, sys\nos.execvp(sys.argv[2], sys.argv[2:])")
    (stand.tools / "python").symlink_to(stand.tools / "interpreter")
    names = {"jobset-name": jobset["metadata"]["name"], "replicatedjob-name": hosts["name"]}
    given = {"JOB_COMPLETION_INDEX": "1"}
    for name, entry in environment.items():
        field = entry.get("valueFrom", {}).get("fieldRef", {}).get("fieldPath", "")
        annotation = field.removeprefix("metadata.annotations['jobset.sigs.k8s.io/").removesuffix("']")
        given[name] = names[annotation] if annotation else entry["value"]
    command = [*container["command"], *container["args"], *AWKWARD]
    out = subprocess.check_output(command, env=stand.environment | given, text=True)
    port = container["ports"][0]["containerPort"]
    arguments = ["-m", "ibq_jax", *container["args"], *AWKWARD]
    assert json.loads(out) == {"IBQ_PROCESSES": f"ibq-hosts-0-0.ibq:{port},2,1", "arguments": arguments}
    out = subprocess.check_output(command, env=stand.environment | given | {"IBQ_PROCESSES": "auto"}, text=True)
    assert json.loads(out)["IBQ_PROCESSES"] == "auto"


def test_the_image_copies_what_is_there_and_not_ignored():
    lines = (LAUNCH / "Dockerfile").read_text().splitlines()
    copied = [name for line in lines if line.startswith("COPY ") for name in line.split()[1:-1]]
    kept = (LAUNCH / "Dockerfile.dockerignore").read_text().splitlines()
    assert {"requirements*.txt", "pyproject.toml", "ibq_jax", "configs"} <= {*copied}
    for name in copied:
        assert f"!{name}" in kept and list(ROOT.glob(name)), name
