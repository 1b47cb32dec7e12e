"""Runs a process in a supervised child, so that even a violent end is reported in a sentence; also signal handlers.

JAX aborts a process whose coordinator is gone, and the kernel kills one that exhausts the memory. Neither leaves time
for a message. Here the parent, which does not use JAX, waits for the child and reports what happened.
"""

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping

PARENT_SECONDS = 1.0  # between two checks that the parent is alive
PR_SET_PDEATHSIG = 1  # Linux's prctl: sends this process a signal when its parent dies

REASONS = {
    signal.SIGABRT: "JAX ended it, because process 0 is gone or can no longer be reached (see its lines above)",
    signal.SIGKILL: "it was killed by a person, by the scheduler, or by the kernel when memory ran out",
}


def supervised(name: str, main: Callable[[], int]) -> int:
    """Runs `main` in a forked child and returns its exit code, or 1, after one line on stderr, if a signal ended it.

    SIGTERM is passed on to the child; Ctrl-C reaches it directly. To be called before any thread is started.
    """
    child = os.fork()
    if not child:
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        return main()
    signal.signal(signal.SIGTERM, lambda number, _frame: os.kill(child, number))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code >= 0:
        return code
    number = signal.Signals(-code)
    if number == signal.SIGTERM:
        return 128 + number
    print(
        f"{name}: ended by {number.name}: {REASONS.get(number, 'it crashed')}; the same command continues",
        file=sys.stderr,
    )
    return 1


def end_after(parent: int) -> None:
    """Starts a thread that ends this process, without a message, soon after the process `parent` (its id) ended."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(PARENT_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, name="parent watch", daemon=True).start()


@contextlib.contextmanager
def handling(handlers: Mapping[int, Callable]) -> Iterator[None]:
    """Installs signal handlers, by signal number, inside the block, and the previous ones after it.

    Works in the main thread only.
    """
    previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
