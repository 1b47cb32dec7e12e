"""The scripts of launch/ run for real, against stand-ins for the programs that they call."""

import json
import shutil
import signal
import subprocess
import time

import pytest
from support.launch_stand_ins import (
    AWKWARD,
    EIGHT_GPUS,
    LAUNCH,
    POD,
    ROOT,
    SBATCH,
    SCONTROL,
    SIX_POINTS,
    SLURM_FLAGS,
    SRUN,
    SSH,
    SWEEP,
    TRAIN,
    TUPLES,
    Stand,
)

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


def test_slurm_dry_run_and_settings(stand, check_golden):
    out = submitted(stand, *TRAIN, *AWKWARD, IBQ_DRY_RUN="1")
    check_golden("launch/slurm.txt", out)
    assert stand.calls("srun") == []
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


def test_tpu_is_created_where_there_is_none_and_used_again_where_there_is(cloud):
    cloud.run("tpu_pod.sh", *POD, "create")
    assert verbs(cloud) == ["tpu-vm describe", "tpu-vm create"]
    _, err = cloud.run("tpu_pod.sh", *POD, "create")
    assert verbs(cloud) == ["tpu-vm describe", "tpu-vm create", "tpu-vm describe"] and err == "pod exists\n"


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
    assert err.splitlines()[-1] == "tpu_pod.sh: the queue ended with FAILED; the same line requests it again"


def test_tpu_run_is_its_parts_and_ends_with_the_exit_code(cloud):
    _, err = cloud.run("tpu_pod.sh", *POD, "run", *TRAIN, "--workdir=runs/x", code=143)
    parts = ["describe", "create", "scp", "ssh", "ssh", "ssh"]
    assert verbs(cloud) == [f"tpu-vm {part}" for part in parts]
    start, show = cloud.calls("gcloud")[-2:]
    command = f"env IBQ_PROCESSES=auto bash launch/tpu_worker.sh start {TRAIN[0]} {TRAIN[1]} --workdir=runs/x"
    assert start[-2:] == ["--worker=all", f"--command=cd ibq_jax && {command}"] and show[-2] == "--worker=0"
    assert "--workdir=runs/x is not gs://..." in err and "changes that are not committed are not copied" in err


def test_tpu_worker_saves_when_its_machine_is_taken_away(worker):
    worker.run("tpu_worker.sh", "start", *TRAIN, *AWKWARD, HANG="1", IBQ_PROCESSES="auto")
    worker.wait_for("ready-auto")
    _, err = worker.run("tpu_worker.sh", "start", *TRAIN, code=2)
    assert "a command is already running" in err
    assert ": runs; " in worker.run("tpu_worker.sh", "status")[0]
    until = time.monotonic() + 30
    while len(worker.calls("curl")) < 2:  # the first asks how it stands
        assert time.monotonic() < until
        time.sleep(0.02)
    (worker.folder / "taken-away").touch()
    out, _ = worker.run("tpu_worker.sh", "tail", code=143)
    first, said, notice, saved, last = out.splitlines()
    assert first.startswith("--- ") and json.loads(said)["arguments"] == ["-m", "ibq_jax", *TRAIN, *AWKWARD]
    assert notice.endswith("this machine is being preempted: SIGTERM") and saved == "saved"
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
