"""Checkpoints: a dict of parts, in a folder of safetensors and JSON, hashed, renamed into place.

Which parts a checkpoint holds is `Trainer.parts` and its source's `parts`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dkdm.errors import DkdmError, UsageError, in_a_line, raised_as
from dkdm.reading.fields import read_json
from dkdm.reading.files import atomic
from dkdm.reading.places import check_folder, inside

MANIFEST = "manifest.json"
STATE = "state.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
SOURCE = "source/"
AVERAGE = "_ema/"
OPTIONS = {
    AVERAGE: "an average (--use-ema)",
    "features": "feature distillation (--feature-weight)",
    "replay": "--replay",
    "source/finished": "kept samples (--keep-finished)",
}
ORIGIN = "dkdm_origin"  # attribute of a network without a config; see models/custom_network.py


def write_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Create `folder` with what `fill` writes, or nothing at all.

    The files are written beside it, hashed into a manifest, flushed to disk and renamed. A folder
    that is there is moved aside first and deleted last: `restore_folder` brings it back after a
    kill in between.
    """
    partial, former = folder.with_name(f".{folder.name}.partial"), _former(folder)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    fill(partial)
    hashes = {str(p.relative_to(partial)): _sha256(p) for p in sorted(_files(partial))}
    (partial / MANIFEST).write_text(json.dumps(hashes, indent=2) + "\n")
    for path in _files(partial):
        with path.open("rb") as handle:
            os.fsync(handle.fileno())
    restore_folder(folder)
    if folder.exists():
        shutil.rmtree(former, ignore_errors=True)
        folder.rename(former)
    partial.rename(folder)
    shutil.rmtree(former, ignore_errors=True)


def restore_folder(folder: Path) -> None:
    """Bring back a folder that a killed `write_folder` had moved aside for a new one."""
    if not folder.exists() and _former(folder).is_dir():
        _former(folder).rename(folder)


