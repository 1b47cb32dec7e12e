"""The exceptions a person is meant to read."""


class UsageError(ValueError):
    """Bad input: its message is one line that says what is wrong, where, and what would be right.

    The command line prints that line alone and exits with code 2.
    """


class Failed(RuntimeError):
    """The input was fine and the answer is no: a training that went wrong, a plan that does not fit.

    The command line prints its message and exits with code 1.
    """
