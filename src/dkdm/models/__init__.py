"""Pretrained models as a Denoiser: `load_teacher`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dkdm.models.formats.originals import FORMATS
    from dkdm.models.loading import chosen_teacher, load_teacher, with_texts
    from dkdm.models.locate import builtin_names
    from dkdm.models.options import LoadOptions
    from dkdm.models.sketch import sketch_teacher

__all__ = [
    "FORMATS",
    "LoadOptions",
    "builtin_names",
    "chosen_teacher",
    "load_teacher",
    "sketch_teacher",
    "with_texts",
]

_HOMES = {
    "FORMATS": "formats.originals",
    "LoadOptions": "options",
    "builtin_names": "locate",
    "chosen_teacher": "loading",
    "load_teacher": "loading",
    "sketch_teacher": "sketch",
    "with_texts": "loading",
}


def __getattr__(name: str) -> Any:
    """Import a name when it is first asked for: who only reads a folder needs no diffusers."""
    if name not in _HOMES:
        raise AttributeError(f"module 'dkdm.models' has no attribute '{name}'")
    return getattr(importlib.import_module(f"dkdm.models.{_HOMES[name]}"), name)
