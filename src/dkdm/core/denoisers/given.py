"""Models and configs as a Python user gives them to a function of dkdm."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from dkdm.core.denoisers.denoiser import Denoiser
from dkdm.reading.arguments import instance, refuse

FOUR_LINES = (
    "describe it: dkdm.Denoiser(network, dkdm.from_betas(betas), 'epsilon', (3, 32, 32)), with "
    "its noise levels (from_betas, rectified_flow or karras), what it predicts and the shape "
    "of one sample"
)
Config = TypeVar("Config")


def teacher_given(teacher: Any) -> Denoiser | str:
    """A teacher as `distill` takes it. Raises UsageError for anything else, with the remedy."""
    if isinstance(teacher, (Path, str)):
        return str(teacher)
    name = getattr(teacher, "__name__", "factory")
    accepted = "give a folder, a hub id, module:factory or a dkdm.Denoiser"
    remedies = {
        nn.Module: f"dkdm does not know how to read it; {FOUR_LINES}",
        type: accepted,
        Callable: f"call it, distill({name}()), if it returns a dkdm.Denoiser",
    }
    return instance("teacher", teacher, Denoiser, accepted, remedies)


def student_given(student: Any) -> Denoiser | nn.Module | str:
    """A student as `distill` takes it. Raises UsageError for anything else, with the remedy."""
    if isinstance(student, (Denoiser, nn.Module)):
        return student
    name = getattr(student, "__name__", "factory")
    accepted = "give a preset such as 'unet-tiny', a config.json, module:factory or a network"
    remedies = {
        type: f"make one, {name}(...), or name a factory, 'module:{name}'",
        Callable: f"call it, {name}(...), or name it, 'module:{name}'",
    }
    return str(instance("student", student, str | Path, accepted, remedies))


def denoiser_given(what: str, value: Any) -> Denoiser:
    """A denoiser. Raises UsageError for anything else."""
    if isinstance(value, (str, Path)):
        refuse(what, value, f"load it first: dkdm.load_teacher({str(value)!r})")
    return instance(what, value, Denoiser, "give a dkdm.Denoiser", {nn.Module: FOUR_LINES})


def config_given(value: Any, kind: type[Config]) -> Config:
    """A config of this kind. Raises UsageError for anything else."""
    make = f"dkdm.{kind.__name__}(...)"
    remedies = {type: f"make one: {make}", dict: f"give dkdm.{kind.__name__}(**values)"}
    return instance("config", value, kind, f"give a {make}", remedies)
