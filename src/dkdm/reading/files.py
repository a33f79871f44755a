"""Writing files: whole or not at all, from templates, and into the cache folder."""

from __future__ import annotations

import keyword
import math
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dkdm.errors import UsageError
from dkdm.reading.fields import is_name, shown

if TYPE_CHECKING:
    from jinja2 import Environment


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; it becomes `path` when the block ends without an error.

    Readers see the old file or the whole new one, also after a power cut. The suffix stays, a link
    at `path` is replaced rather than followed, and the mode is what the umask gives, whatever the
    writer of the file did.
    """
    partial = _beside(path)
    partial.touch()
    mode = partial.stat().st_mode & 0o777
    try:
        yield partial
        partial.chmod(mode)
        with partial.open("rb") as handle:
            os.fsync(handle.fileno())
        partial.replace(path)
        flush_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with atomic(path) as partial:
        partial.write_text(text, encoding="utf-8")


def unfinished(folder: Path) -> list[Path]:
    """Files of killed `atomic` blocks, in a folder that nobody writes to."""
    names = re.compile(r"\..+\.[0-9a-f]{8}(\.\w+)?")
    return [path for path in folder.glob(".*") if names.fullmatch(path.name) and path.is_file()]


def flush_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk, where the file system can say so."""
    with suppress(OSError):
        entry = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(entry)
        finally:
            os.close(entry)


def _beside(path: Path) -> Path:
    """A hidden name in the same folder, with the same suffix."""
    return path.with_name(f".{path.stem}.{secrets.token_hex(4)}{path.suffix}")


def check_output(
    option: str,
    path: Path,
    *,
    suffixes: Collection[str] = (),
    folder: bool = False,
    overwrite: bool = False,
) -> Path:
    """The path of an output, if it can be written there; nothing is left on the disk.

    option: the one that names it, for messages. suffixes: how a file's name may end; none: in any
    way. folder: whether a folder is written. overwrite: whether it may exist. Raises UsageError.
    """
    if suffixes and path.suffix not in suffixes:
        raise UsageError(f"{option} {path}: give a name that ends in {' or '.join(suffixes)}")
    if path.exists() and path.is_dir() != folder:
        there, wanted = ("file", "folder") if folder else ("folder", "file")
        raise UsageError(f"{option} {path} is a {there}: give the name of a {wanted}")
    if folder and path.is_symlink() and not path.exists():
        raise UsageError(f"{option} {path} is a link to nothing: remove it, or give another name")
    if path.exists() and not overwrite:
        raise UsageError(f"{option} {path} exists: give another name, or --overwrite")
    place = existing_folder(path if path.is_dir() else path.parent)
    if not place.is_dir():
        raise UsageError(f"{option} {path}: {place} is not a folder: give another path")
    try:
        with tempfile.TemporaryFile(dir=place):
            return path
    except OSError as error:
        raise UsageError(
            f"{option} {path}: nothing can be written to {place.absolute()} ({error.strerror}): "
            "give another path"
        ) from error


def existing_folder(path: Path) -> Path:
    """The path, or the nearest above it that exists."""
    while not os.path.lexists(path):
        path = path.parent
    return path


def cache_dir(name: str) -> Path:
    """A folder of files that can be made again, in $DKDM_CACHE or ~/.cache/dkdm."""
    return Path(os.environ.get("DKDM_CACHE", "~/.cache/dkdm")).expanduser() / name


def cached_folder(folder: Path, fill: Callable[[Path], object]) -> Path:
    """The folder, with what `fill` writes into it unless it is there already."""
    if not folder.is_dir():
        partial = _beside(folder)
        partial.mkdir(parents=True)
        try:
            fill(partial)
            partial.rename(folder)
        except OSError:
            if not folder.is_dir():  # another process may have been faster
                raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder


def render(
    package: str,
    template: str,
    filters: Mapping[str, Callable[..., Any]] | None = None,
    /,
    **values: Any,
) -> str:
    """The text of a template in the `templates` folder of a package.

    Values are escaped in templates of HTML. Templates of Python files pass each value through one
    of the filters `literal`, `name` and `dotted`, which refuse what could become code.
    """
    environment = _environment(package, html=template.endswith(".html.j2"))
    environment.filters |= filters or {}
    return environment.get_template(template).render(values)


@cache
def _environment(package: str, html: bool) -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(  # nosec: Markdown and Python files are not HTML
        loader=PackageLoader(package),
        undefined=StrictUndefined,
        autoescape=html,
        trim_blocks=html,
        lstrip_blocks=html,
        keep_trailing_newline=not html,
    )
    environment.filters |= {"literal": literal, "name": identifier, "dotted": dotted}
    return environment


def literal(value: Any) -> str:
    """A value as a Python literal: None, a truth value, a finite number, a string, or lists, tuples
    and dicts of these. Raises UsageError for anything else."""
    if value is None or isinstance(value, bool):
        return repr(value)
    if isinstance(value, int):
        return repr(int(value))
    if isinstance(value, float) and math.isfinite(value):
        return repr(float(value))
    if isinstance(value, str):
        return repr(str(value))
    if isinstance(value, (list, tuple)):
        inside = ", ".join(map(literal, value))
        comma = "," if len(value) == 1 else ""
        return f"[{inside}]" if isinstance(value, list) else f"({inside}{comma})"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{literal(k)}: {literal(v)}" for k, v in value.items()) + "}"
    raise UsageError(f"{shown(value)} cannot be written into a Python file: give plain values")


def identifier(value: Any) -> str:
    """An ASCII name. Raises UsageError for anything else."""
    if not is_name(value):
        raise UsageError(f"{shown(value)} cannot be written into a Python file: it is not a name")
    return str(value)


def dotted(value: Any) -> str:
    """Names of Python with dots between them. Raises UsageError for anything else."""
    parts = value.split(".") if isinstance(value, str) else [""]
    if not all(part.isidentifier() and not keyword.iskeyword(part) for part in parts):
        raise UsageError(f"{shown(value)} cannot be written into a Python file: it is not a module")
    return str(value)
