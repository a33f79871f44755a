"""Modules under the names they had before: `import dkdm.pool` gives `dkdm.core.pool`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from functools import partial
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MOVED = {
    "allowed": "reading.allowed",
    "api": "",
    "arguments": "reading.arguments",
    "arrays": "reading.arrays",
    "bundle": "core.bundle",
    "calls": "core.calls",
    "card": "shipping.card",
    "charts": "report.charts",
    "check_student": "checks.student",
    "checkpoint": "core.checkpoint",
    "conditioning": "core.conditioning",
    "datasets": "data.images",
    "denoiser": "core.denoiser",
    "doctor": "checks.doctor",
    "effective": "models.effective",
    "estimate": "runs.cost",
    "evaluation.classes": "evaluation.metrics",
    "evaluation.features": "data.fashion.reference",
    "export": "shipping.pipeline_folder",
    "features": "core.feature_loss",
    "finish": "runs.outputs",
    "generated": "reading.files",
    "given": "core.given",
    "graph": "shipping.graph",
    "hub": "shipping.hub",
    "inputs": "core.inputs",
    "inspection": "checks.inspection",
    "inspection.memory": "evaluation.memory",
    "launch": "runs.launch",
    "licence": "shipping.licence",
    "listing": "checks.student_table",
    "made_here": "reading.made_here",
    "markdown": "shipping.markdown",
    "matching": "core.matching",
    "modes": "core.modes",
    "objective": "core.objective",
    "own": "models.custom_network",
    "pictures": "report.grids",
    "places": "reading.places",
    "plan": "checks.memory_plan",
    "plots": "report.plots",
    "plugins": "reading.plugins",
    "pool": "core.pool",
    "prediction": "core.prediction",
    "process": "core.process",
    "progress": "core.progress",
    "prompts": "models.prompts",
    "quantization": "reading.quantization",
    "quantized": "shipping.int8",
    "randomness": "core.randomness",
    "recipes": "runs.recipes",
    "schedulers": "models.schedulers",
    "report.numbers": "evaluation.numbers",
    "ship": "shipping.custom_network",
    "sizes": "reading.sizes",
    "sources": "core.sources",
    "steps": "core.steps",
    "students.other": "students.any_rank",
    "students.positions": "core.positions",
    "teachers": "models",
    "teachers.dit": "models.formats.dit",
    "teachers.edm": "models.formats.edm",
    "teachers.edm2": "models.formats.edm2",
    "teachers.first_stage": "models.formats.first_stage",
    "teachers.flags": "models.formats.flags",
    "teachers.guided_diffusion": "models.formats.guided_diffusion",
    "teachers.latent_diffusion": "models.formats.latent_diffusion",
    "teachers.latents": "models.formats.latents",
    "teachers.lucidrains": "models.formats.lucidrains",
    "teachers.networks": "models.architectures",
    "teachers.originals": "models.formats.originals",
    "teachers.single_file": "models.formats.single_file",
    "teachers.state_dict": "models.formats.state_dict",
    "toy": "core.toy",
    "trainer": "core.trainer",
    "trainset": "data.training_set",
    "typed": "reading.values",
}

# Where names are now that a module had under its former name.
SPLIT = {
    "pool": ("core.chains", "core.fill"),
    "process": ("core.schedules", "core.clipping", "core.time", "core.matching"),
    "trainer": ("core.ema",),
}


def present_name(module: str) -> str:
    """Where a module lies today, both without `dkdm.`."""
    package, _, name = module.rpartition(".")
    if module in MOVED or not package:
        return MOVED.get(module, module)
    return f"{present_name(package)}.{name}"


class Moved:
    """Finds a module under its former name, and gives the one that it is now."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """A specification for former names; None for all others."""
        del path, target
        package, _, module = name.partition(".")
        known = package == "dkdm" and present_name(module) != module
        return ModuleSpec(name, self) if known else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> None:
        """No module of its own."""

    def exec_module(self, module: Any) -> None:
        """The module of today takes the place of the empty one, unless it was split."""
        name = module.__name__.partition(".")[2]
        if name in SPLIT:
            module.__getattr__ = partial(_found_in, (present_name(name), *SPLIT[name]))
        else:
            sys.modules[module.__name__] = _module(present_name(name))


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"dkdm.{name}".rstrip("."))


def _found_in(modules: tuple[str, ...], name: str) -> Any:
    """A name from the first of these modules that has it. Raises AttributeError for any other."""
    for module in modules:
        if hasattr(_module(module), name):
            return getattr(_module(module), name)
    raise AttributeError(f"module 'dkdm.{modules[0]}' has no attribute '{name}'")