def _former(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.former")


class Part(Protocol):
    """Something whose state a checkpoint keeps: tensors and JSON values by name."""

    def state_dict(self) -> Mapping[str, Any]:
        """The state."""

    def load_state_dict(self, state: dict[str, Any]) -> Any:
        """Restore it."""


def write_parts(folder: Path, parts: Mapping[str, Part], about: Mapping[str, Any]) -> None:
    """Write the tensors of each part to NAME.safetensors, and its other values to state.json."""
    values: dict[str, dict[str, Any]] = {}
    for name, part in parts.items():
        state = part.state_dict()
        tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
        values[name] = {key: value for key, value in state.items() if key not in tensors}
        if tensors:
            write_tensors(folder / f"{name}.safetensors", tensors)
    (folder / STATE).write_text(json.dumps({**about, "parts": values}, indent=2) + "\n")


def read_parts(folder: Path, parts: Mapping[str, Part]) -> dict[str, Any]:
    """Restore each part that `write_parts` wrote; returns `about`.

    Raises UsageError if the run has a part that the checkpoint lacks, or the other way round.
    """
    state = read_json(folder / STATE, "a checkpoint's state")
    if "parts" not in state:
        return read_former_parts(folder, parts, state)
    theirs = state["parts"]
    _refuse_other_parts(folder, _of_model(theirs), _of_model(parts))
    for name, part in parts.items():
        if name in theirs:
            restore(part, folder / f"{name}.safetensors", theirs[name])
    _refuse_other_parts(folder, set(theirs), set(parts))
    return state


def restore(part: Part, file: Path, values: Mapping[str, Any]) -> None:
    """Restore one part from its tensors and its values."""
    tensors = read_tensors(file) if file.is_file() else {}
    if isinstance(part, nn.Module):
        load_strict(part, tensors, str(file.with_suffix("")))
    else:
        part.load_state_dict({**tensors, **values})


def read_former_parts(
    folder: Path, parts: Mapping[str, Part], state: Mapping[str, Any]
) -> dict[str, Any]:
    """`read_parts` of the former layout: one file for the whole source, values at the top."""
    values = {"optimizer": state["optimizer"], "schedule": state["lr_scheduler"]}
    values |= {"scaler": state["scaler"]} if state.get("scaler") else {}
    paths = [path.relative_to(folder) for path in folder.rglob("*.safetensors")]
    theirs = {path.with_suffix("").as_posix() for path in paths} - {"source"} | values.keys()
    _refuse_other_parts(folder, theirs, _of_model(parts))
    whole = read_tensors(folder / "source.safetensors")
    whole["evaluations"] = torch.tensor(state["teacher_evaluations"])
    for name, part in parts.items():
        if name in theirs:
            restore(part, folder / f"{name}.safetensors", values.get(name, {}))
        elif name.startswith(SOURCE):
            getattr(part, "load_whole", part.load_state_dict)(whole)
    return dict(state)


def _of_model(parts: Iterable[str]) -> set[str]:
    """The names of all parts but those of the source."""
    return {name for name in parts if not name.startswith(SOURCE)}


def _refuse_other_parts(folder: Path, theirs: set[str], ours: set[str]) -> None:
    """Raise UsageError for a part that only one of them has, except those a run may drop."""
    for name in sorted((theirs ^ ours) - {"scaler"}):
        if name in theirs and AVERAGE in name:
            continue  # a run may drop its average
        lacks = "without" if name in ours else "with"
        what = next((OPTIONS[key] for key in OPTIONS if key in name), name)
        raise UsageError(
            f"{folder} was written by a run {lacks} {what}: resume with the options it was started "
            "with"
        )


class OptimizerState:
    """An optimizer as a part: the state of each parameter by its number."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        """Tensors as `0.exp_avg`, and the groups of parameters."""
        state = self.optimizer.state_dict()
        return {
            **{f"{i}.{k}": v for i, entry in state["state"].items() for k, v in entry.items()},
            "param_groups": state["param_groups"],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        entries: dict[int, dict[str, Tensor]] = {}
        for name, value in state.items():
            index, _, key = name.partition(".")
            if key:
                entries.setdefault(int(index), {})[key] = value
        groups = state["param_groups"]
        self.optimizer.load_state_dict({"state": entries, "param_groups": groups})


class RandomState:
    """torch's global random state (what dropout uses) as a part."""

    def state_dict(self) -> dict[str, Tensor]:
        """The state of the CPU's generator, and of each CUDA device's."""
        state = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            state |= {f"cuda.{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore them; devices that are gone are left alone."""
        torch.set_rng_state(state["cpu"])
        for index in range(torch.cuda.device_count()):
            if f"cuda.{index}" in state:
                torch.cuda.set_rng_state(state[f"cuda.{index}"], index)


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


def restoring(folder: Path) -> AbstractContextManager[None]:
    """Around what restores a checkpoint: optimizers and schedulers raise anything."""
    return raised_as(
        lambda error: DkdmError(
            f"checkpoint {folder} does not fit this run: {in_a_line(error)}; resume with the "
            "options the run was started with, or from an earlier checkpoint"
        )
    )


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
    """The checkpoint that 'latest' or a path names; None if there is no checkpoint yet.

    Raises UsageError for a path that is not a checkpoint.
    """
    if wanted == "latest":
        found = checkpoints(output_dir)
        return found[-1] if found else None
    for path in (Path(wanted), output_dir / wanted):
        if (path / MANIFEST).is_file():
            return path
    raise UsageError(
        f"--resume-from-checkpoint {wanted}: there is no checkpoint; give 'latest', or one of "
        f"{', '.join(p.name for p in checkpoints(output_dir)) or '(none yet)'}"
    )


def rotate(output_dir: Path, limit: int | None) -> None:
    """Delete the oldest checkpoints beyond `limit`; None keeps all."""
    if limit is not None:
        for path in checkpoints(output_dir)[: -max(limit, 1)]:
            shutil.rmtree(path)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write named tensors as safetensors, which wants no two to share memory: they are copied."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data, seen = {}, set()
    for name, tensor in tensors.items():
        memory = tensor.untyped_storage().data_ptr()
        apart = tensor.clone() if memory in seen else tensor
        data[name] = apart.detach().cpu().contiguous()
        seen.add(memory)
    with atomic(path) as partial:
        save_file(data, partial)


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


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file. Raises DkdmError if it is missing or damaged."""
    said = f"{path}: cannot be read as safetensors"
    with raised_as(lambda error: DkdmError(f"{said} ({in_a_line(error)})")):
        return load_file(path)


def save_network(network: nn.Module, folder: Path) -> None:
    """Write a network as diffusers does: config.json beside its weights."""
    save_config(network, folder)
    write_tensors(folder / WEIGHTS, network.state_dict())


def save_config(network: nn.Module, folder: Path) -> None:
    """Write a network's config.json, if it has a config."""
    folder.mkdir(parents=True, exist_ok=True)
    knows_its_config = getattr(network, ORIGIN, network)
    write: Callable[[Path], None] | None = getattr(knows_its_config, "save_config", None)
    if write is not None:
        write(folder)


def load_network_weights(network: nn.Module, folder: Path) -> None:
    """Load weights written by `save_network`, strictly."""
    load_strict(network, read_tensors(folder / WEIGHTS), str(folder))


def load_strict(network: nn.Module, weights: Mapping[str, Tensor], where: str) -> None:
    """Load weights whose keys and shapes are exactly the network's.

    Raises DkdmError, and loads nothing, naming the first that are missing, unexpected or differ.
    """
    own = network.state_dict()
    wrong = {
        "missing": sorted(own.keys() - weights.keys()),
        "unexpected": sorted(weights.keys() - own.keys()),
        "with another shape": sorted(
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
