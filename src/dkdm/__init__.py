"""Data-free knowledge distillation for diffusion models, with any architecture."""

from __future__ import annotations

import importlib
import sys
from difflib import get_close_matches
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from dkdm.moved import Moved
from dkdm.version import __version__

if TYPE_CHECKING:
    from dkdm.config import DistillConfig, TrainConfig
    from dkdm.core.denoisers.conditioning import ClassLabels, Unconditional
    from dkdm.core.denoisers.denoiser import Batch, Denoiser
    from dkdm.core.diffusion.clipping import Clipping
    from dkdm.core.diffusion.prediction import Parameterization, Prediction
    from dkdm.core.diffusion.process import Process
    from dkdm.core.diffusion.schedules import from_betas, karras, rectified_flow
    from dkdm.errors import DkdmError, UsageError
    from dkdm.models import load_teacher
    from dkdm.models.schedulers import from_scheduler_config
    from dkdm.runs.distill import distill
    from dkdm.runs.evaluate import evaluate
    from dkdm.runs.train import train
    from dkdm.shipping.graph import export_graph
    from dkdm.students import load_student

sys.meta_path.insert(0, Moved())

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
    "evaluate",
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
    "config": ("DistillConfig", "TrainConfig"),
    "core.diffusion.clipping": ("Clipping",),
    "core.denoisers.conditioning": ("ClassLabels", "Unconditional"),
    "core.denoisers.denoiser": ("Batch", "Denoiser"),
    "core.diffusion.prediction": ("Parameterization", "Prediction"),
    "core.diffusion.process": ("Process",),
    "core.diffusion.schedules": ("from_betas", "karras", "rectified_flow"),
    "errors": ("DkdmError", "UsageError"),
    "models": ("load_teacher",),
    "models.schedulers": ("from_scheduler_config",),
    "runs.distill": ("distill",),
    "runs.evaluate": ("evaluate",),
    "runs.train": ("train",),
    "shipping.graph": ("export_graph",),
    "students": ("load_student",),
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for: torch and diffusers take seconds."""
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"dkdm.{module}"), name)
    raise AttributeError(f"module 'dkdm' has no attribute '{name}'{_instead_of(name)}")


def __dir__() -> list[str]:
    return sorted(__all__)


_INSTEAD = {
    "inspect": "dkdm.checks.inspection.inspect_denoiser(denoiser), or the command `dkdm inspect`",
    "check": "Denoiser.check(), or the command `dkdm check-student`",
    "sample": "Denoiser.sample(...), or the command `dkdm sample`",
    "flow": "dkdm.rectified_flow(...)",
    "ddpm": "dkdm.from_betas(betas)",
    "edm": "dkdm.karras(...)",
    "teacher": "dkdm.load_teacher(...)",
    "student": "dkdm.load_student(...)",
    "load": "dkdm.load_teacher(...) or dkdm.load_student(...)",
    "export": "dkdm.export_graph(...), or the command `dkdm export`",
    "config": "dkdm.DistillConfig(...)",
    "model": "dkdm.Denoiser(...)",
    "scheduler": "dkdm.from_scheduler_config(config)",
}


def _instead_of(name: str) -> str:
    if name.startswith("__"):
        return ""
    if name.lower() in _INSTEAD:
        return f": use {_INSTEAD[name.lower()]}"
    by_case = {public.lower(): public for public in __all__}
    near = get_close_matches(name.lower(), by_case, 1, 0.6)
    if near:
        return f": did you mean dkdm.{by_case[near[0]]}?"
    return f": `import dkdm.{name}` first" if find_spec(f"dkdm.{name}") else ""
