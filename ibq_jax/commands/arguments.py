"""What the commands' argument parsers share."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from ibq_jax.base.errors import UsageError


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises UsageError, in one line, where argparse would print its usage and exit."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Raises UsageError with argparse's message."""
        raise UsageError(f"{self.prog}: {message} (see {self.prog} --help)")


def underscored(argv: list[str]) -> list[str]:
    """Flags with "_" for every "-", so that --data-dir and --data_dir are the same flag; values stay as they are."""
    return [_underscored(argument) if argument.startswith("--") else argument for argument in argv]


def _underscored(flag: str) -> str:
    name, equals, value = flag.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


def count(text: str) -> int:
    """argparse type: a whole number, at least 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 0")
    return int(text)


def positive(text: str) -> int:
    """argparse type: a whole number, at least 1."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)


def share(text: str) -> float:
    """argparse type: a number of at least 0, and below 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no fraction: at least 0, and below 1")
    return value


def numbers(kind: Callable[[str], float]) -> Callable[[str], tuple]:
    """argparse type: numbers of a `kind`, int or float, separated by commas."""

    def parse(text: str) -> tuple:
        try:
            return tuple(kind(part) for part in text.split(","))
        except ValueError:
            words = "whole numbers" if kind is int else "numbers"
            raise argparse.ArgumentTypeError(f"{text!r} is not {words} separated by commas") from None

    return parse


def output_file(text: str) -> Path:
    """argparse type: a file to write, in a folder that exists; known before hours of work, not after."""
    path = Path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {path.parent}")
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is a folder, not a file")
    return path
