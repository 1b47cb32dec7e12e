"""The exceptions whose messages are written for users, and helpers that shorten foreign text for such messages."""


class UsageError(ValueError):
    """Bad input. The message is one line: what is wrong, where, and what would be right.

    The command line prints that line alone and exits with code 2.
    """


class Failed(RuntimeError):
    """A negative result for valid input, such as training that diverged or a plan that does not fit.

    The command line prints its message and exits with code 1.
    """


class Interrupted(RuntimeError):
    """A stop by SIGTERM or Ctrl-C (`signal`) after everything was saved; the same command continues.

    The command line prints its message and exits with 128 + `signal`.
    """

    def __init__(self, number: int, message: str):
        super().__init__(message)
        self.signal = number


LONGEST_SHOWN = 300  # characters of foreign text in one of our messages


def printable(words: str) -> str:
    """Returns `words` with control characters and undecodable bytes escaped, fit for a terminal and for UTF-8."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in words)


def shorten(value: object, longest: int = LONGEST_SHOWN) -> str:
    """Returns any value as printable text on one line of at most `longest` characters."""
    text = printable(" ".join(str(value).split()))
    return text if len(text) <= longest else text[: longest - 3] + "..."


def one_line(error: BaseException) -> str:
    """Returns an exception's message as `shorten` does, or the exception's class name if it has no message."""
    return shorten(error) or type(error).__name__
