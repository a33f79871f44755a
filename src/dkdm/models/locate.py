"""From what the user typed to a folder on this machine."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path

from dkdm.errors import UsageError
from dkdm.models.downloads import INDEX, download

BUILTIN = Path(str(resources.files("dkdm"))) / "models" / "builtin"

__all__ = ["INDEX", "builtin_names", "is_hub_id", "locate"]


def builtin_names() -> list[str]:
    """The models shipped with the package."""
    return sorted(path.parent.name for path in BUILTIN.glob(f"*/{INDEX}"))


def locate(
    spec: str,
    *,
    revision: str | None = None,
    variant: str | None = None,
    weights: bool = True,
    subfolder: str | None = None,
) -> Path:
    """The folder of a builtin, a path or a hub id (downloaded into the hub's cache).

    weights: whether they are needed too, or JSON files are enough. subfolder: of a repository, if
    only that is needed. Raises UsageError if there is nothing of that name.
    """
    if spec.startswith("builtin:"):
        return _builtin(spec.removeprefix("builtin:"))
    path = Path(spec).expanduser()
    if path.exists():
        return path
    if is_hub_id(spec):
        return download(spec, revision, variant, weights, subfolder)
    raise UsageError(
        f"no model at '{spec}': give a diffusers folder, a hub id (owner/name), a run's output "
        f"folder, module:factory, or one of {', '.join(f'builtin:{n}' for n in builtin_names())}"
    )


def is_hub_id(spec: str) -> bool:
    """Whether this reads as owner/name on the hub, and nothing of that name lies here."""
    shaped = re.fullmatch(r"[\w.-]+/[\w.-]+", spec) and not spec.startswith((".", "runs/"))
    return bool(shaped) and not Path(spec).exists()


def _builtin(name: str) -> Path:
    if name not in builtin_names():
        raise UsageError(
            f"no builtin model '{name}': use one of {', '.join(builtin_names()) or 'none'}"
        )
    return BUILTIN / name
