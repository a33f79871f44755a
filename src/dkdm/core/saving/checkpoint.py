"""Checkpoints: a dict of parts, in a folder of safetensors and JSON that is whole or not there.

Which parts a checkpoint holds is `Trainer.parts` and its source's `parts`.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, suppress
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dkdm.core import processes
from dkdm.core.saving.checksums import are_damaged
from dkdm.core.saving.folders import MANIFEST, moved_aside, restore_folder, verify_folder
from dkdm.core.saving.tolerance import DISK_FAULTS
from dkdm.errors import DkdmError, UsageError, in_a_line, raised_as
from dkdm.reading.fields import Fields, read_json
from dkdm.reading.files import atomic

STATE = "state.json"
RUN = "run.json"  # facts about the run: its options, its teacher, versions
WEIGHTS = "diffusion_pytorch_model.safetensors"
SOURCE = "source/"
RANDOM = "random"
FORMER_STATE = ("optimizer", "lr_scheduler", "teacher_evaluations")
AVERAGE = "_ema/"
LOSSES = "losses"  # per level since the last line of metrics; former checkpoints have none
BAD_STEPS = "bad_steps"  # former checkpoints have none
OPTIONS = {
    AVERAGE: "an average (--use-ema)",
    "features": "feature distillation (--feature-weight)",
    "replay": "--replay",
    "source/finished": "kept samples (--keep-finished)",
}
ORIGIN = "dkdm_origin"  # attribute of a network without a config; see models/custom_network.py


class Part(Protocol):
    """Something whose state a checkpoint keeps: tensors and JSON values by name."""

    def state_dict(self) -> Mapping[str, Any]:
        """The state."""

    def load_state_dict(self, state: dict[str, Any]) -> Any:
        """Restore it."""


def write_parts(
    folder: Path,
    parts: Mapping[str, Part],
    about: Mapping[str, Any],
    writers: Mapping[str, int] | None = None,
) -> None:
    """Write the tensors of each part to NAME.safetensors, and its other values to state.json.

    writers: the process that writes each part, if several write one folder; None for one. Parts
    that the main process lacks are tensors alone. After a fault of the disk the states of the
    others are still asked for, since processes may gather them together.
    """
    here = processes.rank() if writers else 0
    writers = writers or dict.fromkeys(parts, here)
    values: dict[str, dict[str, Any]] = {name: {} for name in writers}
    fault: Exception | None = None
    for name, part in parts.items():
        state = part.state_dict()
        if writers[name] != here:
            continue
        tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
        values[name] = {key: value for key, value in state.items() if key not in tensors}
        if tensors and fault is None:
            try:
                write_tensors(folder / f"{name}.safetensors", tensors)
            except DISK_FAULTS as error:
                fault = error
    if fault is not None:
        raise fault
    if here:
        return
    (folder / STATE).write_text(json.dumps({**about, "parts": values}, indent=2) + "\n")


def read_parts(
    folder: Path, parts: Mapping[str, Part], every: Iterable[str] = ()
) -> dict[str, Any]:
    """Restore each part that `write_parts` wrote; returns `about`.

    every: the parts of all processes, if others read theirs. Raises UsageError if the run has a
    part that the checkpoint lacks, or the other way round.
    """
    state = read_json(folder / STATE, "a checkpoint's state")
    if "parts" not in state:
        return read_former_parts(folder, parts, state)
    theirs = state["parts"]
    _refuse_other_parts(folder, _of_model(theirs), _of_model(parts))
    for name, part in parts.items():
        if name in theirs:
            restore(part, folder / f"{name}.safetensors", theirs[name])
    _refuse_other_parts(folder, set(theirs), set(every or parts))
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
    for name in sorted((theirs ^ ours) - {"scaler", LOSSES, BAD_STEPS}):
        if name in theirs and AVERAGE in name:
            continue  # a run may drop its average
        if name.startswith(RANDOM):
            continue  # of another number of processes
        lacks = "without" if name in ours else "with"
        what = next((OPTIONS[key] for key in OPTIONS if key in name), name)
        raise UsageError(
            f"{folder} was written by a run {lacks} {what}: resume with the options it was started "
            "with"
        )


class OptimizerState:
    """An optimizer as a part: the state of each parameter by its number.

    Weight decay stays that of the options.
    """

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
        own = self.optimizer.state_dict()["param_groups"]
        groups = [
            {**theirs, "weight_decay": ours["weight_decay"]}
            for theirs, ours in zip(state["param_groups"], own, strict=True)
        ]
        self.optimizer.load_state_dict({"state": entries, "param_groups": groups})


def random_of(rank: int) -> str:
    """The name of a process's random state."""
    return f"{RANDOM}-{rank}" if rank else RANDOM


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


