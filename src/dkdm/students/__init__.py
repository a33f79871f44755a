"""Student networks: presets, a diffusers config.json, or any user code as module:factory."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dkdm.conditioning import ClassLabels, Conditioning
from dkdm.denoiser import Batch, Denoiser
from dkdm.errors import DkdmError, UsageError
from dkdm.prediction import Parameterization
from dkdm.process import Process
from dkdm.students.presets import PRESETS, Preset

__all__ = ["PRESETS", "Preset", "build_network", "build_denoiser", "student_of", "try_once"]


def student_of(spec: str, teacher: Denoiser) -> Denoiser:
    """A fresh student with the teacher's process, parameterization and conditioning.

    spec: a preset's name, the path of a diffusers `config.json`, or `module:factory`, called as
    `factory(sample_shape, out_channels, conditioning)`. Raises UsageError where it does not fit.
    """
    conditioning = teacher.conditioning
    return build_denoiser(
        spec, teacher.process, teacher.parameterization, teacher.sample_shape, conditioning
    )


def build_denoiser(
    spec: str,
    process: Process,
    parameterization: Parameterization,
    sample_shape: tuple[int, ...],
    conditioning: Conditioning,
) -> Denoiser:
    """Build a network for these and try it once."""
    out_channels = sample_shape[0] * (2 if parameterization.learns_variance else 1)
    network = build_network(spec, sample_shape, out_channels, conditioning)
    denoiser = Denoiser(
        network, process, parameterization, sample_shape, conditioning, _constants(network), spec
    )
    if isinstance(conditioning, ClassLabels):
        denoiser = replace(denoiser, constants={})
    try_once(denoiser)
    return denoiser


def _constants(network: nn.Module) -> dict[str, int]:
    """A DiT always asks for a class; one used without classes is always fed class 0."""
    config = getattr(network, "config", {})
    return {"class_labels": 0} if config.get("norm_type") == "ada_norm_zero" else {}


def build_network(
    spec: str, sample_shape: tuple[int, ...], out_channels: int, conditioning: Conditioning
) -> nn.Module:
    """The network a spec names. Raises UsageError for one that names nothing."""
    if spec in PRESETS:
        return PRESETS[spec].build(sample_shape, out_channels, conditioning)
    if spec.endswith(".json"):
        return _from_diffusers_config(Path(spec))
    if ":" in spec:
        return _from_factory(spec, sample_shape, out_channels, conditioning)
    raise UsageError(
        f"unknown student '{spec}': expected one of {', '.join(PRESETS)}, the path of a diffusers "
        "config.json, or module:factory"
    )


def _from_diffusers_config(path: Path) -> nn.Module:
    import diffusers

    try:
        config: dict[str, Any] = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise UsageError(f"student config {path}: {error}") from error
    cls = getattr(diffusers, str(config.get("_class_name")), None)
    if cls is None or not hasattr(cls, "from_config"):
        raise UsageError(f"student config {path}: '_class_name' must name a diffusers model")
    return cls.from_config(config)  # type: ignore[no-any-return]


def _from_factory(
    spec: str, sample_shape: tuple[int, ...], out_channels: int, conditioning: Conditioning
) -> nn.Module:
    factory = import_object(spec)
    try:
        network = factory(sample_shape, out_channels, conditioning)
    except Exception as error:
        raise DkdmError(f"student factory {spec} raised {type(error).__name__}: {error}") from error
    if not isinstance(network, nn.Module):
        raise UsageError(f"student factory {spec} returned {type(network).__name__}: expected an nn.Module")
    return network


def import_object(spec: str) -> Any:
    """Import `module:name`. Raises UsageError where either is missing."""
    module, _, name = spec.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"cannot import {spec}: {error}") from error


@torch.no_grad()
def try_once(denoiser: Denoiser) -> None:
    """Run the network on two samples. Raises UsageError where the shapes do not fit."""
    generator = torch.Generator().manual_seed(0)
    cond = denoiser.conditioning.draw(2, generator)
    x = torch.zeros(2, *denoiser.sample_shape, device=denoiser.device)
    t = torch.tensor([0, denoiser.process.num_levels - 1])
    try:
        denoiser.predict(Batch(x, t, cond, t))
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(
            f"{denoiser.name} does not fit samples of shape {denoiser.sample_shape} with conditions "
            f"{sorted(cond) or 'none'}: {type(error).__name__}: {error}"
        ) from error
    denoiser.evaluations = 0
