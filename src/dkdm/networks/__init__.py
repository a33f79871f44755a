"""Networks that diffusers does not have, which need torch and diffusers alone.

A student of one of them ships its source in one file, so that it loads without dkdm. Their configs
name `in_channels`, `out_channels`, `sample_size` and, with classes, `num_class_embeds`.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from typing import Any

from torch import nn

from dkdm.reading.allowed import library_class

HOMES: dict[str, str] = {
    "AdmUNet": "adm",
    "SongUNet": "edm",
    "DhariwalUNet": "edm",
    "EDM2UNet": "edm2",
    "LucidrainsUNet": "lucidrains",
    "UVit": "uvit",
    "LinearTransformer": "linear",
    "MobileUNet": "mobile",
    "ResidualMLP": "mlp",
}


def network_class(name: str) -> Any:
    """The class of a network by its name: from dkdm or diffusers; None if neither has it."""
    if name in HOMES:
        return getattr(importlib.import_module(f"dkdm.networks.{HOMES[name]}"), name)
    found = library_class("diffusers", name)
    return found if isinstance(found, type) and issubclass(found, nn.Module) else None


def shipped_source(kind: type) -> str:
    """The file of a network's class, with the parts that it imports written out."""
    parts = importlib.import_module("dkdm.networks.parts")
    first = "from __future__ import annotations\n"
    head, own = inspect.getsource(sys.modules[kind.__module__]).split(first)
    imported = re.compile(r"^from dkdm\.networks\.parts import (\([^)]*\)|.*)\n", re.MULTILINE)
    return head + first + inspect.getsource(parts).split(first)[1] + imported.sub("", own)
