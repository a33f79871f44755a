"""The pool: which entries are drawn, what a move writes, how chains end, begin and are restored.

Its statistics (uniform t, states on the right law) are in test_pool_statistics.py.
"""

import copy
import tracemalloc
from collections import Counter
from math import ceil

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dkdm.config import DistillConfig, PoolOptions
from dkdm.core.denoisers.conditioning import ClassLabels, Unconditional
from dkdm.core.denoisers.denoiser import Denoiser
from dkdm.core.diffusion.prediction import Parameterization
from dkdm.core.diffusion.process import per_sample
from dkdm.core.diffusion.schedules import beta_schedule, from_betas, karras
from dkdm.core.randomness import generator
from dkdm.core.saving.checkpoint import read_tensors, write_parts
from dkdm.core.shards import Shards
from dkdm.core.sources.budget import fill_cost, pool_entries
from dkdm.core.sources.chains import Guidance, Stride
from dkdm.core.sources.fill import empty_pool, fill_ancestral, fill_few_step, uniform_levels
from dkdm.core.sources.pool import Pool
from dkdm.core.sources.storage import check_memory
from dkdm.errors import UsageError
from dkdm.runs.arms import ARMS

LEVELS, TOP = 100, 99
COSINE = from_betas(beta_schedule("squaredcos_cap_v2", LEVELS))
KARRAS = karras(LEVELS, 0.01, 20.0)
CLASSES = ClassLabels(1000, null_class=1000)
SHAPE = (2, 3)
CPU = torch.device("cpu")
BATCH_SIZES = [1, 3, 7, 8, 11, 16, 50, 67]


class Squashing:
    """A network whose x_0 depends on the state and on its class; keeps what it was shown last."""

    def __init__(self, slope=0.5):
        self.slope, self.seen = slope, None

    def __call__(self, x, time, class_labels):
        self.seen = (x, time, class_labels)
        return self.slope * torch.tanh(x) + per_sample(class_labels / 1000, x)


def make(size=67, stride="1", dtype=torch.float32, process=COSINE, slope=0.5, **fields):
    """A pool of noise at levels spread evenly."""
    teacher = Denoiser(Squashing(slope), process, Parameterization("sample"), SHAPE, CLASSES)
    law = Stride.of_options(PoolOptions(stride=stride), process.num_levels)
    pool = empty_pool(teacher, size, CPU, dtype, stride=law, **fields)
    pool.t.copy_(uniform_levels(size, process.num_levels, generator("cpu", "levels")))
    return pool


def move(pool, batch_size):
    """One step of the method without a student: (batch, target)."""
    batch = pool.draw(batch_size)
    target = pool.target(batch)
    pool.advance(batch, target)
    return batch, target


def state_of(pool):
    """Everything a checkpoint keeps, by part and name."""
    parts = pool.parts().items()
    return {f"{name}/{k}": v for name, part in parts for k, v in part.state_dict().items()}


def restore(pool, state):
    for name, part in pool.parts().items():
        prefix = f"{name}/"
        mine = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        part.load_state_dict(mine)


def copied(pool):
    return {key: value.clone() for key, value in state_of(pool).items()}


def assert_same(state, expected):
    assert state.keys() == expected.keys()
    for key in state:
        assert torch.equal(state[key], expected[key]), key


def shard_of(pool, rows):
    ends = torch.tensor([part.stop for part in pool.entries.slices.values()])
    return torch.bucketize(rows, ends, right=True)


# --- which entries are drawn ---------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", BATCH_SIZES)
def test_a_batch_is_distinct_entries_of_all_shards(batch_size):
    pool = make()
    for _ in range(16):
        batch, _ = move(pool, batch_size)
        assert len(batch.rows.unique()) == len(batch.rows) == batch_size
        given = shard_of(pool, batch.rows).bincount(minlength=pool.shards.total)
        assert given.max() - given.min() <= 1


@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_a_batch_smaller_than_the_shards_takes_them_in_turns(batch_size):
    pool = make()
    taken = torch.cat([shard_of(pool, move(pool, batch_size)[0].rows) for _ in range(8)])
    assert torch.equal(taken, torch.arange(8 * batch_size) % 8)


