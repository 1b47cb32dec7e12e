"""The one exception a person is meant to read."""


class UsageError(ValueError):
    """Bad input: its message is one line that says what is wrong, where, and what would be right.

    The command line prints that line alone and exits with code 2.
    """
