"""The scripts of launch/ as text: linted, their dry runs word for word, wrong use refused, the job set consistent."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from support.launch_stand_ins import (
    AWKWARD,
    EIGHT_GPUS,
    GOLDEN,
    LAUNCH,
    POD,
    RECORD,
    ROOT,
    SBATCH,
    SCRIPTS,
    SIX_POINTS,
    SLURM_FLAGS,
    SWEEP,
    TRAIN,
    TUPLES,
)


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
def test_a_dry_run_prints_these_lines_and_runs_none(stand, check_golden, name):
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
    check_golden(f"launch/{name}.txt", out)
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
    ("tpu_pod.sh", [*POD, "delete", "now"], "delete takes no arguments"),
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
