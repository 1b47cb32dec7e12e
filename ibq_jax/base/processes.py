"""The processes of one job: how they find one another, check that they are alike, and end together.

A launch script tells each process of the others by the environment; everything else is the same for one and for many:

    IBQ_PROCESSES       HOST:PORT,COUNT,INDEX: where process 0 listens, how many there are, which one this is;
                        or auto: JAX asks the platform (a TPU pod, Slurm, Kubernetes). Not set: one process.
    IBQ_START_TIMEOUT   seconds to wait until all are there (300)
    IBQ_PEER_TIMEOUT    seconds without a sign of life after which a peer counts as dead, and the others end (60)
    NPROC               cores for XLA's threads, which it reads itself; not set: this process's part of those that it
                        shares with others of the job

JAX alone would let the survivors of a dead peer hang in a collective, or abort them by a signal. Here every process
writes a sign of life into the job's key-value store once a second, and how it failed, if it did; the others read that,
say so, and end with exit code 1. The same command then continues from the last checkpoint.
"""

import contextlib
import hashlib
import json
import multiprocessing
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import jax
from jax._src.distributed import global_state  # the job's key-value store and barriers have no public name
from jax.experimental import multihost_utils

from ibq_jax.base.errors import Failed, UsageError, one_line

PROCESSES, START_TIMEOUT, PEER_TIMEOUT = "IBQ_PROCESSES", "IBQ_START_TIMEOUT", "IBQ_PEER_TIMEOUT"
BARRIER_SECONDS = 3600  # nothing that lies between two barriers takes longer; the dead are noticed much sooner
BEAT_SECONDS = 1.0
LAST_WORDS_SECONDS = 3.0  # that a failed process 0 stays: the store goes with it, and the others are to read why
BEATS, FAILURES, CORES = "ibq/beats/", "ibq/failures/", "ibq/cores/"
XLA_THREADS = "NPROC"
CODE = Path(__file__).parents[1]

_uses: dict[str, int] = {}  # of a barrier's name, since each can be waited at once
_watch: "_PeerWatch | None" = None


@dataclass(frozen=True)
class Place:
    """What IBQ_PROCESSES says. `coordinator` is HOST:PORT, or "" where JAX is to ask the platform for all three."""

    coordinator: str
    count: int
    index: int

    @classmethod
    def from_environment(cls) -> "Place | None":
        """None for a job of one process. Raises UsageError for a value that is not understood."""
        text = os.environ.get(PROCESSES, "")
        if not text:
            return None
        if text == "auto":
            return cls("", 0, 0)
        coordinator, *numbers = text.split(",")
        if len(numbers) != 2 or not re.fullmatch(r".+:\d+", coordinator) or not all(map(str.isdecimal, numbers)):
            raise UsageError(f"{PROCESSES}={text} is neither auto nor HOST:PORT,COUNT,INDEX (such as host0:8476,4,2)")
        count, index = map(int, numbers)
        if index >= count:
            raise UsageError(f"{PROCESSES}={text}: the index counts from 0, so that the last is {count - 1}")
        return cls(coordinator, count, index)


def join(command: str, stop_together: bool) -> None:
    """Waits for the other processes of the job, where there are any, and checks that they are like this one.

    Args:
        command: what is run, for messages.
        stop_together: a SIGTERM to any process stops all at one step (`asked_to_stop`), instead of ending that one.

    Raises:
        UsageError: the environment is not understood, or processes differ in their code or number of devices. When
            not all come in time, the process ends with a message and exit code 1.
    """
    global _watch
    place = Place.from_environment()
    if place is None:
        return
    start, peer = _seconds(START_TIMEOUT, 300), _seconds(PEER_TIMEOUT, 60)
    jax.config.update("jax_enable_preemption_service", stop_together)
    named = dict(coordinator_address=place.coordinator, num_processes=place.count, process_id=place.index)
    with _ending_after(start, f"ibq_jax {command}: {_absent(place, start)}"):
        jax.distributed.initialize(
            **(named if place.coordinator else {}),
            cluster_detection_method="deactivate" if place.coordinator else None,
            initialization_timeout=start + 60,  # after which JAX would abort
            heartbeat_timeout_seconds=10 * peer,
            shutdown_timeout_seconds=peer,
        )
        _share_cores(start + 60)
    _watch = _PeerWatch(command, peer)
    _watch.start()
    check_alike("processes", {"command": command, "devices": jax.local_device_count(), "code": code_revision()})