def restoring(folder: Path) -> AbstractContextManager[None]:
    """Around what restores a checkpoint: optimizers and schedulers raise anything."""
    return raised_as(
        lambda error: DkdmError(
            f"checkpoint {folder} does not fit this run: {in_a_line(error)}; resume with the "
            "options the run was started with, or from an earlier checkpoint"
        )
    )


def checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    named = re.compile(r"checkpoint-[0-9]{1,18}").fullmatch
    found = [p for p in output_dir.glob("checkpoint-*") if named(p.name) and p.is_dir()]
    return sorted(found, key=_step_of)


def verify_checkpoint(folder: Path) -> None:
    """Raise DkdmError unless a checkpoint is whole: every file as it was written, and a state."""
    verify_folder(folder, STATE)
    try:
        state = Fields(read_json(folder / STATE, "a checkpoint's state"), str(folder / STATE))
        state.whole("step")
        missing = () if "parts" in state.values else set(FORMER_STATE) - state.values.keys()
        if missing:
            raise UsageError(f"{folder / STATE}: parts are missing")
    except UsageError as error:
        raise DkdmError(f"{folder} is not complete: {error}") from error


def newest(output_dir: Path) -> Path | None:
    """The newest checkpoint that is whole; None if there is none at all.

    stderr names those that are damaged. Raises DkdmError if all are.
    """
    damaged = []
    for folder in reversed(checkpoints(output_dir)):
        try:
            verify_checkpoint(folder)
        except DkdmError as error:
            damaged.append(str(error))
            continue
        for said in damaged:
            _warn(f"{said}; {folder.name} is used")
        return folder
    if damaged:
        raise DkdmError(
            f"no checkpoint in {output_dir} is whole: {'; '.join(damaged)}. Start the run anew in "
            "another folder"
        )
    return None


@cache
def _warn(text: str) -> None:
    """Say it once, however often a run's folder is looked at."""
    print(f"warning: {text}", file=sys.stderr)


def newest_finite(output_dir: Path) -> Path | None:
    """The newest checkpoint that is whole and whose numbers are all finite; None without one."""
    for folder in reversed(checkpoints(output_dir)):
        with suppress(DkdmError):
            verify_checkpoint(folder)
            if all(map(_is_finite, folder.rglob("*.safetensors"))):
                return folder
    return None


def _is_finite(file: Path) -> bool:
    values = read_tensors(file).values()
    return all(bool(v.isfinite().all()) for v in values if v.is_floating_point())


def resolve(output_dir: Path, wanted: str) -> Path | None:
    """The checkpoint that 'latest' or a path names, verified; None if there is none yet.

    Raises UsageError for a path that is not a checkpoint, DkdmError for one that is damaged.
    """
    if wanted == "latest":
        for folder in moved_aside(output_dir):
            restore_folder(folder)
        return newest(output_dir)
    for path in (Path(wanted), output_dir / wanted):
        if (path / MANIFEST).is_file():
            verify_checkpoint(path)
            return path
    raise UsageError(
        f"--resume-from-checkpoint {wanted}: there is no checkpoint; give 'latest', or one of "
        f"{', '.join(p.name for p in checkpoints(output_dir)) or '(none yet)'}"
    )


def rotate(output_dir: Path, limit: int | None, step: int) -> None:
    """Delete the oldest checkpoints up to `step` beyond `limit`; None keeps all."""
    known = [path for path in checkpoints(output_dir) if _step_of(path) <= step]
    if limit is not None:
        for path in known[: -max(limit, 1)]:
            path.unlink() if path.is_symlink() else shutil.rmtree(path)


def set_aside_later(output_dir: Path, step: int) -> None:
    """Rename the checkpoints beyond a step that a run goes on from: they are of another past, and
    "latest" must not find them. stderr names them."""
    for path in checkpoints(output_dir):
        if _step_of(path) > step:
            names = (f"{path.name}.aside{n or ''}" for n in range(10**6))
            name = next(name for name in names if not (output_dir / name).exists())
            path.rename(output_dir / name)
            _warn(f"the run goes on from step {step}: {path} is set aside as {name}")


def _step_of(path: Path) -> int:
    return int(path.name.partition("-")[2])


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write named tensors as safetensors, which wants no two to share memory: they are copied.

    metadata: `sums_of` these tensors, for a file that no manifest lists.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    data, seen = {}, set()
    for name, tensor in tensors.items():
        memory = tensor.untyped_storage().data_ptr()
        apart = tensor.clone() if memory in seen else tensor
        data[name] = apart.detach().cpu().contiguous()
        seen.add(memory)
    with atomic(path) as partial:
        save_file(data, partial, metadata)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file. Raises DkdmError if it is missing or damaged, or if it holds
    checksums that others have."""
    said = f"{path}: cannot be read as safetensors"
    with raised_as(lambda error: DkdmError(f"{said} ({in_a_line(error)})")):
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata()
        if are_damaged(tensors, metadata):
            raise DkdmError(f"{path} is damaged: its checksums differ")
        return tensors


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
