"""The processes of one job: how they find each other, check that they agree, and end together.

A launch script describes the job to each process in environment variables. Everything else is the same for one process
and for many:

    IBQ_PROCESSES       HOST:PORT,COUNT,INDEX: where process 0 listens, the number of processes, and this one's index;
                        or auto: JAX asks the platform (a TPU pod, Slurm, Kubernetes). Unset: one process.
    IBQ_START_TIMEOUT   seconds to wait until all processes have started (300)
    IBQ_PEER_TIMEOUT    seconds without a heartbeat after which a process counts as dead and the others end (60)
    NPROC               cores for XLA's threads, read by XLA itself. Unset: the cores of this host are divided equally
                        between the processes of the job that share them.

JAX alone would leave the survivors of a dead process hanging in a collective, or abort them with a signal, without a
message. Here every process writes a heartbeat, and the reason if it fails, into the job's key-value store. The others
read these, report which process failed and why, and exit with code 1. The same command then continues from the last
checkpoint.
"""

import contextlib
import json
import multiprocessing
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import jax
from jax._src.distributed import global_state  # no public name exists; tests/base/test_private_jax.py watches it
from jax.experimental import multihost_utils

from ibq_jax.base.errors import Failed, UsageError, one_line
from ibq_jax.base.revision import source_digest

PROCESSES, START_TIMEOUT, PEER_TIMEOUT = "IBQ_PROCESSES", "IBQ_START_TIMEOUT", "IBQ_PEER_TIMEOUT"
BARRIER_SECONDS = 3600  # longer than any work between two barriers; a dead process is noticed much sooner
HEARTBEAT_SECONDS = 1.0
LAST_WORDS_SECONDS = 3.0  # a failed process 0 lives on for this long: it holds the store where the others read why
HEARTBEATS, FAILURES, CORES = "ibq/heartbeats/", "ibq/failures/", "ibq/cores/"
XLA_THREADS = "NPROC"

_uses: dict[str, int] = {}  # how often each barrier's name was used, since JAX accepts a name only once
_watch: "_PeerWatch | None" = None


@dataclass(frozen=True)
class JobPosition:
    """The content of IBQ_PROCESSES. `coordinator` is HOST:PORT, or "" if JAX asks the platform for all three."""

    coordinator: str
    count: int
    index: int

    @classmethod
    def from_environment(cls) -> "JobPosition | None":
        """Reads IBQ_PROCESSES. Returns None for a job of one process; raises UsageError for a malformed value."""
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
            raise UsageError(f"{PROCESSES}={text}: indices count from 0, so the last one is {count - 1}")
        return cls(coordinator, count, index)


def join(command: str, stop_together: bool) -> None:
    """Waits for the other processes of the job, if there are any, and checks that they agree with this one.

    If some do not start in time, this process ends with a message and exit code 1.

    Args:
        command: the command that is run, for messages.
        stop_together: a SIGTERM to any process stops all of them at one step (`asked_to_stop`), instead of ending
            only that process.

    Raises:
        UsageError: a malformed environment variable, or processes that differ in their code or number of devices.
    """
    global _watch
    position = JobPosition.from_environment()
    if position is None:
        return
    start, peer = _seconds(START_TIMEOUT, 300), _seconds(PEER_TIMEOUT, 60)
    jax.config.update("jax_enable_preemption_service", stop_together)
    named: dict[str, Any] = dict(
        coordinator_address=position.coordinator, num_processes=position.count, process_id=position.index
    )
    with _exit_after(start, f"ibq_jax {command}: {_start_timeout_message(position, start)}"):
        jax.distributed.initialize(
            **(named if position.coordinator else {}),
            cluster_detection_method="deactivate" if position.coordinator else None,
            initialization_timeout=start + 60,  # after which JAX would abort
            heartbeat_timeout_seconds=10 * peer,
            shutdown_timeout_seconds=peer,
        )
        _share_cores(start + 60)
    _watch = _PeerWatch(command, peer)
    _watch.start()
    check_alike("processes", {"command": command, "devices": jax.local_device_count(), "code": source_digest()})


