"""Steps of a preset in one process with two simulated devices, and in two processes with one each; what a save blocks.

    python -m ibq_jax prepare openmoji
    python tests/benchmarks/processes.py --preset openmoji64

Each layout trains in turns, in new work folders. A step's time is the median from one logged step to the next;
a save's is what the loop was held up by it (timing.jsonl), while the writing goes on beside the steps that follow.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[2]
WARM_STEPS = 5
LAYOUTS = {"one process, two devices": (1, 2), "two processes, a device each": (2, 1)}


def train(preset: str, data_dir: Path, workdir: Path, processes: int, devices: int, fields: list[str]) -> list[dict]:
    """The rows of its timing.jsonl."""
    command = [sys.executable, "-m", "ibq_jax", "train", f"--config={ROOT}/configs/tokenizer.py:{preset}"]
    command += [f"--workdir={workdir}", f"--config.data.dir={data_dir}", *(f"--config.{field}" for field in fields)]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices)}
    started = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment | ({"IBQ_PROCESSES": f"localhost:{port},{processes},{index}"} if processes > 1 else {}),
            stdout=subprocess.DEVNULL,
        )
        for index in range(processes)
    ]
    if any([process.wait() for process in started]):
        raise SystemExit("a training failed")
    return [json.loads(line) for line in (workdir / "timing.jsonl").read_text().splitlines()]


def step_seconds(rows: list[dict]) -> float:
    """The median of steps after which nothing but logging happened."""
    pairs = zip(rows[WARM_STEPS:], rows[WARM_STEPS + 1 :], strict=False)
    return median(b["wall"] - a["wall"] for a, b in pairs if set(b["seconds"]) <= {"other", "data", "step", "logging"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="openmoji64")
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--steps", type=int, default=40, help="of each turn")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--save-every", type=int, default=200, help="steps, of the run whose saves are timed; 0: none")
    parser.add_argument("--saves", type=int, default=2)
    arguments = parser.parse_args()
    data_dir = arguments.data_dir.resolve()
    quiet = ["log.every=1", "evaluate.every=1_000_000", "log.images_every=1_000_000"]
    with tempfile.TemporaryDirectory() as folder:
        medians = {name: [] for name in LAYOUTS}
        for turn in range(arguments.turns):
            for name, (processes, devices) in LAYOUTS.items():
                workdir = Path(folder) / f"turn{turn}_{processes}"
                fields = [*quiet, f"train.steps={arguments.steps}"]
                rows = train(arguments.preset, data_dir, workdir, processes, devices, fields)
                medians[name].append(step_seconds(rows))
                print(f"turn {turn}, {name}: {medians[name][-1]:.3f} s a step", flush=True)
        one, two = (median(found) for found in medians.values())
        print(f"two processes step at {one / two:.2f} of the rate of one: {two:.3f} s against {one:.3f} s")
        if arguments.save_every:
            fields = [*quiet, f"checkpoint.every={arguments.save_every}"]
            fields += [f"train.steps={arguments.save_every * arguments.saves + WARM_STEPS}"]
            rows = train(arguments.preset, data_dir, Path(folder) / "saves", 1, 1, fields)
            step = step_seconds(rows)
            saves = [row["seconds"]["checkpoint"] for row in rows[:-1] if "checkpoint" in row["seconds"]]
            words = ", ".join(f"{seconds:.3f} s" for seconds in saves)
            print(f"{len(saves)} saves, {arguments.save_every} steps apart, blocked {words}: at most ", end="")
            print(f"{max(saves) / step:.1%} of a step of {step:.3f} s")


if __name__ == "__main__":
    main()
