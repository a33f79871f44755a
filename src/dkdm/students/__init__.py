"""Student networks: presets, a diffusers config.json, or any user code as module:factory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from dkdm.conditioning import ClassLabels, Conditioning
from dkdm.denoiser import Denoiser
from dkdm.errors import DkdmError, UsageError
from dkdm.plugins import import_object
from dkdm.prediction import Parameterization
from dkdm.process import Process
from dkdm.students.presets import PRESETS, Preset

__all__ = ["PRESETS", "Preset", "as_denoiser", "build_denoiser", "build_network", "student_of"]


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
    student = as_denoiser(spec, network, process, parameterization, sample_shape, conditioning)
    student.check()
    return student


def as_denoiser(
    name: str,
    network: nn.Module,
    process: Process,
    parameterization: Parameterization,
    sample_shape: tuple[int, ...],
    conditioning: Conditioning,
) -> Denoiser:
    """A student network with what it is read by."""
    constants = {} if isinstance(conditioning, ClassLabels) else _constants(network)
    return Denoiser(network, process, parameterization, sample_shape, conditioning, constants, name)


def _constants(network: nn.Module) -> dict[str, int]:
    """A DiT always asks for a class; one used without classes is always fed class 0."""
    norm = getattr(getattr(network, "config", None), "norm_type", None)
    return {"class_labels": 0} if norm == "ada_norm_zero" else {}


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
        cls = getattr(diffusers, str(config.get("_class_name")), None)
    except (OSError, ValueError, AttributeError) as error:
        raise UsageError(f"student config {path}: {error}") from error
    if not (isinstance(cls, type) and issubclass(cls, nn.Module) and hasattr(cls, "from_config")):
        raise UsageError(f"student config {path}: '_class_name' must name a diffusers model")
    try:
        return cls.from_config(config)
    except (TypeError, ValueError) as error:
        raise UsageError(f"student config {path}: {cls.__name__} refuses it: {error}") from error


def _from_factory(
    spec: str, sample_shape: tuple[int, ...], out_channels: int, conditioning: Conditioning
) -> nn.Module:
    factory = import_object(spec)
    try:
        network = factory(sample_shape, out_channels, conditioning)
    except Exception as error:
        raise DkdmError(f"student factory {spec} raised {type(error).__name__}: {error}") from error
    if not isinstance(network, nn.Module):
        raise UsageError(
            f"student factory {spec} returned {type(network).__name__}: expected an nn.Module"
        )
    return network
