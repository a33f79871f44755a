"""What this machine made itself, so that it opens its runs without being given their code.

A record is a small file in the user's data directory, outside of every run: the hash of what a run
names (a factory with all that it is called with), and the files that it was imported from. A folder
that somebody else made has no record, and neither has one whose config was changed.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from dkdm.reading.files import atomic
from dkdm.reading.plugins import is_installed, places_of

HOME = "DKDM_DATA_HOME"


def data_home() -> Path:
    """The folder of records: DKDM_DATA_HOME, or `dkdm` in the user's data directory."""
    if os.environ.get(HOME):
        return Path(os.environ[HOME])
    usual = {"win32": os.environ.get("LOCALAPPDATA"), "darwin": "~/Library/Application Support"}
    home = os.environ.get("XDG_DATA_HOME") or usual.get(sys.platform) or "~/.local/share"
    return Path(home).expanduser() / "dkdm"


def remember(facts: Mapping[str, Any], module: str) -> None:
    """Record that this machine wrote these facts, of which code is `module`.

    If the data directory cannot be written, a warning says so once.
    """
    try:
        path, files = _record(facts), {str(p) for p in places_of(module)[-1:]}
        known = _read(path)
        if files <= known:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic(path) as partial:
            partial.write_text(json.dumps(sorted(known | files)) + "\n", encoding="utf-8")
    except (OSError, RuntimeError) as error:  # a home that is missing or read-only
        _say_once(
            f"warning: no record of this run can be kept ({error}). Name its code when you open it "
            f"(--student-factory), or set {HOME} to a folder that can be written"
        )


@cache
def _say_once(text: str) -> None:
    print(text, file=sys.stderr)


def was_made_here(facts: Mapping[str, Any], module: str) -> bool:
    """Whether this machine wrote these facts, and `module` still is the file that it was."""
    files = _read(_record(facts))
    places = places_of(module)[-1:]
    return bool(files) and any(str(p) in files or is_installed(p) for p in places)


def _record(facts: Mapping[str, Any]) -> Path:
    known = {key: value for key, value in facts.items() if value is not None}
    text = json.dumps(known, sort_keys=True, separators=(",", ":"))
    return data_home() / "made-here" / f"{hashlib.sha256(text.encode()).hexdigest()}.json"


def _read(path: Path) -> set[str]:
    """The files of a record; none if it is missing, damaged or another user's."""
    try:
        if hasattr(os, "getuid") and path.stat().st_uid != os.getuid():
            return set()
        return set(map(str, json.loads(path.read_text(encoding="utf-8"))))
    except (OSError, ValueError, TypeError, RuntimeError):
        return set()
