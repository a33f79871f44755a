"""The line of a user's code at which something went wrong."""

from __future__ import annotations

import re
import sysconfig
import traceback
from pathlib import Path

import accelerate
import diffusers
import torch
from torch import nn

_DIFFUSERS = Path(str(diffusers.__file__)).parent
_LIBRARIES = [Path(str(p.__file__)).parent for p in (torch, accelerate)]
_LIBRARIES.append(Path(__file__).parents[2])
_STANDARD = Path(sysconfig.get_path("stdlib"))
_PACKAGES = {Path(sysconfig.get_path(name)) for name in ("purelib", "platlib")}

Frame = tuple[str, int]


def in_a_line(error: BaseException, network: nn.Module | None = None) -> str:
    """An error in one line, with the line of the user's code that raised it."""
    return what_of(error) + in_brackets(fault_line(error, network))


def what_of(error: BaseException) -> str:
    """An error in one line; what tracing says of control flow is put into words."""
    first = (str(error).strip().splitlines() or [""])[0]
    if "data-dependent" in first:
        return "its Python code decides by the value of a tensor"
    return f"{type(error).__name__}: {first[:200]}"


def in_brackets(text: str | None) -> str:
    """Text to append to a sentence; nothing for None."""
    return f" ({text})" if text else ""


def fault_line(error: BaseException, network: nn.Module | None = None) -> str | None:
    """File, line and module of the innermost frame in the user's code, or None."""
    frame = fault_frame(error)
    return None if frame is None else at_line(*frame, network)


def fault_frame(error: BaseException) -> Frame | None:
    """File and line of the innermost frame in the user's code, otherwise in diffusers, or None.

    Tracing names frames in the text of its errors only, so that is read too.
    """
    frames = [(name, int(n)) for name, n in re.findall(r'File "([^"]+)", line (\d+)', str(error))]
    chain: BaseException | None = error
    while chain is not None:
        stack = traceback.extract_tb(chain.__traceback__)
        frames = [*((frame.filename, frame.lineno or 0) for frame in stack), *frames]
        chain = chain.__cause__
    outside = [frame for frame in frames if not _is_of_a_library(Path(frame[0]))]
    users = [frame for frame in outside if not Path(frame[0]).is_relative_to(_DIFFUSERS)]
    return next(reversed(users or outside), None)


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
