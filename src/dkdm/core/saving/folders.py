"""Folders that are there whole or not at all: written beside, hashed, flushed to disk, renamed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from dkdm.core import processes
from dkdm.core.saving.tolerance import DISK_FAULTS
from dkdm.errors import DkdmError, UsageError
from dkdm.reading.fields import read_json, read_text
from dkdm.reading.files import flush_folder, unfinished, write_text
from dkdm.reading.places import check_folder, inside

MANIFEST = "manifest.json"
SUMS = "SHA256SUMS"
HASHED = (".safetensors", ".json")  # what nobody but the writer of a folder puts there


def write_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Create `folder` with what `fill` writes, or nothing at all.

    The files are written beside it, their sizes and hashes into a manifest, all flushed to disk and
    renamed. A folder that is there is moved aside first and deleted last: `restore_folder` brings
    it back after a kill in between.
    """
    try:
        _begin(folder)
        fill(_partial(folder))
        _finish(folder)
    except BaseException:
        _undo(folder)
        raise


def write_together(folder: Path, fill: Callable[[Path], None]) -> None:
    """`write_folder` by all processes, each of which fills in its part; together.

    If the disk fails one of them, all raise an OSError with its words, and nothing is left.
    """
    main = processes.is_main()
    steps = _begin, lambda folder: fill(_partial(folder)), _finish
    try:
        for step, by_all in zip(steps, (False, True, False), strict=True):
            work = partial(step, folder) if main or by_all else _nothing
            processes.succeed(work, DISK_FAULTS)
    except OSError:
        if main:
            _undo(folder)
        raise


def _nothing() -> None:
    """What the other processes do while the main one works."""


def _begin(folder: Path) -> None:
    shutil.rmtree(_partial(folder), ignore_errors=True)
    _partial(folder).mkdir(parents=True)


def _finish(folder: Path) -> None:
    partial, former = _partial(folder), _former(folder)
    found = {str(p.relative_to(partial)): _entry(p) for p in sorted(_files(partial))}
    (partial / MANIFEST).write_text(json.dumps(found, indent=2) + "\n")
    _flush(partial)
    restore_folder(folder)
    if folder.exists():
        shutil.rmtree(former, ignore_errors=True)
        folder.rename(former)
    partial.rename(folder)
    flush_folder(folder.parent)
    shutil.rmtree(former, ignore_errors=True)


def _undo(folder: Path) -> None:
    shutil.rmtree(_partial(folder), ignore_errors=True)
    restore_folder(folder)


def replace_files(folder: Path, fill: Callable[[Path], None]) -> set[Path]:
    """Write files into a folder, each whole or not at all; others in it stay as they are.

    `fill` writes them into a folder inside it, from which they are moved when all are whole.
    Returns their paths, relative to the folder.
    """
    partial = folder / ".files.partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        fill(partial)
        _flush(partial)
        written = {path.relative_to(partial) for path in _files(partial)}
        for name in sorted(written):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (partial / name).replace(folder / name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    flush_folder(folder)
    return written


def write_sums(folder: Path) -> None:
    """Write SHA256SUMS: the hashes of all files of a folder, as `sha256sum --check` reads them."""
    names = sorted(path.relative_to(folder).as_posix() for path in _files(folder))
    write_text(folder / SUMS, _lines_of(folder, names))


def add_sums(folder: Path, names: Iterable[str]) -> None:
    """Add files of a folder to its SHA256SUMS, if they are there."""
    known = read_text(folder / SUMS, "hashes of files") if (folder / SUMS).is_file() else ""
    there = [name for name in names if (folder / name).is_file()]
    write_text(folder / SUMS, known + _lines_of(folder, there))


def _lines_of(folder: Path, names: Iterable[str]) -> str:
    return "".join(f"{_sha256(folder / name)}  {name}\n" for name in names)


def damaged_by_sums(folder: Path) -> list[str]:
    """The files of a folder that are missing or not as SHA256SUMS says.

    Raises UsageError for a list that cannot be read or that leads out of the folder.
    """
    place, wrong = folder / SUMS, list[str]()
    for line in read_text(place, "hashes of files").splitlines() or [""]:
        digest, _, name = line.partition("  ")
        path = inside(folder, name, str(place)) if name else place
        if not path.is_file() or _sha256(path) != digest:
            wrong.append(name or SUMS)
    return wrong


def restore_folder(folder: Path) -> None:
    """Bring back a folder that a killed `write_folder` had moved aside for a new one."""
    if not folder.exists() and _former(folder).is_dir():
        _former(folder).rename(folder)


def moved_aside(output_dir: Path) -> list[Path]:
    """Folders that killed writes had moved aside, by the names they had."""
    former = output_dir.glob(".*.former")
    return [output_dir / path.name[1 : -len(".former")] for path in former if path.is_dir()]


def remove_leftovers(output_dir: Path) -> None:
    """Delete what killed writes left behind in a folder; nobody else may be writing to it."""
    for folder in moved_aside(output_dir):
        restore_folder(folder)
        shutil.rmtree(_former(folder), ignore_errors=True)
    for folder in (output_dir, *filter(Path.is_dir, output_dir.glob("*"))):
        for path in folder.glob(".*.partial"):
            shutil.rmtree(path, ignore_errors=True)
        for path in unfinished(folder):
            path.unlink(missing_ok=True)


def verify_folder(folder: Path, *needed: str) -> None:
    """Raise DkdmError unless every file is there and is what was written.

    needed: files that it must have.
    """
    if not folder.is_dir():
        raise DkdmError(f"{folder} is missing")
    check_folder(folder)
    try:
        entries = read_json(folder / MANIFEST, "the hashes of a folder")
    except UsageError as error:
        raise DkdmError(f"{folder} is not complete: {error}") from error
    for name in needed:
        if name not in entries:
            raise DkdmError(f"{folder} is not complete: {MANIFEST} does not list {name}")
    files = sorted(path.resolve() for path in _files(folder))
    _verify_hashes(folder, tuple((path, *_stamp(path)) for path in files))
    there = {path.relative_to(folder).as_posix() for path in _files(folder)} - {MANIFEST}
    for name in sorted(there - entries.keys()):
        if name.endswith(HASHED):
            raise DkdmError(f"{folder} is not complete: {MANIFEST} does not list {name}")


@lru_cache(maxsize=64)
def _verify_hashes(folder: Path, seen: tuple[tuple[Path, int, int], ...]) -> None:  # noqa: ARG001
    """Check every file of a folder, once for each state `seen` of it: its sizes and times."""
    for name, entry in read_json(folder / MANIFEST, "the hashes of a folder").items():
        _verify(folder, name, entry)


def _stamp(path: Path) -> tuple[int, int]:
    about = path.stat()
    return about.st_size, about.st_mtime_ns


def _verify(folder: Path, name: str, entry: Any) -> None:
    path = inside(folder, name, str(folder / MANIFEST))
    if not path.is_file():
        raise DkdmError(f"{folder}: {name} is missing")
    if isinstance(entry, Mapping):
        size, digest = entry.get("bytes"), entry.get("sha256")
    else:
        size, digest = path.stat().st_size, entry  # as former versions wrote it
    if path.stat().st_size != size or _sha256(path) != digest:
        raise DkdmError(f"{folder}: {name} is damaged")


def _partial(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.partial")


def _former(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.former")


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def _entry(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _flush(folder: Path) -> None:
    """Wait until all files of a folder, and their names, are on the disk."""
    for path in _files(folder):
        with path.open("rb") as handle:
            os.fsync(handle.fileno())
    for path in (folder, *folder.rglob("*")):
        if path.is_dir():
            flush_folder(path)
