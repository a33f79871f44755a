"""Where the files of a model's folder may lie: in it, as files and folders, and nowhere else.

A name that a file gives is joined to the folder by `inside`; everything below the folder is looked
at by `check_folder` before it is opened, and copied by `copy_folder`. A link is followed if it
stays in the folder, or leads to the blobs of the same repository in the hub's cache.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from dkdm.errors import UsageError
from dkdm.reading.fields import Fields, read_json, shown

CODE = (".py", ".pyc", ".pyo", ".so", ".pkl", ".pickle")
MAX_ENTRIES = 100_000  # files and folders of a model


def expanded(path: str | os.PathLike[str]) -> Path:
    """The path with ~ or ~user at its start replaced by that home; as it is if there is none."""
    return Path(os.path.expanduser(path))


def inside(folder: Path, name: object, where: str) -> Path:
    """The path of a name, such as `unet/config.json`, that `where` gives for something in `folder`.

    Raises UsageError for a name that is no relative path below it, and as `check_place` does.
    """
    legal = isinstance(name, str) and 0 < len(name) <= 1000 and name.isprintable()
    if not legal or not _is_below(str(name)):
        raise UsageError(
            f"{where}: {shown(name)} names no file in that folder: give a relative path "
            "without '..'"
        )
    return check_place(folder / str(name), folder)


def _is_below(name: str) -> bool:
    parts = name.split("/")
    return (
        "\\" not in name
        and not any(part in ("", ".", "..") for part in parts)
        and not (PurePosixPath(name).is_absolute() or ":" in parts[0])
    )


def check_place(path: Path, root: Path) -> Path:
    """The path, if it is missing, or a file or folder that links do not lead out of `root`.

    root: the model's folder as the user gave it, which may be a link itself. Raises UsageError.
    """
    try:
        real, mode = path.resolve(strict=True), path.stat().st_mode
    except FileNotFoundError:
        return _refuse_dangling(path)
    except (OSError, RuntimeError, ValueError) as error:
        raise UsageError(f"{path} cannot be followed: {error}") from error
    if not any(real.is_relative_to(place) for place in _places(root)):
        raise UsageError(
            f"{path} is a link that leads out of its folder, to {real}: copy what it should be "
            "there in its place, if you trust it"
        )
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise UsageError(
            f"{path} is {_kind(mode)}, and neither a file nor a folder: copy the file there"
        )
    return path


def _refuse_dangling(path: Path) -> Path:
    if path.is_symlink():
        raise UsageError(
            f"{path} is a link to {os.readlink(path)}, which is missing: copy the file there"
        )
    return path


def _kind(mode: int) -> str:
    kinds = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")


def _places(root: Path) -> list[Path]:
    """The folder itself and, of a snapshot in the hub's cache, its repository's blobs."""
    real = root.resolve()
    places = [real]
    for folder in (real, *real.parents):
        if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):
            places.append(folder.parent.parent / "blobs")
    return places


def check_folder(folder: Path, root: Path | None = None) -> Path:
    """The folder, if everything below it lies in `root` (None is the folder itself).

    Raises UsageError naming the first link that leads out, special file or loop of links, for a
    list of shards that names a file elsewhere, and for more than 100,000 entries.
    """
    for path in _walk(folder, root or folder):
        if _SHARD_LIST.search(path.name):
            _check_shards(path)
    return folder


_SHARD_LIST = re.compile(r"\.index\.(?:[^/]*\.)?json$")  # X.index.json, X.index.fp16.json


def _check_shards(index: Path) -> None:
    """Raise UsageError unless the shards that an index lists lie beside it."""
    shards = Fields(read_json(index, "a list of shards"), str(index)).inner("weight_map", None)
    for name in {shown(name): name for name in shards.values.values()}.values() if shards else ():
        inside(index.parent, name, str(index))


def _walk(folder: Path, root: Path) -> Iterator[Path]:
    """The files below a folder, each checked."""
    check_place(folder, root)
    waiting, count = [(folder, frozenset[Path]())], 0
    while waiting:
        at, above = waiting.pop()
        above |= {at.resolve()}
        for path in sorted(at.iterdir()):
            count += 1
            check_place(path, root)
            if path.is_dir():
                if path.resolve() in above:
                    raise UsageError(
                        f"{path} is a link that leads back to where it lies: remove it"
                    )
                waiting.append((path, above))
            else:
                yield path
            if count > MAX_ENTRIES:
                raise UsageError(
                    f"{root} holds more than {MAX_ENTRIES:,} files: name the folder of the model"
                )


def copy_folder(
    source: Path,
    target: Path,
    root: Path | None = None,
    owns: Callable[[Path], bool] = lambda _: True,
) -> None:
    """Copy the files of a component's folder; links become what they lead to.

    root: of the pipeline, to whose other components links may lead; None is the parent folder.
    owns: whether a file is the component's. Code and hidden files stay behind. Nothing is copied if
    `check_folder` refuses the source. A link in the target is replaced, and never written through.
    """
    root = root or source.resolve().parent
    files = [path for path in _walk(source, root) if _is_data(path, source)]
    for path in filter(owns, files):
        copied = target / path.relative_to(source)
        copied.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, replaced(copied))


def link_folder(source: Path, target: Path) -> None:
    """Make a folder of hard links to the files of one that dkdm wrote; copies where none can be."""

    def linked(path: str, place: str) -> None:
        try:
            os.link(path, place)
        except OSError:  # a file system without hard links
            shutil.copyfile(path, place)

    shutil.copytree(source, target, copy_function=linked)


def _is_data(path: Path, folder: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
    return not hidden and path.suffix not in CODE


def replaced(path: Path) -> Path:
    """The path of a file to be written, after removing a link there: writing would follow it."""
    if path.is_symlink():
        path.unlink()
    return path
