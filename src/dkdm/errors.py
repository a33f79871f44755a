"""The errors dkdm raises on purpose."""


class DkdmError(Exception):
    """A run failed; the message names the value, what was expected and the remedy."""


class UsageError(DkdmError):
    """The request itself is wrong: an option, a path or a value that cannot work."""