def test_a_batch_is_a_copy_of_the_entries():
    pool = make(dtype=torch.float16)
    before = copied(pool)
    batch = pool.draw(20)
    assert batch.x.dtype == torch.float32
    assert torch.equal(batch.x, pool.x[batch.rows].float())
    assert torch.equal(batch.t, pool.t[batch.rows])
    assert torch.equal(batch.cond["class_labels"], pool.cond["class_labels"][batch.rows])
    for part in (batch.x, batch.t, batch.cond["class_labels"]):
        part.zero_()
    assert_same(state_of(pool), before)


def test_every_entry_is_drawn_equally_often():
    pool = make(size=64)
    steps, batch_size = 800, 16
    drawn = Counter()
    for pool.step in range(steps):
        drawn.update(pool.draw(batch_size).rows.tolist())
    counts = torch.tensor([drawn[row] for row in range(64)]).double()
    # Of 8 entries a shard gives 2: each is drawn with probability 1/4, independently in each step.
    expected, variance = steps / 4, steps * 3 / 16
    statistic = ((counts - expected) ** 2 / variance).sum() * 7 / 8
    assert 1e-4 < torch.special.gammaincc(torch.tensor(28.0), statistic.float() / 2) < 1 - 1e-4


def test_the_draw_follows_from_seed_shard_and_step_alone():
    walked, jumped = make(), make(stride="random:20", slope=0.1)
    for _ in range(9):
        move(walked, 16)
    jumped.step = 9
    jumped.x.zero_()
    rows = walked.draw(16).rows
    assert torch.equal(jumped.draw(16).rows, rows)
    assert not torch.equal(make(seed=1).draw(16).rows, make().draw(16).rows)
    jumped.step = 10
    assert not torch.equal(jumped.draw(16).rows, rows)


def test_a_shard_does_not_depend_on_what_the_others_give():
    few, many = (make(stride="random:5", seed=3) for _ in range(2))
    many.x[many.entries.slices[0]] = 7.0
    with_two, with_three = move(few, 16)[0].rows, move(many, 17)[0].rows
    assert torch.equal(with_two[2:], with_three[3:])
    others = {key: value for key, value in state_of(many).items() if key[:8] != "shard-0/"}
    assert_same({key: state_of(few)[key] for key in others}, others)