def leave() -> None:
    """Waits until all processes are done. Called once, after the last thing that one does with the others."""
    global _watch
    if _watch is None:
        return
    barrier("end")
    _watch.stop()
    _watch = None
    jax.distributed.shutdown()


def fail(message: str, code: int) -> NoReturn:
    """Ends this process, whatever its threads are doing; the others of its job are told why, and end too."""
    if _watch is None:
        _exit(code)
    _watch.silence()
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        global_state.client.key_value_set(f"{FAILURES}{jax.process_index()}", message, allow_overwrite=True)
        if jax.process_index() == 0:
            time.sleep(LAST_WORDS_SECONDS)
    _exit(code)


def joined() -> bool:
    """Whether this process is one of several."""
    return _watch is not None


def index() -> int:
    """This one's; 0 of a single process, without a look at its devices."""
    return jax.process_index() if joined() else 0


def may_be_a_peers(error: Exception) -> bool:
    """Whether it is what a collective says when another process is gone."""
    return isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in str(error)


def wait_for_news(error: Exception) -> None:
    """After a collective failed: waits until it is known which process died, and ends with that message.

    Returns when `error` is another one, or every process is alive.
    """
    if may_be_a_peers(error):
        print(f"{one_line(error)}: looking which process is gone", file=sys.stderr)
        time.sleep(_watch.timeout + 5 * BEAT_SECONDS)


def check_alike(what: str, mine: Mapping[str, object]) -> None:
    """Raises UsageError, the same in all processes, where they do not have equal values under the names of `mine`."""
    if jax.process_count() == 1:
        return
    host = socket.gethostname()
    entries = _exchange(what, {"host": host, **json.loads(json.dumps(mine))})
    for index, entry in enumerate(entries):
        for name in mine:
            if entry.get(name) != entries[0].get(name):
                raise UsageError(
                    f"{what} are not alike: process {index} on {entry['host']} has {name} {entry.get(name)}, "
                    f"process 0 on {entries[0]['host']} has {entries[0].get(name)}"
                )


def first_failure(what: str, reason: str | None) -> str | None:
    """In all processes the same: None, or the first process's `reason` that is not."""
    if jax.process_count() == 1:
        return reason
    for process, found in enumerate(_exchange(what, reason)):
        if found is not None:
            return f"in process {process}: {found}"
    return None


def barrier(name: str, seconds: float = BARRIER_SECONDS) -> None:
    """Returns once every process has come here. Raises Failed when not all do within `seconds`."""
    if jax.process_count() == 1:
        return
    use = _uses[name] = _uses.get(name, 0) + 1
    try:
        global_state.client.wait_at_barrier(f"ibq/{name}/{use}", int(1000 * seconds))
    except jax.errors.JaxRuntimeError as error:
        raise Failed(f"not all processes came to {name!r} within {seconds:g} s ({one_line(error)})") from error


def jit(function: Callable, mesh: jax.sharding.Mesh, **options) -> Callable:
    """`jax.jit(function, **options)`, for arrays on `mesh`. Where that spans processes, which then all call it, the
    first run begins in all of them at once, and not before each compiled it.

    A collective on CPUs waits half a minute for a peer, and compiling may take one longer than another by more.
    """
    compiled = jax.jit(function, **options)
    if not (joined() and mesh.is_multi_process):
        return compiled
    met = False

    def run(*arguments):
        nonlocal met
        if not met:
            compiled.lower(*arguments).compile()
            barrier("compiled")
            met = True
        return compiled(*arguments)

    return run


def asked_to_stop(step: int) -> bool:
    """Whether all processes stop after this step, because one was sent SIGTERM. To be asked in each, at every step."""
    return _watch is not None and multihost_utils.reached_preemption_sync_point(step)


