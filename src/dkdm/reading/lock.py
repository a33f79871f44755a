"""One writer at a time: a lock on a folder that ends with the process that holds it."""

from __future__ import annotations

import importlib
import json
import os
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dkdm.errors import UsageError

fcntl: Any = None
with suppress(ImportError):  # on Windows, where nothing is locked
    fcntl = importlib.import_module("fcntl")

LOCK = ".lock"
TRIES, PAUSE = 5, 0.02  # seconds; `holder` looks for an instant


@contextmanager
def locked(folder: Path, what: str, wait: bool = False) -> Iterator[None]:
    """Hold a folder while the block runs. The system lets go of it when the process ends, however
    it does, so that no lock is stale.

    what: the holder, for the message. wait: for another process that holds the folder; otherwise
    UsageError is raised. A file system that knows no locks is warned of.
    """
    path = folder / LOCK
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)  # of whom the umask lets write
    try:
        if not _taken(file, wait):
            raise UsageError(
                f"{folder} is being written by {holder(folder) or 'another process'}: wait for its "
                "end, stop it, or give another folder"
            )
        os.ftruncate(file, 0)
        about = {"pid": os.getpid(), "host": platform.node(), "what": what}
        os.write(file, json.dumps(about).encode())
        yield
    finally:
        os.close(file)


def _taken(file: int, wait: bool) -> bool:
    for _ in range(TRIES - 1):
        if _take(file, wait):
            return True
        time.sleep(PAUSE)
    return _take(file, wait)


def _take(file: int, wait: bool) -> bool:
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        print(
            f"warning: this file system knows no locks ({error.strerror}): do not start another "
            "run in this folder",
            file=sys.stderr,
        )
    return True


def holder(folder: Path) -> str | None:
    """Who holds a folder, in words; None if nobody does."""
    path = folder / LOCK
    if not path.is_file() or fcntl is None:
        return None
    with suppress(OSError), path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return _in_words(file.read(1000))
    return None


def _in_words(about: bytes) -> str:
    try:
        found = json.loads(about)
        return f"process {int(found['pid'])} on {found['host']} ({found['what']})"
    except (ValueError, KeyError, TypeError):
        return "another process"
