"""`python -m ibq_jax COMMAND ...`: hands over to `ibq_jax.commands`, and turns errors into one line and an exit code.

Exit codes: 0 done, 2 wrong use (one line says what), 1 failed, 143 (SIGTERM) or 130 (Ctrl-C) stopped with everything
saved: not 0, since a scheduler must see that the work is not done.
"""

import errno
import importlib
import os
import sys
from pathlib import Path

from ibq_jax.base.errors import Failed, UsageError

COMMANDS = {
    "prepare": "makes a data set: openmoji, a folder of images, tar shards, ImageNet",
    "train": "trains a config in a work folder, or continues what is there",
    "sample": "draws pictures from a trained generator: a sheet to look at, or a set to evaluate",
    "evaluate": "measures a tokenizer's reconstructions, a generator's likelihood or generated pictures",
    "report": "one HTML page of a run, or of several side by side: curves, pictures, numbers, what to try",
    "convert": "weights from PyTorch and to PyTorch, and runs of another codebook size",
    "tokenize": "stores the codes that a tokenizer gives a data set's images, to train a generator on",
    "plan": "compiles a config's training step for TPUs that are not here: memory, time at best, collectives",
}
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST)


def main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print("usage: python -m ibq_jax COMMAND ...  (COMMAND --help tells its flags)\n")
        print("\n".join(f"  {name:10} {words}" for name, words in COMMANDS.items()))
        return 0
    name, *rest = argv
    if name not in COMMANDS:
        print(f"ibq_jax: there is no command {name!r}; the commands are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    cache = Path("~/.cache/ibq_jax/compiled").expanduser()
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))  # the second start skips most of the compilation
    from ibq_jax.base.loop import Interrupted  # not before --help: JAX takes a second to import

    try:
        importlib.import_module(f"ibq_jax.commands.{name}").main(rest)
    except UsageError as error:
        print(f"ibq_jax {name}: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno in DISK_FULL:
            print(f"ibq_jax {name}: the disk is full ({error.filename or error}); free room and rerun", file=sys.stderr)
        elif error.errno in NOT_ALLOWED:
            print(f"ibq_jax {name}: {error.filename}: {error.strerror}", file=sys.stderr)
        else:
            raise
        return 2
    except Failed as failed:
        print(f"ibq_jax {name}: {failed}", file=sys.stderr)
        return 1
    except Interrupted as interrupted:
        print(f"ibq_jax {name}: {interrupted}", file=sys.stderr)
        return 128 + interrupted.signal
    except KeyboardInterrupt:
        print(f"ibq_jax {name}: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
