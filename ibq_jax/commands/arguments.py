"""The argument parser of every command, and the types of its flags."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from ibq_jax.base.config import PREFIX
from ibq_jax.base.errors import UsageError


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose help ends with examples and whose errors are UsageErrors of one line.

    Flags are declared and shown with dashes; underscores are accepted too (--data_dir). Overrides of config fields,
    such as --config.data.image_size=64, are left as they are.

    Args:
        command: the word after `python -m ibq_jax`.
        description: sentences at the top of the help.
        examples: the arguments of example commands; a line break continues the command on the next line.
        notes: paragraphs between the flags and the examples.
        prog: used instead of `command` by argparse's subparsers.
        **options: passed on to ArgumentParser.
    """

    def __init__(
        self,
        command: str = "",
        description: str = "",
        examples: Sequence[str] = (),
        notes: str = "",
        *,
        prog: str = "",
        **options,
    ):
        lines = [f"  python -m ibq_jax {command} {example}".replace("\n", " \\\n      ") for example in examples]
        super().__init__(
            prog=prog or f"python -m ibq_jax {command}",
            description=description,
            epilog="\n".join([*([notes, ""] if notes else []), *(["examples:", *lines] if lines else [])]),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            **options,
        )

    def parse_known_args(self, args=None, namespace=None):
        """Parses `args`, reading "_" in the names of flags as "-"."""
        args = sys.argv[1:] if args is None else args
        return super().parse_known_args([_dashed(argument) for argument in args], namespace)

    def error(self, message: str) -> NoReturn:
        """Raises UsageError with argparse's message."""
        raise UsageError(f"{self.prog}: {message} (see {self.prog} --help)")


def _dashed(argument: str) -> str:
    if not argument.startswith("--") or argument.startswith(PREFIX):
        return argument
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value


def count(text: str) -> int:
    """argparse type: an integer of at least 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer of at least 0")
    return int(text)


def positive(text: str) -> int:
    """argparse type: an integer of at least 1."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer of at least 1")
    return int(text)


def share(text: str) -> float:
    """argparse type: a fraction, at least 0 and below 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a fraction of at least 0 and below 1")
    return value


def numbers(kind: Callable[[str], float]) -> Callable[[str], tuple]:
    """Returns an argparse type: numbers of a `kind` (int or float), separated by commas."""

    def parse(text: str) -> tuple:
        try:
            return tuple(kind(part) for part in text.split(","))
        except ValueError:
            words = "integers" if kind is int else "numbers"
            raise argparse.ArgumentTypeError(f"{text!r} is not {words} separated by commas") from None

    return parse


def output_file(text: str) -> Path:
    """argparse type: a file to write, whose folder must exist; checked before hours of work, not after."""
    path = Path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"the folder {path.parent} does not exist")
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is a folder, not a file")
    return path
