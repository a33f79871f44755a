"""A pool on disk: the same numbers as in memory, and no trace of it when the run is over."""

import json
import mmap
import os
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import dkdm
from dkdm.config import PoolOptions
from dkdm.core import mapped
from dkdm.core.sources.fill import empty_pool
from dkdm.core.sources.storage import on_disk
from dkdm.errors import UsageError
from factories import denoiser
from small_runs import SMALL

HALF = torch.float16


class Watched(mmap.mmap):
    """Files that are mapped: their sizes, and in which order they are used."""

    sizes = []
    order = []

    def __new__(cls, file, size):
        cls.sizes.append(size)
        return super().__new__(cls, file, size)

    def madvise(self, advice):
        self.order.append(advice)


@pytest.fixture
def watched(monkeypatch):
    known = {name: getattr(mmap, name) for name in ("MADV_RANDOM", "MADV_SEQUENTIAL")}
    monkeypatch.setattr(Watched, "sizes", [])
    monkeypatch.setattr(Watched, "order", [])
    monkeypatch.setattr(mapped, "mmap", SimpleNamespace(mmap=Watched, **known))
    return Watched


def distilled(folder, **changes):
    config = {"max_train_steps": 6, "checkpointing_steps": 3, "evaluation_samples": 0, **changes}
    return dkdm.distill(denoiser(), "dit-tiny", replace(SMALL, output_dir=folder, **config))


def hashes(folder):
    found = json.loads((folder / "checkpoint-6" / "manifest.json").read_text())
    del found["run.json"]  # which says where the pool lies
    return found


def test_a_run_with_its_pool_on_disk_equals_one_in_memory_and_resumes(tmp_path, watched):
    shared = {"pool_dtype": "float16", "stride": "random:6"}
    disk = {**shared, "pool_device": "disk"}
    expected = hashes(distilled(tmp_path / "memory", **shared))
    assert not watched.sizes
    folder = distilled(tmp_path / "disk", **disk)
    assert watched.sizes == [24 * 64 * HALF.itemsize]
    assert hashes(folder) == expected
    shutil.rmtree(folder / "checkpoint-6")
    (folder / "model_index.json").unlink()
    distilled(folder, **disk, resume_from_checkpoint="latest")
    assert hashes(folder) == expected
    assert len(watched.sizes) == 2
    names = [{path.name for path in run.iterdir()} for run in (folder, tmp_path / "memory")]
    assert names[0] == names[1]


def test_values_are_kept_in_the_file_and_the_file_has_no_name(tmp_path):
    states = on_disk((1000, 3), HALF, tmp_path / "not" / "there")
    states[500:].fill_(2)
    assert float(states.double().sum()) == 2 * 500 * 3
    assert states.shape == (1000, 3)
    assert states.dtype == HALF
    assert not os.listdir(tmp_path)


@pytest.mark.skipif(not hasattr(mmap, "MADV_RANDOM"), reason="the system does not ask")
def test_the_system_knows_in_which_order_a_pool_is_used(tmp_path, watched):
    pool = empty_pool(denoiser(), 24, torch.device("cpu"), HALF, folder=tmp_path)
    assert watched.order == [mmap.MADV_RANDOM]  # before it is filled
    shard = pool.parts()["shard-0"]
    uses = {
        "save": lambda: shard.state_dict(),
        "draw": lambda: pool.draw(8),
        "mend": lambda: pool.mend(),
        "load": lambda: shard.load_state_dict(dict(shard.views)),
    }
    last = {}
    for name, use in uses.items():
        use()
        last[name] = watched.order[-1]
    in_order = {name for name, advice in last.items() if advice == mmap.MADV_SEQUENTIAL}
    assert in_order == {"save", "mend"}
    memory = empty_pool(denoiser(), 24, torch.device("cpu"), HALF)
    count = len(watched.order)
    memory.draw(8)
    assert len(watched.order) == count


def test_a_full_disk_is_refused_before_work(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**30))
    message = r"pool of 200000 entries .* 1\.1 GiB, and 1\.0 GiB are free on the disk of .*--rho"
    with pytest.raises(UsageError, match=message):
        on_disk((200_000, 3072), HALF, tmp_path)


def test_space_that_cannot_be_had_is_said_with_the_reason(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UsageError, match="No space left on device.*--pool-dir on another disk"):
        on_disk((10, 3), HALF, tmp_path)
    assert not os.listdir(tmp_path)


def test_a_folder_for_a_pool_in_memory_is_refused(tmp_path):
    with pytest.raises(UsageError, match="--pool-dir .* give --pool-device disk"):
        PoolOptions(pool_dir=tmp_path)


def test_a_place_that_is_no_folder_is_refused(tmp_path):
    (tmp_path / "file").touch()
    changes = {"pool_device": "disk", "pool_dir": tmp_path / "file"}
    with pytest.raises(UsageError, match="--pool-dir"):
        distilled(tmp_path / "run", **changes)
    assert os.listdir(tmp_path) == ["file"]
