"""A folder that is no pipeline: a network alone, as trainers save it, and its scheduler."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dkdm.denoiser import Denoiser
from dkdm.errors import UsageError
from dkdm.reading import Fields, read_json
from dkdm.schedulers import NAMED, named_config
from dkdm.teachers.locate import INDEX
from dkdm.teachers.options import LoadOptions
from dkdm.teachers.pipeline_folder import load_network_folder

PARTS = ("unet_ema", "transformer_ema", "unet", "transformer")
STATES = ("model.safetensors", "pytorch_model.bin", "diffusion_pytorch_model.safetensors")


def load_lone_network(folder: Path, options: LoadOptions) -> Denoiser:
    """Load a network from a folder with its config and weights, on the noise of options.scheduler.

    Raises UsageError, with what to give instead, for a folder of another kind and without a
    scheduler; otherwise as `load_network_folder`.
    """
    if not (folder / "config.json").is_file():
        raise UsageError(_no_network(folder))
    config = read_json(folder / "config.json", "a network's config")
    kind = Fields(config, str(folder / "config.json")).text("_class_name", "")
    if options.scheduler is None:
        raise UsageError(_no_scheduler(folder, kind))
    if options.lora:
        raise UsageError(
            f"--teacher-lora: {folder} is a network without its pipeline, which knows the formats "
            "of LoRA files: leave this option out"
        )
    scheduler = scheduler_config(str(options.scheduler), clips=config.get("in_channels") in (1, 3))
    return load_network_folder(folder, scheduler, options)


def scheduler_config(spec: str, clips: bool) -> Mapping[str, Any]:
    """The config of a scheduler by name, by its JSON file, or by a folder that has one.

    clips: whether one given by name clips x_0 to [-1, 1], as for pixels. Raises UsageError.
    """
    path = Path(spec).expanduser()
    if spec not in NAMED and path.is_dir():
        places = (path / "scheduler_config.json", path / "scheduler" / "scheduler_config.json")
        found = next((place for place in places if place.is_file()), None)
        if found is None:
            raise UsageError(f"--teacher-scheduler {spec}: no scheduler_config.json in this folder")
        path = found
    return named_config(spec if spec in NAMED else str(path), 1.0 if clips else None)


def _no_scheduler(folder: Path, kind: str) -> str:
    if (folder.parent / INDEX).is_file():
        return f"{folder}: one part of a pipeline: give the pipeline's folder, {folder.parent}"
    return (
        f"{folder}: a network alone ({kind or 'of no class'}), which does not say how noise is "
        "added: give --teacher-scheduler (or --scheduler) with the scheduler that it was trained "
        f"with: {', '.join(NAMED)}, or a scheduler_config.json or its folder"
    )


def _no_network(folder: Path) -> str:
    parts = [name for name in PARTS if (folder / name / "config.json").is_file()]
    if parts:
        others = f" (there is {', '.join(parts[1:])} too)" if parts[1:] else ""
        return (
            f"{folder}: a checkpoint of a trainer: give one network of it, {folder / parts[0]}"
            f"{others}, and --teacher-scheduler (or --scheduler)"
        )
    states = [name for name in STATES if (folder / name).is_file()]
    if states:
        return (
            f"{folder}: {states[0]} without a config.json, as accelerate saves a run: load it into "
            "your network and save that, network.load_state_dict(...); "
            "network.save_pretrained(FOLDER), or give the file itself"
        )
    return (
        f"{folder}: expected a diffusers pipeline folder (with {INDEX}), a network's folder (with "
        "config.json) or a checkpoint file"
    )