def leave() -> None:
    """Waits until all processes are done. To be called once, after the last collective operation."""
    global _watch
    if _watch is None:
        return
    barrier("end")
    _watch.stop()
    _watch = None
    jax.distributed.shutdown()


def fail(message: str, code: int) -> NoReturn:
    """Ends this process whatever its threads are doing; the other processes of its job report `message` and end too."""
    if _watch is None:
        _exit(code)
    _watch.mute()
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        _client().key_value_set(f"{FAILURES}{jax.process_index()}", message, allow_overwrite=True)
        if jax.process_index() == 0:
            time.sleep(LAST_WORDS_SECONDS)
    _exit(code)


def joined() -> bool:
    """Returns whether this process is one of several."""
    return _watch is not None


def index() -> int:
    """Returns this process's index; for a single process 0, without initializing JAX's devices."""
    return jax.process_index() if joined() else 0


def may_be_peer_failure(error: BaseException) -> bool:
    """Returns whether `error` is of the kind that a collective raises when another process is gone."""
    return isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in str(error)


def exit_if_a_peer_died(error: BaseException) -> None:
    """Waits, after a failed collective, until it is known which process died, and then ends with that message.

    Returns if `error` is of another kind, or if every process turns out to be alive.
    """
    if _watch is not None and may_be_peer_failure(error):
        print(f"{one_line(error)}: finding out which process is gone", file=sys.stderr)
        time.sleep(_watch.timeout + 5 * HEARTBEAT_SECONDS)  # the watch's thread ends this process meanwhile


def check_alike(what: str, mine: Mapping[str, object]) -> None:
    """Raises UsageError, in all processes alike, unless all have equal values under the names of `mine`."""
    if jax.process_count() == 1:
        return
    host = socket.gethostname()
    entries = _exchange(what, {"host": host, **json.loads(json.dumps(mine))})
    for index, entry in enumerate(entries):
        for name in mine:
            if entry.get(name) != entries[0].get(name):
                raise UsageError(
                    f"{what} differ: process {index} on {entry['host']} has {name} {entry.get(name)}, "
                    f"process 0 on {entries[0]['host']} has {entries[0].get(name)}"
                )


def first_failure(what: str, reason: str | None) -> str | None:
    """Returns the `reason` of the first process that has one, or None; the result is the same in all processes."""
    if jax.process_count() == 1:
        return reason
    for process, found in enumerate(_exchange(what, reason)):
        if found is not None:
            return f"in process {process}: {found}"
    return None


def barrier(name: str, seconds: float = BARRIER_SECONDS) -> None:
    """Waits until every process has reached this call. Raises Failed if that takes more than `seconds`."""
    if jax.process_count() == 1:
        return
    use = _uses[name] = _uses.get(name, 0) + 1
    try:
        _client().wait_at_barrier(f"ibq/{name}/{use}", int(1000 * seconds))
    except jax.errors.JaxRuntimeError as error:
        raise Failed(f"not all processes reached {name!r} within {seconds:g} s ({one_line(error)})") from error


def asked_to_stop(step: int) -> bool:
    """Returns whether all processes stop after this step because one received SIGTERM.

    Every process has to call it at every step.
    """
    return _watch is not None and multihost_utils.reached_preemption_sync_point(step)


