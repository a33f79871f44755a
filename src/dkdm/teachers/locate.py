"""From what the user typed to a folder on this machine."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path

from dkdm.errors import DkdmError, UsageError

INDEX = "model_index.json"


def builtin_names() -> list[str]:
    """The models shipped with the package."""
    assets = Path(str(resources.files("dkdm"))) / "assets"
    return sorted(path.parent.name for path in assets.glob(f"*/{INDEX}"))


def locate(
    spec: str, *, revision: str | None = None, variant: str | None = None, weights: bool = True
) -> Path:
    """The folder of a builtin, a path or a hub id (downloaded into the hub's cache).

    weights: whether they are needed too, or JSON files are enough. Raises UsageError where there is
    nothing of that name.
    """
    if spec.startswith("builtin:"):
        return _builtin(spec.removeprefix("builtin:"))
    path = Path(spec).expanduser()
    if path.exists():
        return path
    if is_hub_id(spec):
        return _download(spec, revision, variant, weights)
    raise UsageError(
        f"no model at '{spec}': expected a diffusers folder, a hub id (owner/name), a run's output "
        f"folder, module:factory, or one of {', '.join(f'builtin:{n}' for n in builtin_names())}"
    )


def is_hub_id(spec: str) -> bool:
    """Whether this reads as owner/name on the hub, and nothing of that name lies here."""
    shaped = re.fullmatch(r"[\w.-]+/[\w.-]+", spec) and not spec.startswith((".", "runs/"))
    return bool(shaped) and not Path(spec).exists()


def _builtin(name: str) -> Path:
    if name not in builtin_names():
        raise UsageError(
            f"no builtin model '{name}': expected one of {', '.join(builtin_names()) or 'none'}"
        )
    return Path(str(resources.files("dkdm"))) / "assets" / name


def _download(repo_id: str, revision: str | None, variant: str | None, weights: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    suffix = f".{variant}" if variant else ""
    patterns = ["*.json"]
    if weights:
        texts = ("*.txt", "*.model", "README.md")  # vocabularies, card
        patterns += [f"*diffusion_pytorch_model{suffix}*", f"*model{suffix}*.safetensors", *texts]
    try:
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        at = f" at revision {revision}" if revision else ""
        raise DkdmError(
            f"'{repo_id}' is no folder here, and the hub did not give it{at}: {error}"
        ) from error
