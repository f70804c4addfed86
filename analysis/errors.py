"""The two kinds of trouble that end a command with one line instead of a traceback."""


class UserError(ValueError):
    """A mistake the user can mend, such as asking for a figure before any run has finished: exit code 2."""


class BadFile(ValueError):
    """A file that is torn or was not written by this suite: exit code 1."""
