"""Times a training from its command to its first finished step, without and with the compilation cache.

    python -m ibq_jax prepare openmoji
    python tests/benchmarks/first_step.py --preset openmoji32

Each start is a new process in a new work folder; the second finds the compiled step of the first.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]


def seconds_to_first_step(preset: str, data_dir: Path, cache: Path, workdir: Path) -> float:
    command = [sys.executable, "-m", "ibq_jax", "train", f"--config={ROOT}/configs/tokenizer.py:{preset}"]
    command += [f"--workdir={workdir}", f"--config.data.dir={data_dir}", "--config.log.every=1"]
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache)}
    start = time.perf_counter()
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("step 1/"):
                seconds = time.perf_counter() - start
                process.kill()
                return seconds
    raise SystemExit("the training ended before its first step")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="openmoji32")
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    arguments = parser.parse_args()
    data_dir = arguments.data_dir.resolve()
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "compiled"
        for name in ("first start", "second start"):
            seconds = seconds_to_first_step(arguments.preset, data_dir, cache, Path(folder) / name.replace(" ", "_"))
            print(f"{name}: {seconds:.1f} s to the end of step 1", flush=True)


if __name__ == "__main__":
    main()
