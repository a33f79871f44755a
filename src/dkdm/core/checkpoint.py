"""Checkpoints: folders of safetensors and JSON, hashed, renamed into place when whole."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dkdm.errors import DkdmError, UsageError
from dkdm.reading.fields import read_json
from dkdm.reading.files import atomic
from dkdm.reading.places import check_folder, inside
from dkdm.reading.sizes import in_a_line

MANIFEST = "manifest.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
ORIGIN = "dkdm_origin"  # attribute of a network that cannot write its config itself; see own.py


def write_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Create `folder` with what `fill` writes, or nothing at all.

    The files are written beside it, hashed into a manifest, flushed to disk and renamed.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    fill(partial)
    hashes = {str(p.relative_to(partial)): _sha256(p) for p in sorted(_files(partial))}
    (partial / MANIFEST).write_text(json.dumps(hashes, indent=2) + "\n")
    for path in _files(partial):
        with path.open("rb") as handle:
            os.fsync(handle.fileno())
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def verify_folder(folder: Path) -> None:
    """Raise DkdmError unless every file is there and is what was written."""
    check_folder(folder)
    try:
        hashes = read_json(folder / MANIFEST, "a checkpoint's hashes")
    except UsageError as error:
        raise DkdmError(f"{folder} is not a complete checkpoint: {error}") from error
    for name, digest in hashes.items():
        if not inside(folder, name, str(folder / MANIFEST)).is_file():
            raise DkdmError(f"checkpoint {folder}: {name} is missing; resume from an earlier one")
        if _sha256(folder / name) != digest:
            raise DkdmError(f"checkpoint {folder}: {name} is damaged; resume from an earlier one")


@contextmanager
def restoring(folder: Path) -> Iterator[None]:
    """Around the restoring of a checkpoint: what its files make fail is one DkdmError."""
    try:
        yield
    except DkdmError:
        raise
    except Exception as error:  # optimizers and schedulers raise anything for a strange state
        raise DkdmError(
            f"checkpoint {folder} does not fit this run: {in_a_line(error)}; resume with the "
            "options it began with, or from an earlier one"
        ) from error


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    found = [p for p in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
    return sorted(found, key=lambda path: int(path.name.partition("-")[2]))


def resolve(output_dir: Path, wanted: str) -> Path | None:
    """The checkpoint 'latest' or a path names; None where 'latest' finds none yet.

    Raises UsageError for a path that is no checkpoint.
    """
    if wanted == "latest":
        found = checkpoints(output_dir)
        return found[-1] if found else None
    for path in (Path(wanted), output_dir / wanted):
        if (path / MANIFEST).is_file():
            return path
    raise UsageError(
        f"--resume-from-checkpoint {wanted}: no checkpoint there; expected 'latest' or one of "
        f"{', '.join(p.name for p in checkpoints(output_dir)) or 'none so far'}"
    )


def rotate(output_dir: Path, limit: int | None) -> None:
    """Delete the oldest checkpoints beyond `limit`; None keeps all."""
    if limit is not None:
        for path in checkpoints(output_dir)[: -max(limit, 1)]:
            shutil.rmtree(path)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write named tensors as safetensors."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    with atomic(path) as partial:
        save_file(data, partial)


def refuse_other_content(path: Path) -> None:
    """Raise UsageError for a file that only has the name of a checkpoint.

    These are pointers of Git LFS, web pages that were saved in its place, and GGUF files.
    """
    try:
        with path.open("rb") as file:
            start = file.read(256).lstrip().lower()
    except OSError as error:
        raise DkdmError(f"{path} cannot be read: {error}") from error
    found = next((what for first, what in _OTHER_CONTENT.items() if start.startswith(first)), None)
    if found:
        raise UsageError(f"{path}: {found}")


_PAGE = (
    "a web page and no weights: download the file again (log in first if its page asks for that)"
)
_OTHER_CONTENT = {
    b"version https://git-lfs": "a Git LFS pointer and no weights: run git lfs pull in its folder",
    b"<!doctype": _PAGE,
    b"<html": _PAGE,
    b"<?xml": _PAGE,
    b'{"error': _PAGE,
    b"gguf": "a GGUF file, whose weights are quantized: give the file or the diffusers folder "
    "that it was made from",
}


def refuse_other_contents(folder: Path) -> None:
    """`refuse_other_content` of every file of weights that lies directly in a folder."""
    files = sorted(path for path in folder.glob("*") if path.is_file())
    for path in files:
        if path.suffix in (".safetensors", ".bin"):
            refuse_other_content(path)
    if not any(path.suffix == ".safetensors" for path in files):
        for path in files:
            if path.suffix == ".bin":
                _refuse_code(path)


def _refuse_code(path: Path) -> None:
    try:
        names = unknown_names(path)
    except Exception:  # a damaged pickle may raise anything: what reads it says so
        return
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
        f"{path}: holds more than weights ({', '.join(names[:3])}), which would run as code. Where "
        "you trust it, save its state dict alone: "
        "torch.save(torch.load(path, weights_only=False)['state_dict'], 'weights.pt')"
    )


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file. Raises DkdmError where it is missing or damaged."""
    try:
        return load_file(path)
    except Exception as error:  # a damaged header may raise anything
        raise DkdmError(f"{path}: cannot be read as safetensors ({in_a_line(error)})") from error


