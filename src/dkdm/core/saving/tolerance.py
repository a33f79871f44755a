"""Faults beside the training, which goes on: of the disk, of a tracker."""

from __future__ import annotations

import errno
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from dkdm.errors import DkdmError, in_a_line

DISK_FAULTS = (OSError, SafetensorError)  # safetensors reports a full disk by its own error
OF_THE_DISK = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.EIO, errno.ESTALE),
}


@contextmanager
def tolerated(what: str, folder: Path) -> Iterator[None]:
    """A block that writes to a folder and whose fault of the disk is a warning.

    what: what could not be done, and what happens now, as a sentence.
    """
    try:
        yield
    except DISK_FAULTS as error:
        warn(f"{what} ({in_a_line(error)}; {free_space(folder)})")


@contextmanager
def named_faults(folder: Path) -> Iterator[None]:
    """A block that cannot go on without the disk. Raises DkdmError in place of its faults, with
    the free space of the folder that it writes to."""
    try:
        yield
    except DISK_FAULTS as error:
        if isinstance(error, OSError) and error.errno not in OF_THE_DISK:
            raise
        raise DkdmError(
            f"{folder} cannot be written to or read ({in_a_line(error)}; {free_space(folder)}). "
            "Make room or restore the permission, and go on with --resume-from-checkpoint latest"
        ) from error


def free_space(folder: Path) -> str:
    """The space that is free on the disk of a folder, in words."""
    try:
        return f"{shutil.disk_usage(folder).free / 1e6:,.0f} MB are free in {folder}"
    except OSError:
        return f"{folder} cannot be read"


def warn(text: str) -> None:
    """Say loudly that something failed beside the training."""
    print(f"\nwarning: {text}", file=sys.stderr, flush=True)


def tracked(call: Callable[..., Any], *args: Any, **named: Any) -> None:
    """Call a tracker; whatever it raises is a warning."""
    try:
        call(*args, **named)
    except Exception as error:
        _once(f"a tracker failed, and the run goes on without it ({in_a_line(error)})")


_once = cache(warn)
