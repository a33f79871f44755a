"""Signals that ask a run to stop: it ends its step, saves, and can go on later."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

RESUMABLE = 75  # EX_TEMPFAIL of sysexits.h: try again later
NAMES = ("SIGTERM", "SIGINT", "SIGUSR1")  # SIGUSR1: what Slurm is told to send before its end


PASSED_ON = 1.0  # seconds in which the same signal comes again from a launcher that passes it on


class Stopped(KeyboardInterrupt):
    """A signal stopped the run; what it has done is saved, or is in the last checkpoint."""


class _State:
    """Of this process: signals are its own, and not one run's."""

    number: int | None = None  # of the signal that came
    came: float = 0.0  # when
    blocks: int = 0  # that must end first


@contextmanager
def answering_signals() -> Iterator[None]:
    """Let the first signal raise Stopped, as soon as no `whole` block is open; the next one
    ends the process at once. Other threads than the main one have no signals to answer.

    A launcher of several processes passes a signal on that they may have got already: what comes
    within a second is not the next one for them.
    """
    try:
        before = {number: signal.signal(number, _answer) for number in _numbers()}
    except ValueError:
        yield
        return
    _State.number = None
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _State.number = None  # of this run: a later one, which answers no signals, goes on


def _answer(number: int, frame: FrameType | None) -> None:
    del frame
    several = os.environ.get("WORLD_SIZE", "1") != "1"
    if _State.number is not None:
        if time.monotonic() - _State.came > PASSED_ON:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        return
    _State.number, _State.came = number, time.monotonic()
    for each in () if several else _numbers():
        signal.signal(each, signal.SIG_DFL)  # which ends a process that is stuck in C too
    if not _State.blocks:
        raise _stopped()
    name = signal.Signals(number).name
    print(
        f"\n{name}: the run saves and stops; again: it stops at once", file=sys.stderr, flush=True
    )


def _numbers() -> list[int]:
    return [getattr(signal, name) for name in NAMES if hasattr(signal, name)]


@contextmanager
def whole() -> Iterator[None]:
    """A block that a signal does not interrupt: Stopped is raised at its end."""
    _State.blocks += 1
    try:
        yield
    finally:
        _State.blocks -= 1
    if _State.number is not None and not _State.blocks:
        raise _stopped()


@contextmanager
def stopping_together() -> Iterator[None]:
    """Let a signal to one of several processes stop all of them, where `agree` is called."""
    from dkdm.core import processes  # torch, which a command's help does not wait for

    several = int(processes.world() > 1)
    _State.blocks += several
    try:
        yield
    finally:
        _State.blocks -= several


def agree() -> None:
    """Raise Stopped if a signal came to any process; together."""
    from dkdm.core import processes

    if processes.world() > 1 and processes.any_of(_State.number is not None):
        raise _stopped()


def _stopped() -> Stopped:
    name = "a signal" if _State.number is None else signal.Signals(_State.number).name
    return Stopped(
        f"stopped by {name}; the same command with --resume-from-checkpoint latest goes on"
    )
