"""A process in a child of its own, so that a violent end of it still ends with a sentence; and children that end too.

JAX aborts a process whose coordinator is gone, the kernel kills one that runs out of memory; neither leaves room for a
last word. Here the parent, which knows nothing of JAX, waits for the child and says what happened.
"""

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping

PARENT_SECONDS = 1.0  # between two looks whether the parent lives
PR_SET_PDEATHSIG = 1  # Linux's prctl: a signal for this process when its parent dies

REASONS = {
    signal.SIGABRT: "JAX ended it, because process 0 is gone or cannot be reached any more (its lines are above)",
    signal.SIGKILL: "something killed it: a person, the scheduler, or the kernel when memory ran out",
}


def supervised(name: str, main: Callable[[], int]) -> int:
    """The exit code of `main`, run in a forked child; 1, after one line on stderr, where a signal ended that.

    SIGTERM is passed on; Ctrl-C reaches the child by itself. Has to be called before threads are started.
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
        f"{name}: ended by {number.name}: {REASONS.get(number, 'a crash')}; the same command continues", file=sys.stderr
    )
    return 1


def end_after(parent: int) -> None:
    """Ends this process soon after its `parent` (a process's number), however that ended; says so to nobody."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(PARENT_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, name="parent watch", daemon=True).start()


@contextlib.contextmanager
def handling(handlers: Mapping[int, Callable]) -> Iterator[None]:
    """These handlers of signals, by number, inside the block; those of before after it. In the main thread only."""
    previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
