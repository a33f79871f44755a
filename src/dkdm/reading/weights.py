"""Files of weights that are something else, or hold more than weights."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch

from dkdm.errors import DkdmError, UsageError


def refuse_other_content(path: Path) -> None:
    """Raise UsageError for a file that is a checkpoint by its name alone.

    Such as a Git LFS pointer, a web page that was saved instead of the file, or a GGUF file.
    """
    try:
        with path.open("rb") as file:
            start = file.read(256).lstrip().lower()
    except OSError as error:
        raise DkdmError(f"{path} cannot be read: {error}") from error
    found = next((what for first, what in _OTHER_CONTENT.items() if start.startswith(first)), None)
    if found:
        raise UsageError(f"{path}: {found}")


_PAGE = "a web page, not weights: download the file again (log in first if its page asks for that)"
_OTHER_CONTENT = {
    b"version https://git-lfs": "a Git LFS pointer, not weights: run git lfs pull in its folder",
    b"<!doctype": _PAGE,
    b"<html": _PAGE,
    b"<?xml": _PAGE,
    b'{"error': _PAGE,
    b"gguf": "a GGUF file, whose weights are quantized: give the file or the diffusers folder "
    "that it was made from",
}


def refuse_other_contents(folder: Path) -> None:
    """Call `refuse_other_content` for every file of weights that lies directly in a folder."""
    weights = [path for path in sorted(folder.glob("*")) if path.suffix in (".safetensors", ".bin")]
    files = [path for path in weights if path.is_file()]
    for path in files:
        refuse_other_content(path)
    if any(path.suffix == ".safetensors" for path in files):
        return  # which are read instead
    for path in files:
        names: list[str] = []
        with suppress(Exception):  # a damaged pickle may raise anything: what reads it says so
            names = unknown_names(path)
        if names:
            raise more_than_weights(path, names)


def unknown_names(path: Path) -> list[str]:
    """Classes and functions in a checkpoint that torch does not know as harmless.

    Before torch 1.6 a checkpoint was no zip file; `torch.load` itself refuses them there.
    """
    zipped = zipfile.is_zipfile(path)
    return torch.serialization.get_unsafe_globals_in_checkpoint(path) if zipped else []


def more_than_weights(path: Path, names: Sequence[str]) -> UsageError:
    """The error that says that a checkpoint holds what would run as code."""
    return UsageError(
        f"{path}: holds more than weights ({', '.join(names[:3])}), which would run as code. If "
        "you trust it, save its state dict alone: "
        "torch.save(torch.load(path, weights_only=False)['state_dict'], 'weights.pt')"
    )
