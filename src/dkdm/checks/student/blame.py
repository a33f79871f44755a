"""Where in the user's own code something went wrong."""

from __future__ import annotations

import re
import sysconfig
import traceback
from pathlib import Path

import accelerate
import diffusers
import torch
from torch import nn

_LIBRARIES = [Path(str(p.__file__)).parent for p in (torch, diffusers, accelerate)]
_LIBRARIES.append(Path(__file__).parents[2])
_STANDARD = Path(sysconfig.get_path("stdlib"))
_PACKAGES = {Path(sysconfig.get_path(name)) for name in ("purelib", "platlib")}


def told(error: BaseException, network: nn.Module | None = None) -> str:
    """An error in one line, with the place in the user's code where it came up."""
    lines = str(error).strip().splitlines() or [""]
    text = f"{type(error).__name__}: {lines[0][:200]}"
    return text + in_brackets(place(error, network))


def in_brackets(text: str | None) -> str:
    """Something to be said after something else, if there is something."""
    return f" ({text})" if text else ""


def place(error: BaseException, network: nn.Module | None = None) -> str | None:
    """File, line and module of the innermost frame in the user's code; None where there is none.

    The tracing of torch tells frames in the text of its errors only, so that is read too.
    """
    told_frames = re.findall(r'File "([^"]+)", line (\d+)', str(error))
    frames = [(name, int(line)) for name, line in told_frames]
    chain: BaseException | None = error
    while chain is not None and not any(_is_users(name) for name, _ in frames):
        frames = [(f.filename, f.lineno or 0) for f in traceback.extract_tb(chain.__traceback__)]
        chain = chain.__cause__
    users = [frame for frame in frames if _is_users(frame[0])]
    return at_line(*users[-1], network) if users else None


def at_line(file: str, line: int, network: nn.Module | None) -> str:
    """`nets.py:12`, and which module of the network that is."""
    shown = f"{_short(file)}:{line}"
    for name, module in network.named_modules() if network is not None else ():
        code = getattr(type(module).forward, "__code__", None)
        if code and code.co_filename == file:
            last = max(number or 0 for _, _, number in code.co_lines())
            if code.co_firstlineno <= line <= last:
                return f"{shown}, in {name or type(module).__name__}"
    return shown


def _short(file: str) -> str:
    path = Path(file)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _is_users(file: str) -> bool:
    path = Path(file)
    if file.startswith("<") or any(path.is_relative_to(library) for library in _LIBRARIES):
        return False
    return not path.is_relative_to(_STANDARD) or any(path.is_relative_to(p) for p in _PACKAGES)
