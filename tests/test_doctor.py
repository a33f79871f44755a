"""The environment check: what is broken on purpose is found, with what to do."""

import io
import os
import sys
import types
from importlib import metadata

import pytest
import torch
from rich.console import Console

from dkdm.checks import doctor
from dkdm.checks.doctor import examine
from dkdm.checks.findings import Finding, print_findings
from dkdm.reading.machine import usable_cores, usable_memory

GIB = 2**30


@pytest.fixture(scope="module")
def findings():
    return {finding.name: finding for finding in examine()}


def only(findings, name):
    [found] = [finding for finding in findings if finding.name == name]
    return found


def test_every_corner_is_looked_at(findings):
    assert {"python", "torchvision", "diffusers import", "device", "threads", "memory", "disk"} <= (
        set(findings)
    )
    assert findings["diffusers import"].status == "ok"
    for finding in findings.values():
        assert finding.status == "ok" or finding.remedy, finding


def requires(monkeypatch, *lines):
    monkeypatch.setattr(metadata, "requires", lambda name: list(lines) if name == "dkdm" else [])
    fields = types.SimpleNamespace(get_all=lambda key: {"Provides-Extra": ["dev", "odd"]}[key])
    monkeypatch.setattr(metadata, "metadata", lambda name: {"dkdm": fields}[name])
    return list(doctor._packages())


def test_packages_as_required_too_old_and_missing(monkeypatch):
    found = requires(
        monkeypatch, "torch>=2.6", "numpy>=999", "no-such-package>=1", "old; python_version<'3'"
    )
    assert [(each.name, each.status) for each in found] == [
        ("torch", "ok"),
        ("numpy", "problem"),
        ("no-such-package", "problem"),
        ("[odd]", "ok"),
    ]
    assert found[1].remedy == "pip install 'numpy>=999'"
    assert found[2].what == "not installed"


def test_optional_packages_may_be_absent(monkeypatch):
    extra = "; extra == 'odd'"
    [absent] = requires(monkeypatch, f"no-such-package{extra}", f"numpy{extra}")
    assert (absent.name, absent.status) == ("[odd]", "ok")
    assert absent.what == "optional, not installed (no-such-package)"
    assert absent.remedy == "pip install 'dkdm[odd]'"
    [present] = requires(monkeypatch, f"numpy{extra}")
    assert present.what == f"numpy {metadata.version('numpy')}"


