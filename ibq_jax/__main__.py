"""`python -m ibq_jax COMMAND ...`, also installed as `ibq-jax`: runs a command, and turns errors into exit codes.

Exit codes: 0 done, 2 wrong use (one line says what), 1 failed, 143 (SIGTERM) or 130 (Ctrl-C) stopped with everything
saved. The last two are not 0, since a scheduler must see that work remains.

If several processes run a command together (IBQ_PROCESSES, see `ibq_jax.base.processes`), all get the same arguments;
only the first one prints more than errors.
"""

import contextlib
import errno
import importlib
import os
import sys
import traceback
from pathlib import Path

from ibq_jax.base.errors import Failed, Interrupted, UsageError, one_line
from ibq_jax.base.memory import collect_garbage_rarely
from ibq_jax.base.supervise import supervised

COMMANDS = {
    "prepare": "Makes a data set from openmoji, a folder of images, tar shards or ImageNet.",
    "train": "Trains a tokenizer or a generator from a config, or continues its run.",
    "tokenize": "Writes a token cache: the codes of a data set's images, or of images at their own sizes.",
    "export": "Converts a token cache to Megatron's IndexedDataset, JSON lines or Parquet.",
    "detokenize": "Decodes the codes of a token cache, or of such files, to images.",
    "sample": "Draws samples from a trained generator: a contact sheet, or a set to evaluate.",
    "evaluate": "Measures a tokenizer's reconstructions, a generator's likelihood, or a set of samples.",
    "report": "Writes one HTML page about a run, or about several side by side.",
    "convert": "Reads weights from PyTorch, writes weights for PyTorch, and resizes codebooks.",
    "sweep": "Trains a grid of configs, one after another or as jobs, and tabulates the results.",
    "plan": "Predicts memory, time and collectives of a config's training step on TPUs or GPUs that need not be here.",
}
TOGETHER = ("train", "tokenize", "sample", "evaluate")  # commands that several processes share
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST)


def main(argv: list[str] | None = None) -> int:
    """Runs the command that `argv` names (default: the command line), and returns its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help", "help"):
        print("usage: python -m ibq_jax COMMAND ...  (COMMAND --help lists its flags)\n")
        print("\n".join(f"  {name:10} {words}" for name, words in COMMANDS.items()))
        return 0
    name, *rest = argv
    if name not in COMMANDS:
        print(f"ibq_jax: there is no command {name!r}; the commands are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    if not os.environ.get("IBQ_PROCESSES"):
        return _run(name, rest)
    if name not in TOGETHER:
        print(f"ibq_jax {name}: runs in a single process only; unset IBQ_PROCESSES", file=sys.stderr)
        return 2
    return supervised(f"ibq_jax {name}", lambda: _run(name, rest))


def _run(name: str, argv: list[str]) -> int:
    cache = Path("~/.cache/ibq_jax/compiled").expanduser()
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))  # the second start skips most of the compilation
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")  # of a GPU; JAX's 0.75 leaves more than NCCL needs
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
    """Returns (the line to print, the exit code) of an error; the line is None if the program itself is at fault."""
    match error:
        case UsageError():
            return str(error), 2
        case OSError() if error.errno in DISK_FULL:
            return f"the disk is full ({error.filename or error}); free some space and run it again", 2
        case OSError() if error.errno in NOT_ALLOWED:
            return f"{error.filename}: {error.strerror}", 2
        case Failed():
            return str(error), 1
        case Interrupted():
            return str(error), 128 + error.signal
        case KeyboardInterrupt():
            return "interrupted", 130
    return None, 1


def start() -> None:
    """Runs a process that has nothing else to do than `main`, and ends it with its exit code."""
    collect_garbage_rarely()
    sys.exit(main())


if __name__ == "__main__":
    start()
