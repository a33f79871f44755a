"""The two ways a command can fail, each with its exit code."""


class DkdmError(Exception):
    """A run failed: the message says what, where, what was expected and what to do."""

    exit_code = 1


class UsageError(DkdmError):
    """What was asked for cannot be done: a wrong value, path or combination of them."""

    exit_code = 2
