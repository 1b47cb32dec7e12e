"""Stand-ins for the programs that the scripts of launch/ call: ssh, srun, gcloud, curl, nvidia-smi and Python."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

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

# Stands in for `python -m ibq_jax`: prints what it got, and with HANG runs until SIGTERM. FAIL=INDEX:CODE ends one.
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

# Appends its arguments to the file "calls", one JSON list per line.
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
# A file's first line is the state of a TPU or of a queued request; each look removes that line unless it is the last.
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
    """A folder of stand-ins that come first on PATH, with what they wrote."""

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