def save_network(
    network: nn.Module, folder: Path, weights: Mapping[str, Tensor] | None = None
) -> None:
    """Write a network as diffusers does: config.json beside its weights.

    weights: saved in place of the network's own (an average of them), with the same keys.
    """
    folder.mkdir(parents=True, exist_ok=True)
    knows_its_config = getattr(network, ORIGIN, network)
    save_config: Callable[[Path], None] | None = getattr(knows_its_config, "save_config", None)
    if save_config is not None:
        save_config(folder)
    write_tensors(folder / WEIGHTS, _apart(weights or network.state_dict()))


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of which no two share memory, as safetensors wants them: shared ones are copied."""
    apart, seen = {}, set()
    for name, tensor in tensors.items():
        memory = tensor.untyped_storage().data_ptr()
        apart[name] = tensor.clone() if memory in seen else tensor
        seen.add(memory)
    return apart


def load_network_weights(network: nn.Module, folder: Path) -> None:
    """Load weights written by `save_network`, strictly."""
    load_strict(network, read_tensors(folder / WEIGHTS), str(folder))


def load_strict(network: nn.Module, weights: Mapping[str, Tensor], where: str) -> None:
    """Load weights whose keys and shapes are exactly the network's.

    Raises DkdmError listing the first keys that are missing, unexpected or of another shape;
    nothing is loaded then.
    """
    own = network.state_dict()
    wrong = {
        "missing": sorted(own.keys() - weights.keys()),
        "unexpected": sorted(weights.keys() - own.keys()),
        "of another shape": sorted(
            k for k in own.keys() & weights.keys() if own[k].shape != weights[k].shape
        ),
    }
    found = [f"{len(keys)} {what} ({_first(keys)})" for what, keys in wrong.items() if keys]
    if found:
        raise DkdmError(
            f"{where}: the weights do not belong to this {type(network).__name__}: "
            f"{'; '.join(found)}. Nothing was loaded"
        )
    network.load_state_dict(dict(weights))


def _first(keys: list[str], count: int = 3) -> str:
    return ", ".join(keys[:count]) + (", ..." if len(keys) > count else "")


def split_optimizer(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state_dict as tensors and JSON."""
    tensors = {
        f"{index}.{key}": value
        for index, entry in state["state"].items()
        for key, value in entry.items()
    }
    return tensors, {"param_groups": state["param_groups"]}


def join_optimizer(tensors: Mapping[str, Tensor], extra: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `split_optimizer`."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = value
    return {"state": state, "param_groups": extra["param_groups"]}


def random_state() -> dict[str, Tensor]:
    """torch's global random state (what dropout uses), as tensors."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state |= {f"cuda.{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
    return state


def set_random_state(state: Mapping[str, Tensor]) -> None:
    """Restore `random_state`; devices that are gone are left alone."""
    torch.set_rng_state(state["cpu"])
    for index in range(torch.cuda.device_count()):
        if f"cuda.{index}" in state:
            torch.cuda.set_rng_state(state[f"cuda.{index}"], index)