def code_revision() -> str:
    """Of this package's source files, changed ones included: the first digits of a sha256."""
    digest = hashlib.sha256()
    for path in sorted(CODE.rglob("*.py")):
        digest.update(f"{path.relative_to(CODE)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


class _PeerWatch(threading.Thread):
    """Gives a sign of life, and ends the process when another is dead, which process 0 finds, or failed."""

    def __init__(self, command: str, timeout: int):
        super().__init__(name="peer watch", daemon=True)
        self.timeout = timeout
        self._command, self._ended, self._silent = command, threading.Event(), threading.Event()
        silent = "at its start ", time.monotonic()  # all have come, or there would be no watch
        self._heard = {str(index): silent for index in range(jax.process_count())}  # the last sign of life, and when

    def stop(self) -> None:
        self._ended.set()
        self.join()

    def silence(self) -> None:
        """The process is ending by itself."""
        self._silent.set()

    def run(self) -> None:
        client, mine = global_state.client, jax.process_index()
        beats = 0
        while not self._ended.wait(BEAT_SECONDS):
            beats += 1
            try:
                client.key_value_set(f"{BEATS}{mine}", f"on {socket.gethostname()} {beats}", allow_overwrite=True)
                if mine == 0:
                    self._find_the_dead(client)
                failures = dict(client.key_value_dir_get(FAILURES))
            except jax.errors.JaxRuntimeError as error:
                failures = {f"{FAILURES}0": f"cannot be reached any more ({one_line(error)})"}
            for key, reason in failures.items():
                if not key.endswith(f"/{mine}"):
                    self._end_with(key.rpartition("/")[2], reason)

    def _find_the_dead(self, client) -> None:
        now = time.monotonic()
        for key, beat in client.key_value_dir_get(BEATS):
            index = key.rpartition("/")[2]
            if self._heard[index][0] != beat:
                self._heard[index] = beat, now
        for index, (beat, heard) in self._heard.items():
            if now - heard > self.timeout:
                where = beat.rpartition(" ")[0]
                reason = f"{where} gave no sign of life for {self.timeout} s: killed, or its host is gone"
                client.key_value_set(f"{FAILURES}{index}", reason, allow_overwrite=True)

    def _end_with(self, index: str, reason: str) -> None:
        time.sleep(LAST_WORDS_SECONDS / 2)  # it may be that this one is failing for the same reason
        if not self._silent.is_set():
            print(
                f"ibq_jax {self._command}: process {index} of {jax.process_count()} {reason}; this one ends too, "
                "the same command continues",
                file=sys.stderr,
            )
            _exit(1)


def _share_cores(seconds: int) -> None:
    """Of processes on the same cores each lets XLA compute with its part, unless the environment says with how many.

    A thread a core in each of them, and they take the cores from one another while a collective waits for the last.
    To be called before JAX looks at its devices, when XLA starts the threads.
    """
    if not hasattr(os, "sched_getaffinity"):  # it is Linux that tells
        return
    cores = sorted(os.sched_getaffinity(0))
    mine, client = json.dumps([socket.gethostname(), cores]), global_state.client
    client.key_value_set(f"{CORES}{global_state.process_id}", mine)
    client.wait_at_barrier(CORES, 1000 * seconds)
    sharing = [place for _, place in client.key_value_dir_get(CORES)].count(mine)
    if sharing > 1:
        os.environ.setdefault(XLA_THREADS, str(max(1, len(cores) // sharing)))


def _exchange(what: str, mine) -> list:
    """What every process brings (as JSON has it), in the order of their indices."""
    folder = f"ibq/{what}/{_uses.get(what, 0)}/"
    global_state.client.key_value_set(f"{folder}{jax.process_index()}", json.dumps(mine))
    barrier(what)
    brought = {
        int(key.rpartition("/")[2]): json.loads(text) for key, text in global_state.client.key_value_dir_get(folder)
    }
    return [brought[index] for index in range(jax.process_count())]


def _absent(place: Place, seconds: int) -> str:
    which = f"process {place.index} of {place.count}" if place.coordinator else "this process"
    at = place.coordinator or "the address that the platform names"
    return (
        f"{which} waited {seconds} s at {at} and not all others came; see that each is started and reaches that "
        f"address, or raise {START_TIMEOUT}"
    )


@contextlib.contextmanager
def _ending_after(seconds: float, message: str) -> Iterator[None]:
    """Ends the process with `message` if the block takes longer: where it waits in JAX, an exception cannot come."""

    def end() -> None:
        print(message, file=sys.stderr)
        _exit(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _seconds(variable: str, default: int) -> int:
    text = os.environ.get(variable, str(default))
    if not text.isdecimal() or not int(text):
        raise UsageError(f"{variable}={text} is no whole number of seconds, at least 1")
    return int(text)


def _exit(code: int) -> NoReturn:
    """At once: what JAX does at a regular exit is to wait for the others. Readers of data end too, stalled or not."""
    for child in multiprocessing.active_children():
        child.kill()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