def test_sources_that_are_not_installed_are_said(monkeypatch):
    def absent(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", absent)
    [found] = doctor._packages()
    assert found.status == "warning"
    assert "were not checked" in found.what


def fake_package(folder, name, source):
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(source)
    info = folder / f"{name}-0.1.dist-info"
    info.mkdir()
    return info / "METADATA"


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A folder that packages are found in, forgotten afterwards."""
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in ("torchvision", "needs_vision"):
        sys.modules.pop(name, None)


def test_broken_torchvision_is_a_problem_and_its_users_are_named(elsewhere):
    header = "Metadata-Version: 2.1\nVersion: 0.1\n"
    source = "raise RuntimeError('operator torchvision::nms does not exist')"
    fake_package(elsewhere, "torchvision", source).write_text(f"{header}Name: torchvision\n")
    fake_package(elsewhere, "needs_vision", "").write_text(
        f"{header}Name: needs-vision\nRequires-Dist: torchvision>=0.1\n"
    )
    found = doctor._torchvision()
    assert found.status == "problem"
    assert "torchvision::nms does not exist" in found.what
    assert "installed for needs-vision" in found.what
    assert found.remedy == "pip uninstall torchvision needs-vision"


def test_working_torchvision_is_left_alone(elsewhere):
    fake_package(elsewhere, "torchvision", "").write_text("Name: torchvision\nVersion: 0.1\n")
    assert doctor._torchvision().status == "ok"


def test_diffusers_that_fails_to_import_is_a_problem(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", types.ModuleType("diffusers"))
    found = doctor._diffusers()
    assert found.status == "problem"
    assert "UNet2DModel" in found.what


@pytest.mark.parametrize(
    ("cuda", "driver", "status", "words"),
    [
        ("12.6", False, "warning", "CUDA 12.6 build of torch, but it finds no GPU"),
        (None, True, "warning", "CPU build of torch on a machine with an NVIDIA driver"),
        (None, False, "ok", "CPU build of torch, no GPU"),
    ],
)
def test_build_of_torch_and_devices(monkeypatch, cuda, driver, status, words):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: name if driver else None)
    found = doctor._torch()
    assert (found.status, words in found.what) == (status, True)


def test_devices_that_work_are_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    device = types.SimpleNamespace(name="Some GPU", total_memory=80 * GIB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: device)
    assert "Some GPU 80 GiB, Some GPU 80 GiB" in doctor._torch().what
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert "mps" in doctor._torch().what


@pytest.mark.parametrize(
    ("threads", "load", "status", "words"),
    [
        (4, 0.5, "warning", "export OMP_NUM_THREADS=2"),
        (2, 5.0, "warning", "wait for the other programs"),
        (2, 0.5, "ok", None),
    ],
)
def test_threads_and_cores(monkeypatch, threads, load, status, words):
    monkeypatch.setattr(doctor, "usable_cores", lambda: 1.5)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0, 0), raising=False)
    found = doctor._threads()
    assert found.status == status
    assert found.remedy is None if words is None else words in found.remedy


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"cpu.max": "50000 100000"}, 0.5),
        ({"cpu/cpu.cfs_quota_us": "25000", "cpu/cpu.cfs_period_us": "100000"}, 0.25),
        ({"cpu.max": "max 100000"}, None),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ({}, None),
    ],
)
def test_quota_of_a_container_limits_the_cores(tmp_path, files, cores):
    (tmp_path / "cpu").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(f"{text}\n")
    unlimited = usable_cores(tmp_path / "absent")
    assert unlimited >= 1
    assert usable_cores(tmp_path) == (cores or unlimited)


@pytest.mark.parametrize(
    ("limit", "used"),
    [
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ],
)
def test_limit_of_a_container_limits_the_memory(tmp_path, monkeypatch, limit, used):
    system = types.SimpleNamespace(available=8 * GIB)
    monkeypatch.setattr("psutil.virtual_memory", lambda: system)
    (tmp_path / "memory").mkdir()
    assert usable_memory(tmp_path) == 8 * GIB
    (tmp_path / limit).write_text(f"{3 * GIB}\n")
    (tmp_path / used).write_text(f"{GIB}\n")
    assert usable_memory(tmp_path) == 2 * GIB
    (tmp_path / limit).write_text("max\n")
    assert usable_memory(tmp_path) == 8 * GIB


@pytest.mark.parametrize(("bytes_", "status"), [(GIB, "warning"), (8 * GIB, "ok")])
def test_little_memory_is_a_warning(monkeypatch, bytes_, status):
    monkeypatch.setattr(doctor, "usable_memory", lambda: bytes_)
    assert doctor._memory().status == status


@pytest.mark.parametrize(
    ("free", "writable", "status"),
    [
        (GIB // 8, True, "problem"),
        (GIB, True, "warning"),
        (99 * GIB, True, "ok"),
        (99 * GIB, False, "warning"),
    ],
)
def test_disk(monkeypatch, tmp_path, free, writable, status):
    usage = types.SimpleNamespace(free=free)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(doctor.os, "access", lambda *_: writable)
    assert doctor._disk(tmp_path).status == status


def test_offline_hub_is_said(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "already downloaded" in doctor._hub().what
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert "already downloaded" not in doctor._hub().what


def printed(findings):
    stream = io.StringIO()
    print_findings(findings, Console(file=stream, width=80))
    return stream.getvalue()


def test_remedies_follow_the_table():
    well = Finding("python", "ok", "3.11")
    ill = Finding("[text]", "problem", "broken [badly]", "pip install 'dkdm[text]'")
    text = printed([well, ill])
    assert "broken [badly]" in text
    assert text.rstrip().endswith("[text]: pip install 'dkdm[text]'")
    assert "No problems found" in printed([well])
