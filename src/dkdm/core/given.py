"""Models and places as a Python user gives them to a function of dkdm."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from dkdm.core.denoiser import Denoiser
from dkdm.reading.arguments import refuse

FOUR_LINES = (
    "describe it: dkdm.Denoiser(network, dkdm.from_betas(betas), 'epsilon', (3, 32, 32)), with "
    "its noise levels (from_betas, rectified_flow or karras), what it predicts and the shape "
    "of one sample"
)
Config = TypeVar("Config")


def teacher_given(teacher: Any) -> Denoiser | str:
    """A teacher as `distill` takes it. Raises UsageError for anything else, with the remedy."""
    if isinstance(teacher, (Denoiser, str)):
        return teacher
    if isinstance(teacher, Path):
        return str(teacher)
    if isinstance(teacher, nn.Module):
        refuse("teacher", teacher, f"dkdm does not know how to read it; {FOUR_LINES}")
    if callable(teacher) and not isinstance(teacher, type):
        name = getattr(teacher, "__name__", "factory")
        refuse("teacher", teacher, f"call it, distill({name}()), if it returns a dkdm.Denoiser")
    refuse("teacher", teacher, "give a folder, a hub id, module:factory or a dkdm.Denoiser")


def student_given(student: Any) -> Denoiser | nn.Module | str:
    """A student as `distill` takes it. Raises UsageError for anything else, with the remedy."""
    if isinstance(student, (Denoiser, nn.Module, str)):
        return student
    if isinstance(student, Path):
        return str(student)
    if isinstance(student, type):
        name = student.__name__
        refuse("student", student, f"make one, {name}(...), or name a factory, 'module:{name}'")
    if callable(student):
        name = getattr(student, "__name__", "factory")
        refuse("student", student, f"call it, {name}(...), or name it, 'module:{name}'")
    accepted = "give a preset such as 'unet-tiny', a config.json, module:factory or a network"
    refuse("student", student, accepted)


def denoiser_given(what: str, value: Any) -> Denoiser:
    """A denoiser. Raises UsageError for anything else."""
    if isinstance(value, Denoiser):
        return value
    if isinstance(value, (str, Path)):
        refuse(what, value, f"load it first: dkdm.load_teacher({str(value)!r})")
    if isinstance(value, nn.Module):
        refuse(what, value, FOUR_LINES)
    refuse(what, value, "give a dkdm.Denoiser")


def config_given(value: Any, kind: type[Config]) -> Config:
    """A config of this kind. Raises UsageError for anything else."""
    name = kind.__name__
    if isinstance(value, kind):
        return value
    if isinstance(value, type):
        refuse("config", value, f"make one: dkdm.{name}(...)")
    if isinstance(value, dict):
        refuse("config", value, f"give dkdm.{name}(**values)")
    refuse("config", value, f"give a dkdm.{name}(...)")