def test_shards_have_random_numbers_of_their_own():
    pool = make(size=64, stride="random:20")
    pool.t.zero_()
    states = {tuple(part.flatten().tolist()) for part in pool.x.split(8)}
    batch, _ = move(pool, 32)
    offsets = {tuple(part.tolist()) for part in (batch.rows - batch.rows // 8 * 8).split(4)}
    levels = {tuple(pool.t[part].tolist()) for part in batch.rows.split(4)}
    labels = {tuple(pool.cond["class_labels"][part].tolist()) for part in batch.rows.split(4)}
    restarted = {tuple(pool.x[part].flatten().tolist()) for part in batch.rows.split(4)}
    assert len(states) == len(levels) == len(labels) == len(restarted) == 8
    assert len(offsets) >= 6


class LargestResult(TorchDispatchMode):
    """Notes the largest tensor that an operation makes; views of the pool's own are none."""

    def __init__(self, pool):
        super().__init__()
        self.owned = {each.data_ptr() for each in (pool.x, pool.t, pool.born)}
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        del types
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, torch.Tensor) and value.data_ptr() not in self.owned:
                self.numel = max(self.numel, value.numel())
        return result


def test_a_step_touches_the_batch_not_the_pool(monkeypatch):
    size = 5_000_000
    teacher = Denoiser(lambda x, _: x, COSINE, Parameterization("sample"), (1,))
    t = torch.full((size,), 3)
    pool = Pool(teacher, torch.zeros(size, 1, dtype=torch.float16), t, {})
    monkeypatch.setattr(torch, "randperm", None)
    tracemalloc.start()
    with LargestResult(pool) as largest:
        for _ in range(5):
            batch, _ = move(pool, 64)
            assert len(batch.rows.unique()) == 64
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 64 <= largest.numel <= 2 * LEVELS
    assert peak < 1e6


@pytest.mark.parametrize("size", [5, 16, 67])
def test_a_batch_may_be_the_whole_pool_and_no_more(size):
    pool = make(size=size)
    for _ in range(9):
        assert move(pool, size)[0].rows.sort().values.tolist() == list(range(size))
    with pytest.raises(UsageError, match=f"batch of {size + 1} .* pool of {size} .*--pool-size"):
        pool.draw(size + 1)


# --- what a move writes --------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", BATCH_SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_move_changes_the_drawn_entries_and_no_others(batch_size, dtype):
    pool = make(stride="random:20", dtype=dtype)
    for _ in range(8):
        before = copy.deepcopy(pool)
        batch, _ = move(pool, batch_size)
        others = torch.ones(len(pool.t), dtype=torch.bool)
        others[batch.rows] = False
        assert torch.equal(pool.x[others], before.x[others])
        assert torch.equal(pool.t[others], before.t[others])
        label = pool.cond["class_labels"]
        assert torch.equal(label[others], before.cond["class_labels"][others])
        assert (pool.x[batch.rows] != before.x[batch.rows]).flatten(1).any(1).all()
        assert (pool.t[batch.rows] != batch.t).all()


@pytest.mark.parametrize("stride", ["1", "7", "random:2", "random:20"])
def test_levels_walk_on_a_cycle(stride):
    pool = make(size=400, stride=stride)
    strides = Counter()
    for _ in range(20):
        batch, _ = move(pool, 200)
        k = (batch.t - pool.t[batch.rows]) % LEVELS
        strides.update(k.tolist())
        assert torch.equal(batch.s, (batch.t - k).clamp(min=-1))
    law = pool.stride
    assert set(strides) == set(range(law.low, law.high + 1))
    mean = sum(k * n for k, n in strides.items()) / 4000
    assert mean == pytest.approx((law.low + law.high) / 2, rel=0.05)


def test_a_move_is_the_reverse_step():
    pool = make(stride="random:20", eta=0.0)
    batch, target = move(pool, 67)
    s = pool.t[batch.rows]
    going = s < batch.t
    alpha, sigma = COSINE.at(s)
    expected = per_sample(alpha, batch.x) * target.x_0 + per_sample(sigma, batch.x) * target.eps
    assert 0 < int(going.sum()) < 67
    torch.testing.assert_close(pool.x[batch.rows][going], expected[going])
    kept = pool.cond["class_labels"][batch.rows][going]
    assert torch.equal(kept, batch.cond["class_labels"][going])


def test_the_network_is_shown_the_entry_as_it_is():
    pool = make()
    batch = pool.draw(16)
    pool.target(batch)
    x, time, labels = pool.teacher.network.seen
    assert torch.equal(x, batch.x)
    assert torch.equal(time, COSINE.network_time[batch.t].float())
    assert torch.equal(labels, batch.cond["class_labels"])


# --- how chains end and begin --------------------------------------------------------------------


@pytest.mark.parametrize("stride", ["1", "random:20"])
def test_a_finished_chain_is_a_clean_sample(stride):
    pool = make(stride=stride)
    total = 0
    for _ in range(30):
        batch, target = move(pool, 40)
        done = pool.t[batch.rows] > batch.t
        assert torch.equal(batch.s < 0, done)
        clean = pool.move(batch, target, torch.randn_like(batch.x))[done]
        assert torch.equal(clean, target.x_0[done])
        total += int(done.sum())
    assert total > 0
    assert pool.step == 30


def test_every_chain_finishes_once_a_cycle():
    pool = make()
    evaluated = torch.zeros(67, LEVELS, dtype=torch.int64)
    for _ in range(LEVELS):
        batch, _ = move(pool, 67)
        evaluated[batch.rows, batch.t] += 1
    assert (evaluated == 1).all()
    assert pool.evaluations == 67 * LEVELS


@pytest.mark.parametrize("process", [COSINE, KARRAS], ids=["cosine", "karras"])
def test_at_stride_one_a_chain_restarts_as_pure_noise(process):
    one, other = make(800, process=process), make(800, process=process, slope=9.0)
    other.x.fill_(3.0)
    for pool in (one, other):
        pool.t.zero_()
        before = pool.cond["class_labels"].clone()
        move(pool, 800)
        assert (pool.t == TOP).all()
        assert pool.evaluations == 800
        assert (pool.cond["class_labels"] == before).double().mean() < 0.02
    # Neither the old state nor the teacher has a part in it.
    assert torch.equal(one.x, other.x)
    first = one.x.clone() / process.start_std
    assert first.mean().abs() < 4 / first.numel() ** 0.5
    assert (first.var() - 1).abs() < 4 * (2 / first.numel()) ** 0.5
    one.t.zero_()
    move(one, 800)
    second = one.x / process.start_std
    assert (first * second).mean().abs() < 4 / first.numel() ** 0.5
    assert len(torch.cat([first, second]).flatten(1).unique(dim=0)) == 1600


def test_at_longer_strides_a_chain_restarts_by_one_counted_evaluation():
    pool = make(400, stride="30", eta=0.0)
    batch, _ = move(pool, 400)
    t = pool.t[batch.rows]
    moved = (t > batch.t) & (t < TOP)
    assert int(moved.sum()) == int((batch.t < 29).sum()) > 0
    assert pool.evaluations == 400 + int(moved.sum())
    assert int((batch.s < 0).sum()) == int((batch.t < 30).sum())
    noise, time, labels = pool.teacher.network.seen
    assert (time == TOP).all()
    assert torch.equal(labels, pool.cond["class_labels"][batch.rows][moved])
    assert noise.std() == pytest.approx(1, abs=0.1)
    alpha, sigma = (per_sample(v, noise) for v in COSINE.at(torch.full((len(noise),), TOP)))
    x_0 = Squashing()(noise, time, labels)
    expected = COSINE.add_noise(x_0, (noise - alpha * x_0) / sigma, t[moved])
    torch.testing.assert_close(pool.x[batch.rows][moved], expected)


def test_the_noise_of_a_restart_is_not_the_noise_of_its_move():
    teacher = Denoiser(lambda x, _: 0 * x, KARRAS, Parameterization("sample"), (6,))
    pool = empty_pool(teacher, 2000, CPU, torch.float32, stride=Stride(30, 30))
    pool.t.zero_()
    move(pool, 2000)
    assert (pool.t == 70).all()
    # Of x_0 = 0 the state is N(0, sigma^2), unless the two noises it is made of are one.
    scaled = pool.x / KARRAS.sigma[70]
    assert (scaled.var() - 1).abs() < 4 * (2 / scaled.numel()) ** 0.5


def test_guidance_costs_twice_everywhere():
    single, double = (make(stride="30", guidance=Guidance(scale, scale)) for scale in (1.0, 2.0))
    for pool in (single, double):
        fill_few_step(pool, 3, 67)
        move(pool, 40)
        fill_ancestral(pool, 67)
    assert single.evaluations > 67 * 3 + 40
    assert double.evaluations == 2 * single.evaluations


def test_conditions_are_dropped_from_the_start_and_at_restarts():
    pool = make(2000, condition_dropout=0.2)
    for _ in range(2):
        dropped = (pool.cond["class_labels"] == CLASSES.null_class).double().mean()
        assert dropped == pytest.approx(0.2, abs=0.04)
        pool.t.zero_()
        move(pool, 2000)


# --- how it is filled ----------------------------------------------------------------------------


def test_an_empty_pool_is_noise_at_the_top():
    teacher = Denoiser(Squashing(), KARRAS, Parameterization("sample"), SHAPE, CLASSES)
    pool = empty_pool(teacher, 2000, CPU, torch.float16)
    assert (pool.t == TOP).all()
    assert pool.x.dtype == torch.float16
    assert pool.x.float().std() == pytest.approx(20, rel=0.03)
    assert pool.evaluations == 0


def test_levels_are_spread_evenly_and_in_random_order():
    even = uniform_levels(10 * LEVELS, LEVELS, generator("cpu", 0))
    assert (even.bincount(minlength=LEVELS) - 10).abs().max() <= 1
    assert not torch.equal(even, even.sort().values)
    sparse = uniform_levels(10, 1000, generator("cpu", 0)).sort().values
    assert torch.equal(sparse // 100, torch.arange(10))


def test_fills_cost_what_they_say():
    pool = make(size=200)
    fill_few_step(pool, 7, 16)
    assert pool.evaluations == 200 * 7
    few_step = pool.t.clone()
    pool = make(size=200)
    fill_ancestral(pool, 32)
    assert pool.evaluations == int((TOP - pool.t).sum())
    assert torch.equal(pool.t, few_step)


def test_a_fill_leaves_conditions_alone():
    for prepare in (lambda pool: fill_few_step(pool, 3, 16), lambda pool: fill_ancestral(pool, 67)):
        pool = make()
        before = copy.deepcopy(pool)
        prepare(pool)
        assert torch.equal(pool.cond["class_labels"], before.cond["class_labels"])
        assert (pool.x != before.x).flatten(1).any(1)[pool.t < TOP].all()
        assert pool.step == 0


@pytest.mark.parametrize("entries", [1, 4])
def test_every_entry_of_a_fill_has_noise_of_its_own(entries):
    teacher = Denoiser(lambda x, _: 0 * x, COSINE, Parameterization("sample"), (3,))
    pool = empty_pool(teacher, 64, CPU, torch.float32)
    fill_few_step(pool, 2, 4, entries=entries)
    eps = pool.x / per_sample(COSINE.sigma[pool.t], pool.x)
    assert torch.pdist(eps).min() > 1e-3


@pytest.mark.parametrize(("size", "entries"), [(200, 4), (67, 8), (20, 3), (7, 100)])
def test_a_fill_makes_several_entries_of_a_sample_at_levels_far_apart(size, entries):
    pool, shards = make(size=size, shards=Shards(3)), Shards(3).sizes(size).values()
    fill_few_step(pool, 3, 16, entries=entries)
    samples = sum(ceil(count / entries) for count in shards)
    assert pool.evaluations == 3 * samples
    planned = PoolOptions(fill_steps=3, fill_entries=entries, shards=3)
    assert fill_cost(planned, size, LEVELS) == pool.evaluations
    for here in pool.entries.slices.values():
        apart = ceil((here.stop - here.start) / entries)
        t, classes = pool.t[here], pool.cond["class_labels"][here]
        for first in range(apart):
            own = t[first::apart]
            steps = (own - own[0]) % LEVELS
            assert torch.equal(steps, torch.arange(len(own)) * LEVELS // entries)
            assert (classes[first::apart] == classes[first]).all()


# --- state ---------------------------------------------------------------------------------------


def through_a_folder(pool, folder):
    """What a checkpoint's files give back."""
    write_parts(folder, pool.parts(), {})
    paths = sorted(folder.rglob("*.safetensors"))
    return {f"{path.stem}/{k}": v for path in paths for k, v in read_tensors(path).items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("through_a_file", [False, True])
def test_a_restored_pool_goes_on_bitwise(dtype, through_a_file, tmp_path):
    options = {"stride": "random:20", "dtype": dtype, "seed": 5}
    pool = make(**options)
    for _ in range(5):
        move(pool, 20)
    state = copied(pool)
    if through_a_file:
        state = through_a_folder(pool, tmp_path)
    restored = make(**options)
    move(restored, 11)
    restore(restored, state)
    assert_same(state_of(restored), state_of(pool))
    for _ in range(12):
        expected, found = move(pool, 20), move(restored, 20)
        assert torch.equal(found[0].rows, expected[0].rows)
        assert torch.equal(found[0].x, expected[0].x)
        assert_same(state_of(restored), state_of(pool))


def test_an_unconditional_pool_is_restored(tmp_path):
    teacher = Denoiser(lambda x, _: 0.5 * x, COSINE, Parameterization("sample"), SHAPE)
    pool, restored = (empty_pool(teacher, 9, CPU, torch.float32, seed=s) for s in (0, 1))
    move(pool, 4)
    restore(restored, through_a_folder(pool, tmp_path))
    assert_same(state_of(restored), state_of(pool))


def test_a_state_that_is_another_pools_is_refused():
    pool = make()
    unconditional = make()
    unconditional.cond, unconditional.teacher.conditioning = {}, Unconditional()
    before = copied(pool)
    for other in (make(size=68), make(dtype=torch.float16), unconditional):
        with pytest.raises(UsageError, match="resume with the options the run was started with"):
            restore(pool, state_of(other))
        with pytest.raises(UsageError, match="the checkpoint's pool is"):
            restore(other, before)
    assert_same(state_of(pool), before)


# --- options -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "low", "high"),
    [("1", 1, 1), ("20", 20, 20), ("99", 99, 99), ("random:1", 1, 1), ("random:50", 1, 99)],
)
def test_strides_are_read(text, low, high):
    assert Stride.of_options(PoolOptions(stride=text), LEVELS) == Stride(low, high)


@pytest.mark.parametrize(
    "text",
    ["", "0", "-1", "1.5", "one", "1 0", " 1", "1e1", "²", ":20", "20:", "fixed:20"]
    + ["random", "random:", "random:0", "random:-3", "random:x", "random:1:2", "Random:2"],
)
def test_garbage_is_no_stride(text):
    with pytest.raises(UsageError, match="--stride .*: give a number of levels or random:MEAN"):
        Stride.of_options(PoolOptions(stride=text), LEVELS)


@pytest.mark.parametrize(
    ("text", "reach"), [("100", 100), ("1000", 1000), ("random:51", 101), ("random:100", 199)]
)
def test_a_stride_past_all_levels_is_refused(text, reach):
    with pytest.raises(UsageError, match=f"--stride {text} moves a state by up to {reach} levels"):
        Stride.of_options(PoolOptions(stride=text), LEVELS)


def test_a_pool_too_large_for_memory_is_refused_with_its_size_and_a_remedy(monkeypatch):
    # The same function as doctor's, which sees a container's limit.
    monkeypatch.setattr("dkdm.core.sources.storage.usable_memory", lambda: 2 * 2**30)
    teacher = Denoiser(lambda x, t: x, COSINE, Parameterization("sample"), (3, 256, 256))
    message = r"pool of 4000 entries of shape \(3, 256, 256\) .* 2\.9 GiB, and 2\.0 GiB are free"
    with pytest.raises(UsageError, match=message) as refused:
        empty_pool(teacher, 4000, CPU, torch.float32)
    for remedy in ("--rho", "--pool-size", "--pool-dtype float16", "--pool-device"):
        assert remedy in str(refused.value)
    check_memory((4000, 3, 256, 256), torch.float16, CPU)


# --- the ladder: one class, other numbers --------------------------------------------------------


def prepared(**options):
    config = DistillConfig(train_batch_size=40, fill_steps=2, rho=0.2, **options)
    teacher = Denoiser(Squashing(), COSINE, Parameterization("sample"), SHAPE, CLASSES)
    arm = ARMS[config.pool.source]
    pool = arm.make(teacher, teacher, config, CPU)
    arm.prepare(pool, teacher, config)
    return pool


def test_iterative_is_a_batch_at_one_level():
    pool = prepared(source="iterative")
    assert len(pool.t) == 40
    assert pool.evaluations == 0
    for level in [*reversed(range(LEVELS)), TOP, TOP - 1]:
        batch, _ = move(pool, 40)
        assert (batch.t == level).all()
        assert batch.rows.sort().values.tolist() == list(range(40))


@pytest.mark.parametrize("kind", ["few-step", "ancestral"])
def test_shuffled_is_a_batch_at_all_levels(kind):
    pool = prepared(source="shuffled", fill=kind)
    assert len(pool.t) == 40
    for _ in range(5):
        batch, _ = move(pool, 40)
        assert batch.rows.sort().values.tolist() == list(range(40))
        assert (batch.t * 5 // LEVELS).bincount(minlength=5).min() >= 4


def test_the_laws_of_a_step_are_drawn_once(monkeypatch):
    pool, drawn = prepared(source="shuffled", stride="random:20", shards=4), []
    monkeypatch.setattr(pool, "new_conditions", lambda *a: drawn.append(a) or CLASSES.draw(*a))
    for _ in range(3):
        batch, _ = move(pool, 40)
        k = (batch.t - pool.t[batch.rows]) % LEVELS
        assert ((batch.t - batch.s == k) | (batch.s == -1)).all()
    assert len(drawn) == 3 * 4


def test_dynamic_is_many_batches_at_all_levels():
    pool = prepared(source="dynamic")
    assert len(pool.t) == 0.2 * LEVELS * 40
    drawn = torch.cat([move(pool, 40)[0].rows for _ in range(5)])
    assert 150 < len(drawn.unique()) < 200
    assert prepared(source="dynamic", fill="none").t.tolist() == [TOP] * 800


def test_a_pool_holds_no_more_than_is_drawn():
    options = {"train_batch_size": 10, "rho": 0.4, "max_train_steps": 3}

    def entries(**options):
        config = DistillConfig(**options)
        return pool_entries(config.pool, config.training, LEVELS)

    assert entries(**options) == 30
    assert entries(**options, gradient_accumulation_steps=2) == 60
    assert entries(**options, pool_size=500) == 500
    assert entries(**{**options, "max_train_steps": 1000}) == 400
    # left open: what is published, or what a fifth of the run fills
    long = {"train_batch_size": 10, "max_train_steps": 1000}
    assert entries(**long) == 0.4 * LEVELS * 10
    assert entries(**long, fill_entries=1) == 100
    assert entries(**long, fill="ancestral") == 0.2 * 10 * 1000 / (LEVELS / 2)
    assert entries(**long, fill="none") == 0.4 * LEVELS * 10
    assert entries(train_batch_size=10, max_train_steps=3) == 10
    with pytest.raises(UsageError, match="--pool-size 9 is smaller than a batch of 10"):
        entries(**options, pool_size=9)
