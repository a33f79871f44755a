"""Modules under the names they had before: `import dkdm.pool` gives `dkdm.core.sources.pool`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from functools import partial
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# Modules that moved to another folder and kept their name.
KEPT = {
    ("", "checks"): "doctor inspection",
    ("", "core"): "randomness",
    ("", "core.denoisers"): ("bundle calls conditioning denoiser given inputs matching modes toy"),
    ("", "core.diffusion"): "prediction process steps",
    ("", "core.objectives"): "objective",
    ("", "core.saving"): "checkpoint progress",
    ("", "core.sources"): "pool",
    ("", "core.training"): "trainer",
    ("core", "core.denoisers"): (
        "bundle calls compiled conditioning decoding denoiser faster given graphs inputs kinds "
        "matching modes refusals teachers toy"
    ),
    ("core", "core.diffusion"): (
        "clipping prediction process schedules solvers steps time variances"
    ),
    ("core", "core.distributed"): "lockstep sharded spread units",
    ("core", "core.objectives"): "feature_loss objective positions variational weighting",
    ("core", "core.saving"): "checkpoint checksums folders progress stopping tolerance",
    ("core", "core.sources"): (
        "ahead budget chains fill filling finished finished_by_all ladder mixed moves pool replay "
        "several states storage"
    ),
    ("core", "core.training"): "bad_steps learning muon precision selection trainer",
    ("", "models"): "effective prompts schedulers",
    ("", "reading"): "allowed arguments arrays made_here places plugins quantization sizes",
    ("", "report"): "charts plots",
    ("", "runs"): "launch recipes",
    ("", "shipping"): "card graph hub licence markdown",
    ("teachers", "models.formats"): (
        "dit edm edm2 first_stage flags guided_diffusion latent_diffusion lucidrains "
        "originals single_file state_dict"
    ),
}

# All others.
RENAMED = {
    "api": "",
    "check_student": "checks.student",
    "check_student.blame": "shipping.graph.fault_line",
    "datasets": "data.images",
    "estimate": "runs.cost",
    "evaluation.classes": "evaluation.metrics",
    "evaluation.features": "data.fashion.reference",
    "export": "shipping.pipeline_folder",
    "features": "core.objectives.feature_loss",
    "finish": "runs.outputs",
    "generated": "reading.files",
    "graph.trail": "shipping.graph.fault_line",
    "inspection.memory": "evaluation.memory",
    "inspection.tables": "checks.inspection.facts",
    "listing": "checks.student_table",
    "names": "config",
    "own": "models.custom_network",
    "pictures": "report.grids",
    "plan": "checks.memory_plan",
    "quantized": "shipping.int8",
    "report.numbers": "evaluation.numbers",
    "ship": "shipping.custom_network",
    "students.other": "students.any_rank",
    "students.presets": "students",
    "students.positions": "core.objectives.positions",
    "sources": "core.sources.source",
    "teachers": "models",
    "teachers.downloads": "models.locate",
    "teachers.families": "models.pipelines",
    "teachers.latents": "models.formats.first_stage",
    "teachers.networks": "models.architectures",
    "trainset": "data.training_set",
    "typed": "reading.values",
}

MOVED = RENAMED | {
    f"{old}.{name}".lstrip("."): f"{new}.{name}"
    for (old, new), names in KEPT.items()
    for name in names.split()
}

# Where names are now that a module had under its former name.
SPLIT = {
    "estimate": ("runs.distill",),
    "pool": ("core.sources.chains", "core.sources.fill"),
    "prediction": ("core.diffusion.variances",),
    "process": (
        "core.diffusion.schedules",
        "core.diffusion.clipping",
        "core.diffusion.time",
        "core.denoisers.matching",
    ),
    "schedulers": ("models.stand_ins",),
    "trainer": ("core.training.learning",),
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
        """The module of today takes the place of the empty one, unless it was split.

        A package's loaded modules are known under its former name at once: one that is imported
        later becomes an attribute of the package, in place of a function of its name.
        """
        name = module.__name__.partition(".")[2]
        if name in SPLIT:
            module.__getattr__ = partial(_found_in, (present_name(name), *SPLIT[name]))
            return
        found = sys.modules[module.__name__] = _module(present_name(name))
        for inner in [each for each in sys.modules if each.startswith(f"{found.__name__}.")]:
            former = inner.replace(found.__name__, module.__name__, 1)
            sys.modules.setdefault(former, sys.modules[inner])


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"dkdm.{name}".rstrip("."))


def _found_in(modules: tuple[str, ...], name: str) -> Any:
    """A name from the first of these modules that has it. Raises AttributeError for any other."""
    for module in modules:
        if hasattr(_module(module), name):
            return getattr(_module(module), name)
    raise AttributeError(f"module 'dkdm.{modules[0]}' has no attribute '{name}'")
