"""`python -m ibq_jax COMMAND ...`: hands over to `ibq_jax.commands`, and turns errors into one line and an exit code.

Exit codes: 0 done, 2 wrong use (one line says what), 1 failed, 143 (SIGTERM) or 130 (Ctrl-C) stopped with everything
saved: not 0, since a scheduler must see that the work is not done.

Run by several processes at once (IBQ_PROCESSES, see `ibq_jax.base.processes`), all are given the same arguments; the
first one talks, the others print nothing but errors.
"""

import contextlib
import errno
import importlib
import os
import sys
import traceback
from pathlib import Path

from ibq_jax.base.errors import Failed, Interrupted, UsageError, one_line
from ibq_jax.base.supervise import supervised

COMMANDS = {
    "prepare": "makes a data set: openmoji, a folder of images, tar shards, ImageNet",
    "train": "trains a config in a work folder, or continues what is there",
    "sweep": "trains a grid of configs, a point after the other or a job each: one table, plots, spread over seeds",
    "sample": "draws pictures from a trained generator: a sheet to look at, or a set to evaluate",
    "evaluate": "measures a tokenizer's reconstructions, a generator's likelihood or generated pictures",
    "report": "one HTML page of a run, or of several side by side: curves, pictures, numbers, what to try",
    "convert": "weights from PyTorch and to PyTorch, and runs of another codebook size",
    "tokenize": "stores the codes that a tokenizer gives a data set's images, to train a generator on",
    "plan": "compiles a config's training step for TPUs that are not here: memory, time at best, collectives",
}
TOGETHER = ("train", "tokenize", "sample", "evaluate")  # commands that several processes share
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST)


def main(argv: list[str] | None = None) -> int:
    """Runs the command that `argv` (default: the command line's words) names, and returns its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help", "help"):
        print("usage: python -m ibq_jax COMMAND ...  (COMMAND --help tells its flags)\n")
        print("\n".join(f"  {name:10} {words}" for name, words in COMMANDS.items()))
        return 0
    name, *rest = argv
    if name not in COMMANDS:
        print(f"ibq_jax: there is no command {name!r}; the commands are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    if not os.environ.get("IBQ_PROCESSES"):
        return _run(name, rest)
    if name not in TOGETHER:
        print(f"ibq_jax {name}: it runs in one process: unset IBQ_PROCESSES", file=sys.stderr)
        return 2
    return supervised(f"ibq_jax {name}", lambda: _run(name, rest))


def _run(name: str, argv: list[str]) -> int:
    cache = Path("~/.cache/ibq_jax/compiled").expanduser()
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))  # the second start skips most of the compilation
    from ibq_jax.base import processes  # not before --help: JAX takes a second to import

    try:
        processes.join(name, stop_together=name == "train")
        with _silent() if processes.index() else contextlib.nullcontext():
            importlib.import_module(f"ibq_jax.commands.{name}").main(argv)
        processes.leave()
        return 0
    except (Exception, KeyboardInterrupt) as error:
        words, code = _explained(error)
        if words is None:
            if processes.joined():
                processes.exit_if_a_peer_died(error)
                traceback.print_exc()
                processes.fail(one_line(error), 1)
            raise
        print(f"ibq_jax {name}: {words}", file=sys.stderr)
        if isinstance(error, Interrupted):
            processes.leave()
        elif processes.joined():
            processes.fail(words, code)
        return code


@contextlib.contextmanager
def _silent():
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def _explained(error: BaseException) -> tuple[str | None, int]:
    """(the one line for an error that a person is meant to read, the exit code); None for a fault of this program."""
    match error:
        case UsageError():
            return str(error), 2
        case OSError() if error.errno in DISK_FULL:
            return f"the disk is full ({error.filename or error}); free room and rerun", 2
        case OSError() if error.errno in NOT_ALLOWED:
            return f"{error.filename}: {error.strerror}", 2
        case Failed():
            return str(error), 1
        case Interrupted():
            return str(error), 128 + error.signal
        case KeyboardInterrupt():
            return "interrupted", 130
    return None, 1


if __name__ == "__main__":
    sys.exit(main())
