"""A student works in the space of its teacher's samples: the same channels, sizes and latents."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dkdm.core.denoisers.bundle import Coder
from dkdm.core.few_steps.grid import GRID, Grid
from dkdm.core.few_steps.kinds import kind_saved
from dkdm.errors import UsageError
from dkdm.models.architectures import ARCHITECTURES
from dkdm.models.effective import class_config, network_name
from dkdm.models.locate import INDEX
from dkdm.models.pipelines import AUTOENCODERS, DENOISERS
from dkdm.reading.fields import read_json
from dkdm.reading.places import check_place
from dkdm.students.interface import Interface

_WHY = "the student learns from the teacher's states, which cannot be resized"


def config_in(folder: Path, interface: Interface) -> Path:
    """The config.json of the network in a pipeline or component folder.

    Raises UsageError for a folder without one, with another autoencoder than the teacher's, or with
    the heads of a few-step model.
    """
    _refuse_heads(folder)
    for name in AUTOENCODERS:
        if (folder / name / "config.json").is_file():
            check_latents(folder / name, interface.autoencoder)
    for path in (folder, *(folder / name for name in DENOISERS)):
        file = check_place(path / "config.json", folder)
        if file.is_file() and "_class_name" in read_json(file, "a network's config"):
            return file
    raise UsageError(
        f"student {folder} has no config.json of a network: give a diffusers pipeline or a "
        "network's folder"
    )


def _refuse_heads(folder: Path) -> None:
    file = check_place(folder / INDEX, folder)
    values = read_json(file, "a pipeline's index").get(GRID) if file.is_file() else None
    if values is None:
        return
    where = f"{file}: {GRID}"
    grid = Grid.of_dict(values, where)
    if kind_saved(values, where).outputs_on(grid) > 1:
        raise UsageError(
            f"student {folder} is a few-step model, whose network has {grid.num_heads} outputs: "
            "give the folder plain/ in it"
        )


def check_latents(folder: Path, teacher: Coder | None) -> None:
    """Raise UsageError if the teacher works on other latents than this autoencoder's."""
    file = check_place(folder / "config.json", folder.parent)
    raw = read_json(file, "an autoencoder's config")
    mine = _latents(class_config(raw, str(raw.get("_class_name")), str(file)))
    if teacher is None:
        raise UsageError(
            f"student {folder.parent} works on the latents of {folder.name}, the teacher on "
            "pixels: use a student for pixels"
        )
    theirs = _latents(teacher.config)
    apart = [f"{key} {mine[key]} against {theirs[key]}" for key in mine if mine[key] != theirs[key]]
    if apart:
        raise UsageError(
            f"student {folder.parent} works on latents of another autoencoder than the teacher's: "
            f"{', '.join(apart)}; use a student with the teacher's autoencoder"
        )


def _latents(config: Mapping[str, Any]) -> dict[str, Any]:
    """What distinguishes latents, as far as a config says."""
    keys = ("latent_channels", "z_dim", "scaling_factor", "shift_factor", "latents_mean")
    levels = config.get("block_out_channels") or config.get("encoder_block_out_channels")
    return {
        "class": config.get("_class_name"),
        "levels": len(levels) if isinstance(levels, list) else 0,
        **{key: config.get(key) for key in keys},
    }


def check_config(config: Mapping[str, Any], interface: Interface, where: str) -> None:
    """Raise UsageError if a network's config is for other samples than the teacher's."""
    name, wanted = network_name(str(config["_class_name"]), config), interface.sample_shape
    known = ARCHITECTURES.get(name)
    if known is None:
        return
    config = class_config(config, name, where)
    try:
        channels = known.shape(dict(config), wanted[1:])[0]
    except (UsageError, KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{where}: {name} is not for samples of shape {wanted}") from error
    if channels != wanted[0]:
        raise UsageError(
            f"{where}: the student's samples have {channels} channels, the teacher's {wanted[0]}"
            f"{_of_latents(interface)}: {_WHY}; set in_channels for {wanted[0]}"
        )
    size, theirs = config.get("sample_size"), getattr(interface.teacher, "config", None)
    if isinstance(theirs, Mapping) and size == theirs.get("sample_size"):
        return  # the teacher is used at another size than its config's
    each = size if isinstance(size, (list, tuple)) else [size or 0] * (len(wanted) - 1)
    sides = tuple(each) if size else wanted[1:]
    if sides != wanted[1:]:
        mine, other = "x".join(map(str, sides)), "x".join(map(str, wanted[1:]))
        raise UsageError(
            f"{where}: the student is for samples of {mine}, the teacher's are {other}"
            f"{_of_latents(interface)}: {_WHY}; set sample_size {other}, or change the teacher"
        )


def _of_latents(interface: Interface) -> str:
    coder = interface.autoencoder
    return "" if coder is None else f" (latents of its {coder.component.class_name})"


def check_same_samples(
    student: tuple[int, ...], teacher: tuple[int, ...], autoencoders: tuple[Coder | None, ...]
) -> None:
    """Raise UsageError if a student given as an object has other samples than its teacher."""
    if tuple(student) != tuple(teacher):
        raise UsageError(
            f"the student's samples have shape {tuple(student)}, the teacher's {tuple(teacher)}: "
            f"{_WHY}"
        )
    mine, theirs = autoencoders
    if mine is not None:
        check_latents(mine.component.folder, theirs)
