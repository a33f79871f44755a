"""Check the environment: what keeps dkdm from working on this machine, and what to do about it."""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
import platform
import shutil
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from dkdm.checks.findings import Finding
from dkdm.reading.machine import usable_cores, usable_memory

GIB = 2**30


def examine() -> list[Finding]:
    """Look at Python, packages, torch, processors, memory and disk; takes seconds, for imports."""
    return [
        Finding("python", "ok", f"{platform.python_version()} on {platform.platform()}"),
        *_packages(),
        _torchvision(),
        _diffusers(),
        _torch(),
        _threads(),
        _memory(),
        _disk(Path.cwd()),
        _hub(),
    ]


def _packages() -> Iterator[Finding]:
    try:
        lines = metadata.requires("dkdm") or []
    except metadata.PackageNotFoundError:
        yield Finding(
            "dkdm",
            "warning",
            "runs from a source folder: its requirements were not checked",
            "run pip install -e . in that folder",
        )
        return
    requirements = [Requirement(line) for line in lines]
    for requirement in requirements:
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield _required(requirement)
    extras = metadata.metadata("dkdm").get_all("Provides-Extra") or []
    for extra in sorted(set(extras) - {"dev"}):
        yield _extra(extra, requirements)


def _required(requirement: Requirement) -> Finding:
    version, remedy = _version(requirement.name), f"pip install '{requirement}'"
    if version is None:
        return Finding(requirement.name, "problem", "not installed", remedy)
    if not requirement.specifier.contains(version, prereleases=True):
        what = f"{version}, but dkdm needs {requirement.specifier}"
        return Finding(requirement.name, "problem", what, remedy)
    return Finding(requirement.name, "ok", version)


def _extra(extra: str, requirements: Iterable[Requirement]) -> Finding:
    """An extra; it may be missing."""
    names = [
        requirement.name
        for requirement in requirements
        if requirement.marker is not None
        and requirement.marker.evaluate({"extra": extra})
        and not requirement.marker.evaluate({"extra": ""})
    ]
    missing = [name for name in names if _version(name) is None]
    if missing:
        what = f"optional, not installed ({', '.join(missing)})"
        return Finding(f"[{extra}]", "ok", what, f"pip install 'dkdm[{extra}]'")
    return Finding(f"[{extra}]", "ok", ", ".join(f"{name} {_version(name)}" for name in names))


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _torchvision() -> Finding:
    """With a torch of another build it fails to import, and diffusers with it."""
    if importlib.util.find_spec("torchvision") is None:
        return Finding("torchvision", "ok", "not installed; not needed")
    try:
        importlib.import_module("torchvision")
    except Exception as error:
        users = _requiring("torchvision")
        because = f" (installed for {', '.join(users)})" if users else ""
        return Finding(
            "torchvision",
            "problem",
            f"{_version('torchvision')} is installed{because} but fails to import, which breaks "
            f"diffusers: {_short(error)}",
            f"pip uninstall {' '.join(['torchvision', *users])}",
        )
    return Finding("torchvision", "ok", f"{_version('torchvision')}, works; not needed")


def _requiring(name: str) -> list[str]:
    """Installed packages that require `name`."""
    found = set()
    for distribution in metadata.distributions():
        for line in distribution.requires or []:
            if line.startswith(name) and _is_needed(Requirement(line), name):
                found.add(distribution.metadata["Name"])
    return sorted(found)


def _is_needed(requirement: Requirement, name: str) -> bool:
    marker = requirement.marker
    return requirement.name == name and (marker is None or marker.evaluate({"extra": ""}))


def _diffusers() -> Finding:
    try:
        diffusers = importlib.import_module("diffusers")
        for name in ("UNet2DModel", "DDPMScheduler", "DiffusionPipeline"):
            getattr(diffusers, name)
    except Exception as error:
        return Finding(
            "diffusers import",
            "problem",
            _short(error),
            "solve the problems above first; otherwise pip install --force-reinstall diffusers",
        )
    return Finding("diffusers import", "ok", "imports models, schedulers and pipelines")


def _short(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[-1]}"


def _torch() -> Finding:
    import torch

    build = _torch_build()
    if torch.cuda.is_available():
        devices = [
            torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())
        ]
        shown = ", ".join(f"{each.name} {each.total_memory / GIB:.0f} GiB" for each in devices)
        return Finding("device", "ok", f"{build} build, {shown}")
    if torch.backends.mps.is_available():
        return Finding("device", "ok", f"{build} build, Apple GPU (mps)")
    if build != "CPU":
        return Finding(
            "device",
            "warning",
            f"{build} build of torch, but it finds no GPU and uses the CPU",
            "check the driver (nvidia-smi or rocm-smi) and CUDA_VISIBLE_DEVICES",
        )
    if shutil.which("nvidia-smi"):
        return Finding(
            "device",
            "warning",
            "CPU build of torch on a machine with an NVIDIA driver: it uses the CPU",
            "install torch for CUDA as https://pytorch.org/get-started says",
        )
    return Finding("device", "ok", "CPU build of torch, no GPU")


def _torch_build() -> str:
    import torch

    if torch.version.hip:
        return f"ROCm {torch.version.hip}"
    return f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"


def _threads() -> Finding:
    import torch

    threads, cores = torch.get_num_threads(), usable_cores()
    what = f"{threads} on {cores:g} cores"
    if threads > math.ceil(cores):
        remedy = f"export OMP_NUM_THREADS={math.ceil(cores)}"
        return Finding("threads", "warning", f"{what}: they wait for each other", remedy)
    others = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if others > cores:
        what = f"{what}, but {others:.1f} processes want to run: everything is slower"
        return Finding("threads", "warning", what, "wait for the other programs, or stop them")
    return Finding("threads", "ok", what)


def _memory() -> Finding:
    available = usable_memory()
    what = f"{available / GIB:.1f} GiB available"
    if available < 2 * GIB:
        return Finding(
            "memory",
            "warning",
            f"{what}: enough for the smallest models only",
            "stop other programs, or lower --train-batch-size and --pool-size",
        )
    return Finding("memory", "ok", what)


def _disk(folder: Path) -> Finding:
    free = shutil.disk_usage(folder).free
    what, remedy = f"{free / GIB:.1f} GiB free here", "choose an --output-dir on another disk"
    if not os.access(folder, os.W_OK):
        return Finding("disk", "warning", f"{folder} is not writable", remedy)
    if free < GIB / 4:
        return Finding("disk", "problem", f"{what}: a run will fail", remedy)
    if free < 4 * GIB:
        return Finding("disk", "warning", f"{what}: checkpoints may fill it", remedy)
    return Finding("disk", "ok", what)


def _hub() -> Finding:
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        what = "HF_HUB_OFFLINE is set: finds only models that are already downloaded"
        return Finding("hub", "ok", what, "unset HF_HUB_OFFLINE to download")
    return Finding("hub", "ok", "models are downloaded when needed")
