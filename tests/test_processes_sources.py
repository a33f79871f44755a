"""Sources that keep something in one order over all shards draw in two processes as in one."""

import pytest
import torch

from dkdm import DistillConfig
from dkdm.core.saving.checkpoint import read_tensors
from dkdm.core.shards import Shards
from dkdm.core.sources.finished import SampleShards
from dkdm.errors import UsageError
from dkdm.runs.shared import check_shared
from ranks import launch

DRAWN = """
import os
from dataclasses import replace
from pathlib import Path

import torch
from torch import distributed

from dkdm.core.sources import finished
from dkdm.core.sources import finished_by_all
from dkdm.core import processes
from dkdm.core.saving.checkpoint import write_parts, write_tensors
from dkdm.runs.programs import OBJECTIVES
from dkdm.students import student_of
from factories import denoiser
from small_runs import SMALL

finished.SHARD, finished_by_all.EVERY = 3, 3
world = int(os.environ["WORLD_SIZE"])
distributed.init_process_group("gloo", rank=rank, world_size=world)
teacher, cpu = denoiser(), torch.device("cpu")
common = {"pool_size": 19, "stride": "25", "seed": 3, "guidance_scale": "1:3"}
kinds = {
    "rolled": ("few-step", {"few_step_heads": 4, "student_steps": "1,2,4", "few_step_pool": 16,
                            "few_step_targets": 2, "few_step_on_policy": 0.5}),
    "pairs": ("consistency", {"student_steps": "1,2,4", "start_share": 0.3, "eta": 0.0}),
    "replayed": ("dkdm", {"replay": 2, "condition_dropout": 0.2}),
    "kept": ("dkdm", {"keep_finished": 512}),
    "turns": ("dkdm", {"keep_finished": 512, "train_batch_size": 4, "stride": "random:24"}),
}
for kind, (objective, options) in kinds.items():
    folder = Path(f"{kind}-{world}")
    config = replace(SMALL, **{"output_dir": folder, **common, **options, "objective": objective})
    program, size = OBJECTIVES[objective], config.training.train_batch_size
    torch.manual_seed(1)
    student = program.student(student_of("dit-tiny", teacher), teacher, config)
    student.network.eval()
    source = program.source(teacher, student, config, cpu)
    for step in range(8):
        places = source.places(size)
        batch = source.draw(size)
        target = source.target(batch)
        drawn = {"places": places, "x": batch.x, "t": batch.t, "output": target.raw}
        write_tensors(folder / f"drawn-{step}-{rank}.safetensors", {**drawn, **batch.cond})
        assert len(batch.t) == len(places)
        source.advance(batch, target)
    parts = source.parts()
    write_parts(folder / "parts", parts, {}, processes.owners(parts))
processes.leave()
raise SystemExit(0)
"""
KINDS = ("rolled", "pairs", "replayed", "kept", "turns")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    root = tmp_path_factory.mktemp("drawn")
    found = launch(root, *((world, DRAWN, []) for world in (1, 2)))
    assert [code for code, _ in found] == [0, 0], found
    return root


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5, msg=key)


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_draw_what_one_does(drawn, kind):
    for step in range(8):
        name = f"drawn-{step}-{{}}.safetensors"
        whole = read_tensors(drawn / f"{kind}-1" / name.format(0))
        parts = [read_tensors(drawn / f"{kind}-2" / name.format(rank)) for rank in (0, 1)]
        joined = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
        order = joined["places"].argsort()
        assert_close({key: value[order] for key, value in joined.items()}, whole)


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_save_what_one_does(drawn, kind):
    one, two = drawn / f"{kind}-1" / "parts", drawn / f"{kind}-2" / "parts"
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in two.iterdir())
    for name in names:
        if name.endswith(".safetensors"):
            assert_close(read_tensors(two / name), read_tensors(one / name))


@pytest.mark.parametrize("kind", ["kept", "turns"])
def test_finished_samples_lie_in_the_order_of_one_process(drawn, kind):
    one, two = (SampleShards(drawn / f"{kind}-{world}" / "finished") for world in (1, 2))
    assert one.numbers() == two.numbers() != []
    for number in one.numbers():
        (x, cond), (found, labels) = one.read(number), two.read(number)
        torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-5)
        assert all(torch.equal(labels[key], cond[key]) for key in cond)


@pytest.mark.parametrize(("total", "batch_size"), [(8, 19), (8, 8), (8, 3), (6, 2)])
def test_the_places_of_all_processes_are_those_of_a_batch(total, batch_size):
    for world in (1, 2, 3) if batch_size >= total else (1, 2):
        for step in range(5):
            each = [Shards(total, rank, world).places(batch_size, step) for rank in range(world)]
            assert sorted(torch.cat(each).tolist()) == list(range(batch_size))
            counts = [
                sum(Shards(total, r, world).shares(batch_size, step).values()) for r in range(world)
            ]
            assert [len(own) for own in each] == counts


def test_models_given_as_objects_are_sharded_once():
    config = DistillConfig(objective="few-step", fsdp="student")
    with pytest.raises(UsageError, match="give their folders"):
        check_shared(config, has_objects=True)
    check_shared(config)