class _PeerWatch(threading.Thread):
    """Writes this process's heartbeat, and ends it when another process failed or, as process 0 finds, is dead."""

    def __init__(self, command: str, timeout: int):
        super().__init__(name="peer watch", daemon=True)
        self.timeout = timeout
        self._command, self._ended, self._muted = command, threading.Event(), threading.Event()
        started = "at its start ", time.monotonic()  # all processes have started, or there would be no watch
        self._heard = {str(index): started for index in range(jax.process_count())}  # (last heartbeat, its time)

    def stop(self) -> None:
        self._ended.set()
        self.join()

    def mute(self) -> None:
        """Keeps the watch from ending this process, which is ending by itself."""
        self._muted.set()

    def run(self) -> None:
        client, mine = _client(), jax.process_index()
        beats = 0
        while not self._ended.wait(HEARTBEAT_SECONDS):
            beats += 1
            try:
                client.key_value_set(f"{HEARTBEATS}{mine}", f"on {socket.gethostname()} {beats}", allow_overwrite=True)
                if mine == 0:
                    self._find_the_dead(client)
                failures = dict(client.key_value_dir_get(FAILURES))
            except jax.errors.JaxRuntimeError as error:
                failures = {f"{FAILURES}0": f"can no longer be reached ({one_line(error)})"}
            for key, reason in failures.items():
                if not key.endswith(f"/{mine}"):
                    self._end_with(key.rpartition("/")[2], reason)

    def _find_the_dead(self, client) -> None:
        now = time.monotonic()
        for key, beat in client.key_value_dir_get(HEARTBEATS):
            index = key.rpartition("/")[2]
            if self._heard[index][0] != beat:
                self._heard[index] = beat, now
        for index, (beat, heard) in self._heard.items():
            if now - heard > self.timeout:
                where = beat.rpartition(" ")[0]
                reason = f"{where} sent no heartbeat for {self.timeout} s: it was killed, or its host is gone"
                client.key_value_set(f"{FAILURES}{index}", reason, allow_overwrite=True)

    def _end_with(self, index: str, reason: str) -> None:
        time.sleep(LAST_WORDS_SECONDS / 2)  # this process may be failing for the same reason
        if not self._muted.is_set():
            print(
                f"ibq_jax {self._command}: process {index} of {jax.process_count()} {reason}; this one ends too, "
                "the same command continues",
                file=sys.stderr,
            )
            _exit(1)


def _share_cores(seconds: int) -> None:
    """Divides the host's cores between the processes that share them, by setting NPROC unless it is set already.

    With one thread per core in each process, they would take the cores from each other while a collective waits for
    the slowest. To be called before JAX initializes its devices, since XLA starts its threads then.
    """
    if not hasattr(os, "sched_getaffinity"):  # only Linux has it
        return
    cores = sorted(os.sched_getaffinity(0))
    mine, client = json.dumps([socket.gethostname(), cores]), _client()
    client.key_value_set(f"{CORES}{global_state.process_id}", mine)
    client.wait_at_barrier(CORES, 1000 * seconds)
    sharing = [cores_of_one for _, cores_of_one in client.key_value_dir_get(CORES)].count(mine)
    if sharing > 1:
        os.environ.setdefault(XLA_THREADS, str(max(1, len(cores) // sharing)))


def _client() -> Any:
    """Returns the client of JAX's key-value store, which exists once `join` has been called."""
    assert global_state.client is not None
    return global_state.client


def _exchange(what: str, mine) -> list:
    """Returns every process's value of `mine` (after a round trip through JSON), in the order of their indices."""
    folder = f"ibq/{what}/{_uses.get(what, 0)}/"
    _client().key_value_set(f"{folder}{jax.process_index()}", json.dumps(mine))
    barrier(what)
    values = {int(key.rpartition("/")[2]): json.loads(text) for key, text in _client().key_value_dir_get(folder)}
    return [values[index] for index in range(jax.process_count())]


def _start_timeout_message(position: JobPosition, seconds: int) -> str:
    which = f"process {position.index} of {position.count}" if position.coordinator else "this process"
    at = position.coordinator or "the address that the platform names"
    return (
        f"{which} waited {seconds} s at {at} and not all others started; check that each runs and reaches that "
        f"address, or raise {START_TIMEOUT}"
    )


@contextlib.contextmanager
def _exit_after(seconds: float, message: str) -> Iterator[None]:
    """Ends the process with `message` if the block takes longer; an exception could not interrupt a wait inside JAX."""

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
        raise UsageError(f"{variable}={text} is not an integer number of seconds of at least 1")
    return int(text)


def _exit(code: int) -> NoReturn:
    """Exits at once, since a regular exit waits in JAX for the others; data reader processes are killed too."""
    for child in multiprocessing.active_children():
        child.kill()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
