"""Commands started as users start them, in processes of their own: one, or several that make a job."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from support.small_runs import ROOT

CALM = "optimizer.learning_rate=1e-5"  # larger ones make Adam's first steps chaotic: rounding decides their signs
COMMAND = ("-m", "ibq_jax")


class Starter:
    """Starts processes, and keeps them in mind."""

    def __init__(self):
        self._started = []

    def __call__(
        self,
        *argvs: list[str],
        count: int | None = None,
        devices: int = 4,
        program: tuple[str, ...] = COMMAND,
        **environment: str,
    ) -> list[subprocess.Popen]:
        """One process for each of `argvs`; several, or any of a `count`, are one job."""
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        several = len(argvs) > 1 or count
        for index, argv in enumerate(argvs):
            settings = {
                "IBQ_PROCESSES": f"localhost:{port},{count or len(argvs)},{index}" if several else "",
                "IBQ_PEER_TIMEOUT": "5",
                "JAX_NUM_CPU_DEVICES": str(devices),
            }
            self._started.append(
                subprocess.Popen(
                    [sys.executable, *program, *argv],
                    cwd=ROOT,
                    env=os.environ | settings | environment,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )
        return self._started[-len(argvs) :]

    def close(self) -> None:
        for process in self._started:
            process.kill()


def ended(processes: list[subprocess.Popen]) -> list[tuple[int, str]]:
    """(exit code, output) of each."""
    return [(process.returncode, out) for process in processes for out, _ in [process.communicate(timeout=300)]]


def finished(processes: list[subprocess.Popen]) -> str:
    """Waits until all processes have ended with exit code 0, and returns the output of the first one."""
    results = ended(processes)
    assert [code for code, _ in results] == [0] * len(processes), results
    return results[0][1]


def lines(workdir: Path) -> list[str]:
    """The run's scalars, a line a step."""
    path = workdir / "metrics.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def last_step(workdir: Path) -> int:
    """The last that was logged."""
    return sum("loss/total" in line for line in lines(workdir))


def wait_for_step(processes: list[subprocess.Popen], workdir: Path, step: int) -> None:
    while last_step(workdir) < step:
        assert all(process.poll() is None for process in processes), ended(processes)
        time.sleep(0.02)
