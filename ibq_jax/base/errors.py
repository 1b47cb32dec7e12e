"""The exceptions a person is meant to read."""


class UsageError(ValueError):
    """Bad input: its message is one line that says what is wrong, where, and what would be right.

    The command line prints that line alone and exits with code 2.
    """


class Failed(RuntimeError):
    """The input was fine and the answer is no: a training that went wrong, a plan that does not fit.

    The command line prints its message and exits with code 1.
    """


class Interrupted(RuntimeError):
    """A SIGTERM or Ctrl-C (`signal`) was honoured: everything is saved, and the same command continues.

    The command line prints its message and exits with 128 + `signal`.
    """

    def __init__(self, number: int, message: str):
        super().__init__(message)
        self.signal = number


LONGEST_SHOWN = 300  # characters of a foreign message in ours


def printable(words: str) -> str:
    """`words` with control characters and undecodable bytes escaped, fit for a terminal and for UTF-8."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in words)


def one_line(error: BaseException) -> str:
    """What a library says of foreign bytes: printable, on one line, not too long, never nothing."""
    words = printable(" ".join(str(error).split())) or type(error).__name__
    return words if len(words) <= LONGEST_SHOWN else words[: LONGEST_SHOWN - 3] + "..."
