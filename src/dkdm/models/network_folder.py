"""A folder that is no pipeline: a network alone, as trainers save it, and its scheduler."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dkdm.core.denoisers.bundle import Bundle
from dkdm.core.denoisers.denoiser import Denoiser
from dkdm.errors import UsageError
from dkdm.models.architectures import ARCHITECTURES, Architecture
from dkdm.models.effective import class_config, network_name
from dkdm.models.locate import INDEX
from dkdm.models.lora import IN_FOLDER
from dkdm.models.options import LoadOptions
from dkdm.models.pipeline_folder import denoiser_of, load_network
from dkdm.models.schedulers import NAMED, named_config
from dkdm.reading.fields import Fields, as_named, read_json
from dkdm.reading.sizes import check_numbers
from dkdm.reading.weights import refuse_other_contents

PARTS = ("unet_ema", "transformer_ema", "unet", "transformer")
_PARTS_ALONE = {
    "scheduler_config.json": "a scheduler",
    "tokenizer_config.json": "a tokenizer",
    "preprocessor_config.json": "a feature extractor",
}
ADAPTER = "adapter_config.json"
STATES = ("model.safetensors", "pytorch_model.bin", "diffusion_pytorch_model.safetensors")


def load_lone_network(folder: Path, options: LoadOptions) -> Denoiser:
    """Load a network from a folder with its config and weights, on the noise of options.scheduler.

    Raises UsageError, with what to give instead, for a folder of another kind, without a scheduler,
    and for a network that dkdm does not know or that reads text; DkdmError if its weights are
    missing or do not match.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise UsageError(f"{folder}: {_no_network(folder)}")
    config = read_json(file, "a network's config")
    kind = Fields(config, str(file)).text("_class_name", "")
    if refusal := _no_denoiser(kind, config):
        raise UsageError(f"{folder}: {refusal}: {_whole(folder)}")
    if options.scheduler is None and (folder.parent / INDEX).is_file():
        raise UsageError(f"{folder}: one part of a pipeline: {_whole(folder)}")
    known = _architecture(folder, config)
    if options.scheduler is None:
        raise UsageError(
            f"{folder}: a network alone ({kind or 'without a class'}), which does not say how "
            "noise is added: give --teacher-scheduler with the scheduler that it was trained with: "
            f"{', '.join(NAMED)}, or a scheduler_config.json or its folder"
        )
    if options.lora:
        raise UsageError(
            f"--teacher-lora: {folder} is a network without its pipeline, which knows the formats "
            "of LoRA files: remove this option"
        )
    in_pixels = config.get("in_channels") in (1, 3)
    scheduler = named_config(str(options.scheduler), clip_range=1.0 if in_pixels else None)
    refuse_other_contents(folder)
    config = class_config(config, known.name, str(file))
    check_numbers(config, str(file))
    noise = class_config(scheduler, str(scheduler.get("_class_name")), "the scheduler's config")
    denoiser = denoiser_of(folder, known, config, noise, {}, Bundle(), options)
    return replace(denoiser, network=load_network(folder, known.name, options), call=None)


def _architecture(folder: Path, config: Mapping[str, Any]) -> Architecture:
    name = network_name(str(config.get("_class_name")), config)
    known = ARCHITECTURES.get(name)
    if known is None:
        raise UsageError(
            f"{folder}: its network is {as_named(name)}; dkdm reads {', '.join(ARCHITECTURES)}"
        )
    if known.needs_text(config):
        raise UsageError(
            f"{folder}: {name} is conditioned on text: give the pipeline folder that has its text "
            "encoders, with this network in place of its network"
        )
    return known


def _no_denoiser(kind: str, config: Mapping[str, Any]) -> str | None:
    """What else the config of a folder is of; None if it may be a denoiser's."""
    if not kind and ("model_type" in config or "architectures" in config):
        return "a model of transformers, such as a text encoder, and no denoiser"
    if kind.startswith(("Autoencoder", "AsymmetricAutoencoder", "VQModel", "ConsistencyDecoder")):
        return f"an autoencoder ({as_named(kind)}) and no denoiser"
    if kind.startswith(("ControlNet", "T2IAdapter", "MotionAdapter")) or "ControlNet" in kind:
        return f"a part that steers another model ({as_named(kind)}) and no denoiser of its own"
    return None


def _whole(folder: Path) -> str:
    """What to give in place of one part of a pipeline."""
    if (folder.parent / INDEX).is_file():
        return f"give the pipeline's folder, {folder.parent}"
    return f"give the folder that has {INDEX}, with all parts of a model"


def _no_network(folder: Path) -> str:
    """What a folder without a config.json holds, and what to give in its place."""
    if (folder / ADAPTER).is_file():
        return (
            f"an adapter of peft ({ADAPTER}), which changes another model: merge the two, "
            "PeftModel.from_pretrained(network, FOLDER).merge_and_unload(), and give the pipeline "
            "that you save with the result"
        )
    if lora := _first_in(folder, IN_FOLDER):
        return (
            f"a LoRA ({lora}), which changes a model: give that model, and this folder as "
            "--teacher-lora"
        )
    parts = [name for name in PARTS if (folder / name / "config.json").is_file()]
    if parts:
        others = f" (there is {', '.join(parts[1:])} too)" if parts[1:] else ""
        return (
            f"a checkpoint of a trainer: give one network of it, {folder / parts[0]}{others}, and "
            "--teacher-scheduler"
        )
    if state := _first_in(folder, STATES):
        return (
            f"{state} without a config.json, as accelerate saves a run: load it into your network "
            "and save that, network.load_state_dict(...); network.save_pretrained(FOLDER), or give "
            "the file itself"
        )
    if alone := _first_in(folder, _PARTS_ALONE):
        return f"{_PARTS_ALONE[alone]} alone, and no denoiser: {_whole(folder)}"
    return (
        f"give a diffusers pipeline folder (with {INDEX}), a network's folder (with config.json) "
        "or a checkpoint file"
    )


def _first_in(folder: Path, names: Iterable[str]) -> str | None:
    return next((name for name in names if (folder / name).is_file()), None)
