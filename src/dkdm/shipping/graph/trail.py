"""Which module of a network could not become part of a graph, and why."""

from __future__ import annotations

from functools import partial
from linecache import getline
from typing import Any

import torch
from torch import nn

from dkdm.shipping.graph.fault_line import at_line, fault_frame, what_of

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
    return f"{trail.place(name)}: {what_of(error)}{_line_of(error)}"


def _line_of(error: BaseException) -> str:
    """The line of code at fault, as it is written."""
    frame = fault_frame(error)
    return "" if frame is None else f", at {at_line(*frame)} `{getline(*frame).strip()}`"
