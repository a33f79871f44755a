"""What went wrong in a network: in which module, and at which line of whose code."""

from __future__ import annotations

import re
import sysconfig
import traceback
from collections.abc import Iterator
from functools import partial
from linecache import getline
from pathlib import Path
from typing import Any

import accelerate
import diffusers
import torch
from torch import nn

_DIFFUSERS = Path(str(diffusers.__file__)).parent
_LIBRARIES = [Path(str(p.__file__)).parent for p in (torch, accelerate)]
_LIBRARIES.append(Path(__file__).parents[2])
_STANDARD = Path(sysconfig.get_path("stdlib"))
_PACKAGES = {Path(sysconfig.get_path(name)) for name in ("purelib", "platlib")}


def in_a_line(error: BaseException, network: nn.Module | None = None) -> str:
    """An error in one line, with the line of the user's code that raised it."""
    return what_of(error) + fault_line(error, network)


def what_of(error: BaseException) -> str:
    """An error in one line; what tracing says of control flow is put into words."""
    first = (str(error).strip().splitlines() or [""])[0]
    if "data-dependent" in first:
        return "its Python code decides by the value of a tensor"
    return f"{type(error).__name__}: {first[:200]}"


def fault_line(error: BaseException, network: nn.Module | None = None) -> str:
    """The innermost line of the user's code and its module, in brackets; empty if none is there."""
    frame = fault_frame(error)
    return "" if frame is None else f" ({at_line(*frame, network)})"


def fault_frame(error: BaseException) -> tuple[str, int] | None:
    """File and line of the innermost frame in the user's code, otherwise in diffusers, or None.

    Tracing names frames in the text of its errors only, so that is read too.
    """
    frames = [(name, int(n)) for name, n in re.findall(r'File "([^"]+)", line (\d+)', str(error))]
    for each in causes(error):
        stack = traceback.extract_tb(each.__traceback__)
        frames = [*((frame.filename, frame.lineno or 0) for frame in stack), *frames]
    outside = [frame for frame in frames if not _is_of_a_library(Path(frame[0]))]
    users = [frame for frame in outside if not Path(frame[0]).is_relative_to(_DIFFUSERS)]
    return next(reversed(users or outside), None)


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and its causes, the first cause last."""
    while error is not None:
        yield error
        error = error.__cause__


def at_line(file: str, line: int, network: nn.Module | None = None) -> str:
    """`nets.py:12`, and which module of the network that is."""
    path = Path(file)
    here = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    for name, module in network.named_modules() if network is not None else ():
        code = getattr(type(module).forward, "__code__", None)
        if code and code.co_filename == file:
            last = max(number or 0 for _, _, number in code.co_lines())
            if code.co_firstlineno <= line <= last:
                return f"{here}:{line}, in {name or type(module).__name__}"
    return f"{here}:{line}"


def _is_of_a_library(path: Path) -> bool:
    if str(path).startswith("<") or any(path.is_relative_to(each) for each in _LIBRARIES):
        return True
    return path.is_relative_to(_STANDARD) and not any(map(path.is_relative_to, _PACKAGES))


HINT = (
    "use torch.where and masks instead of Python's `if`, `for` and `int` on values of tensors, or "
    "leave the network to diffusers and PyTorch"
)


class Trail:
    """Follows a trace through the modules.

    running: names of the modules that run now, the innermost last; after a failure, those it
    happened in. fixed_in: the module in which the batch size became a plain number, or None.
    """

    def __init__(self, network: nn.Module) -> None:
        self.running: list[str] = []
        self.fixed_in: str | None = None
        self.sizes: list[Any] = []
        self.kinds = {name: type(module).__name__ for name, module in network.named_modules()}
        self.hooks = [
            hook
            for name, module in network.named_modules()
            for hook in (
                module.register_forward_pre_hook(partial(self._enter, name), with_kwargs=True),
                module.register_forward_hook(partial(self._leave, name)),
            )
        ]

    def remove(self) -> None:
        """Take the hooks off the network."""
        for hook in self.hooks:
            hook.remove()

    def _enter(self, name: str, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        del module, args
        if not self.running:
            self.sizes = [value.shape[0] for value in kwargs.values()]
        self._look()
        self.running.append(name)

    def _leave(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        del name, module, args, output
        self._look()
        self.running.pop()

    def _look(self) -> None:
        if self.fixed_in is None and self.running and not all(map(_is_variable, self.sizes)):
            self.fixed_in = self.running[-1]

    def place(self, name: str) -> str:
        """A module as it is called in messages: its path in the network, and its class."""
        inner = name.removeprefix("network").removeprefix(".")
        return f"{inner} ({self.kinds[name]})" if inner else self.kinds["network"]


def _is_variable(size: Any) -> bool:
    return isinstance(size, torch.SymInt) and size.node.maybe_as_int() is None


def reason(error: BaseException, trail: Trail) -> str:
    """What failed, in which module, and at which line of whose code."""
    if trail.fixed_in is not None and "Constraints violated" in str(error):
        return (
            f"{trail.place(trail.fixed_in)} works for one batch size only: in it the batch becomes "
            "a plain number (len(x), int(x.shape[0]) or x.tolist())"
        )
    name = trail.running[-1] if trail.running else "network"
    frame = fault_frame(error)
    line = "" if frame is None else f", at {at_line(*frame)} `{getline(*frame).strip()}`"
    return f"{trail.place(name)}: {what_of(error)}{line}"
