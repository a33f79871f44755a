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

import torch
from packaging.requirements import Requirement

from dkdm.checks.findings import Finding
from dkdm.errors import in_a_line
from dkdm.reading.machine import usable_cores, usable_memory
from dkdm.reading.sizes import GIB


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
        what = "runs from a source folder: its requirements were not checked"
        yield Finding("dkdm", "warning", what, "run pip install -e . in that folder")
        return
    requirements = [Requirement(line) for line in lines]
    for requirement in requirements:
        if _applies(requirement):
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
    names = [r.name for r in requirements if _applies(r, extra) and not _applies(r)]
    missing = [name for name in names if _version(name) is None]
    if missing:
        what = f"optional, not installed ({', '.join(missing)})"
        return Finding(f"[{extra}]", "ok", what, f"pip install 'dkdm[{extra}]'")
    return Finding(f"[{extra}]", "ok", ", ".join(f"{name} {_version(name)}" for name in names))


def _applies(requirement: Requirement, extra: str = "") -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


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
        what = f"{_version('torchvision')}{because} fails to import, which breaks diffusers"
        remedy = f"pip uninstall {' '.join(['torchvision', *users])}"
        return Finding("torchvision", "problem", f"{what}: {in_a_line(error)}", remedy)
    return Finding("torchvision", "ok", f"{_version('torchvision')}, works; not needed")


def _requiring(name: str) -> list[str]:
    found = set()
    for distribution in metadata.distributions():
        lines = (line for line in distribution.requires or [] if line.startswith(name))
        if any(each.name == name and _applies(each) for each in map(Requirement, lines)):
            found.add(distribution.metadata["Name"])
    return sorted(found)


def _diffusers() -> Finding:
    try:
        diffusers = importlib.import_module("diffusers")
        for name in ("UNet2DModel", "DDPMScheduler", "DiffusionPipeline"):
            getattr(diffusers, name)
    except Exception as error:
        remedy = "solve the problems above first, or pip install --force-reinstall diffusers"
        return Finding("diffusers import", "problem", in_a_line(error), remedy)
    return Finding("diffusers import", "ok", "imports models, schedulers and pipelines")


def _torch() -> Finding:
    build = _torch_build()
    if torch.cuda.is_available():
        devices = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
        shown = ", ".join(f"{each.name} {each.total_memory / GIB:.0f} GiB" for each in devices)
        return Finding("device", "ok", f"{build} build, {shown}")
    if torch.backends.mps.is_available():
        return Finding("device", "ok", f"{build} build, Apple GPU (mps)")
    if build != "CPU":
        what = f"{build} build of torch, but it finds no GPU and uses the CPU"
        remedy = "check the driver (nvidia-smi or rocm-smi) and CUDA_VISIBLE_DEVICES"
        return Finding("device", "warning", what, remedy)
    if shutil.which("nvidia-smi"):
        what = "CPU build of torch on a machine with an NVIDIA driver: it uses the CPU"
        remedy = "install torch for CUDA as https://pytorch.org/get-started says"
        return Finding("device", "warning", what, remedy)
    return Finding("device", "ok", "CPU build of torch, no GPU")


def _torch_build() -> str:
    if torch.version.hip:
        return f"ROCm {torch.version.hip}"
    return f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"


def _threads() -> Finding:
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
        remedy = "stop other programs, or lower --train-batch-size and --pool-size"
        return Finding("memory", "warning", f"{what}: only for the smallest models", remedy)
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
