"""A diffusers pipeline folder with UNet2DModel or DiTTransformer2DModel and a scheduler config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dkdm.conditioning import ClassLabels, Conditioning, Unconditional
from dkdm.denoiser import Denoiser
from dkdm.errors import DkdmError, UsageError
from dkdm.prediction import Parameterization
from dkdm.process import from_scheduler_config
from dkdm.teachers.locate import INDEX

NETWORKS = ("UNet2DModel", "DiTTransformer2DModel")


def load_pipeline_folder(folder: Path, *, variant: str | None, dtype: str) -> Denoiser:
    """Load the denoiser of a pipeline folder.

    Raises UsageError where the folder is no pipeline or one of another kind, DkdmError where its
    weights are missing or do not match.
    """
    index = read_json(folder / INDEX, "a diffusers pipeline folder")
    component, network_class = _network_of(index, folder)
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json", "its scheduler's config")
    process = from_scheduler_config(scheduler)
    flow = scheduler["_class_name"].startswith("Flow")
    parameterization = Parameterization(
        scheduler.get("prediction_type", "flow_prediction" if flow else "epsilon"),
        scheduler.get("variance_type", "fixed_small"),
    )
    network = _load_network(folder / component, network_class, variant, dtype)
    config: dict[str, Any] = dict(network.config)  # type: ignore[arg-type]
    conditioning, constants = _conditioning(config, index)
    return Denoiser(
        network, process, parameterization, _shape(config, folder), conditioning, constants
    )


def read_json(path: Path, what: str) -> dict[str, Any]:
    """Read a JSON object. Raises UsageError naming what was looked for."""
    try:
        return dict(json.loads(path.read_text()))
    except FileNotFoundError as error:
        raise UsageError(f"{path.parent}: expected {what}, but {path.name} is missing") from error
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read as JSON: {error}") from error


def _network_of(index: dict[str, Any], folder: Path) -> tuple[str, str]:
    kind = str(index.get("_class_name"))
    if "Consistency" in kind:
        raise UsageError(
            f"{folder}: a consistency model ({kind}) maps noise to data in one jump and has no "
            "reverse transition to learn from; distil the diffusion model it came from"
        )
    parts = {name: value[1] for name, value in index.items() if _is_component(name, value)}
    foreign = sorted(set(parts) - {"unet", "transformer", "scheduler"})
    if foreign:
        raise UsageError(
            f"{folder}: a {kind} with {', '.join(foreign)} is not supported: expected a "
            f"pixel-space pipeline of {' or '.join(NETWORKS)} and a scheduler"
        )
    for component in ("unet", "transformer"):
        if parts.get(component) in NETWORKS:
            return component, parts[component]
    found = parts.get("unet") or parts.get("transformer") or "no network"
    raise UsageError(f"{folder}: found {found}, expected {' or '.join(NETWORKS)}")


def _is_component(name: str, value: Any) -> bool:
    """model_index.json lists a component as [library, class]."""
    pair = isinstance(value, list) and len(value) == 2 and value[0] is not None
    return pair and not name.startswith("_") and name != "class_names"


def _load_network(folder: Path, name: str, variant: str | None, dtype: str) -> nn.Module:
    import diffusers

    cls = getattr(diffusers, name)
    try:
        network, info = cls.from_pretrained(
            folder,
            variant=variant,
            torch_dtype=getattr(torch, dtype),
            output_loading_info=True,
            low_cpu_mem_usage=False,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise DkdmError(f"{folder}: the weights of {name} cannot be loaded: {error}") from error
    wrong = [
        f"{len(info[key])} {key.replace('_', ' ')} ({', '.join(map(str, info[key][:3]))})"
        for key in ("missing_keys", "unexpected_keys", "mismatched_keys")
        if info[key]
    ]
    if wrong:
        raise DkdmError(f"{folder}: the weights do not belong to this {name}: {'; '.join(wrong)}")
    return network.eval().requires_grad_(False)


def _conditioning(
    config: dict[str, Any], index: dict[str, Any]
) -> tuple[Conditioning, dict[str, int]]:
    """Classes as the network embeds them; the null class and names as model_index.json says."""
    embedded = config.get("num_class_embeds") or config.get("num_embeds_ada_norm")
    null = index.get("null_class")
    names = index.get("class_names")
    if not embedded:
        return Unconditional(), {}
    if embedded == 1:
        return Unconditional(), {"class_labels": 0}
    classes = embedded - 1 if null == embedded - 1 else embedded
    return ClassLabels(classes, null, None, tuple(names) if names else None), {}


def _shape(config: dict[str, Any], folder: Path) -> tuple[int, ...]:
    size = config.get("sample_size")
    if size is None:
        raise UsageError(f"{folder}: the network's config has no sample_size")
    height, width = (size, size) if isinstance(size, int) else size
    return int(config["in_channels"]), int(height), int(width)
