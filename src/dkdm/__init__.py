"""Data-free knowledge distillation for diffusion models, with any architecture."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from dkdm.version import __version__

if TYPE_CHECKING:
    from dkdm.api import distill, train
    from dkdm.conditioning import ClassLabels, Unconditional
    from dkdm.config import DistillConfig, TrainConfig
    from dkdm.denoiser import Batch, Denoiser
    from dkdm.errors import DkdmError, UsageError
    from dkdm.graph import export_graph
    from dkdm.prediction import Parameterization, Prediction
    from dkdm.process import Clipping, Process, from_betas, karras, rectified_flow
    from dkdm.schedulers import from_scheduler_config
    from dkdm.students import load_student
    from dkdm.teachers import load_teacher

__all__ = [
    "Batch",
    "ClassLabels",
    "Clipping",
    "Denoiser",
    "DistillConfig",
    "DkdmError",
    "Parameterization",
    "Prediction",
    "Process",
    "TrainConfig",
    "Unconditional",
    "UsageError",
    "__version__",
    "distill",
    "export_graph",
    "from_betas",
    "from_scheduler_config",
    "karras",
    "load_student",
    "load_teacher",
    "rectified_flow",
    "train",
]

_HOMES = {
    "api": ("distill", "train"),
    "conditioning": ("ClassLabels", "Unconditional"),
    "config": ("DistillConfig", "TrainConfig"),
    "denoiser": ("Batch", "Denoiser"),
    "errors": ("DkdmError", "UsageError"),
    "graph": ("export_graph",),
    "prediction": ("Parameterization", "Prediction"),
    "process": ("Clipping", "Process", "from_betas", "karras", "rectified_flow"),
    "schedulers": ("from_scheduler_config",),
    "students": ("load_student",),
    "teachers": ("load_teacher",),
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for: torch and diffusers take seconds."""
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"dkdm.{module}"), name)
    raise AttributeError(f"module 'dkdm' has no attribute '{name}'")
