"""Shards: what any number of processes keep of a source, and who can go on from it."""

import pytest
import torch

from dkdm.core.denoisers.conditioning import ClassLabels
from dkdm.core.denoisers.denoiser import Denoiser
from dkdm.core.diffusion.prediction import Parameterization
from dkdm.core.diffusion.process import per_sample
from dkdm.core.diffusion.schedules import beta_schedule, from_betas
from dkdm.core.saving.checkpoint import read_tensors, write_parts
from dkdm.core.shards import Shards
from dkdm.core.sources.chains import Guidance, Stride
from dkdm.core.sources.fill import empty_pool, fill_ancestral, fill_few_step
from dkdm.errors import UsageError

COSINE = from_betas(beta_schedule("squaredcos_cap_v2", 50))


def network(x, time, class_labels):
    """Elementwise, so that a sample does not depend on the batch that it is in."""
    del time
    return 0.5 * torch.tanh(x) + per_sample(class_labels / 10, x)


def pool_of(rank=0, world=1, fill=fill_few_step, batch=20, steps=9):
    """A pool of 67 entries that was filled and moved, as far as one process keeps it."""
    teacher = Denoiser(network, COSINE, Parameterization("sample"), (2, 3), ClassLabels(3, 3))
    pool = empty_pool(
        teacher,
        67,
        torch.device("cpu"),
        torch.float32,
        Shards(8, rank, world),
        stride=Stride(1, 39),
        guidance=Guidance(2.0, 8.0),
        condition_dropout=0.2,
        random_conditioning=0.5,
        seed=3,
    )
    fill(pool, 2, 16) if fill is fill_few_step else fill(pool, 16)
    for _ in range(steps):
        drawn = pool.draw(batch)
        pool.advance(drawn, pool.target(drawn))
    return pool


@pytest.mark.parametrize("fill", [fill_few_step, fill_ancestral])
def test_two_processes_write_the_files_of_one(fill, tmp_path):
    for name, rank, world in (("one", 0, 1), ("two", 0, 2), ("two", 1, 2)):
        write_parts(tmp_path / name, pool_of(rank, world, fill).parts(), {})
    files = sorted(path.name for path in (tmp_path / "one").glob("*.safetensors"))
    assert files == sorted(f"shard-{number}.safetensors" for number in range(8))
    for file in files:
        one, two = (read_tensors(tmp_path / name / file) for name in ("one", "two"))
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one), file
        assert int(one["evaluations"]) > 0


def test_another_number_of_processes_goes_on():
    whole, saved = pool_of(steps=12), pool_of(steps=9).parts()
    for rank in (0, 1, 2):
        part = pool_of(rank, 3, steps=0)
        for name, shard in part.parts().items():
            shard.load_state_dict(saved[name].state_dict())
        for _ in range(3):
            drawn = part.draw(20)
            part.advance(drawn, part.target(drawn))
        for name, shard in part.parts().items():
            expected = whole.parts()[name].state_dict()
            assert all(torch.equal(v, expected[k]) for k, v in shard.state_dict().items()), name


def test_every_shard_and_entry_has_one_process():
    for world in (1, 2, 3, 8):
        parts = [Shards(8, rank, world) for rank in range(world)]
        assert sorted(number for part in parts for number in part.own) == list(range(8))
        for count in (8, 67, 128):
            sizes = {k: v for part in parts for k, v in part.sizes(count).items()}
            assert sum(sizes.values()) == count
            assert max(sizes.values()) - min(sizes.values()) <= 1
        taken = [part.shares(3, step) for part in parts for step in range(8)]
        assert sum(sum(share.values()) for share in taken) == 3 * 8


def test_another_number_of_shards_is_refused():
    few = pool_of(steps=0).parts()["shard-0"]
    state = {**few.state_dict(), "shards": torch.tensor(4)}
    with pytest.raises(UsageError, match="--pool-size 67 --shards 4 keep its size"):
        few.load_state_dict(state)
