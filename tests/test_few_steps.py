"""Parallel heads against closed forms: flow coordinates, rolling, folding, the perfect student."""

import json
import math

import pytest
import torch
from torch import nn

import toy_networks
from dkdm.config import parse_steps
from dkdm.core.denoisers.denoiser import Batch, Denoiser
from dkdm.core.denoisers.toy import GaussianMixture, mixture_denoiser
from dkdm.core.diffusion.prediction import Parameterization, Prediction, from_x_0_eps
from dkdm.core.diffusion.process import per_sample
from dkdm.core.diffusion.schedules import beta_schedule, from_betas, karras, rectified_flow
from dkdm.core.diffusion.steps import reverse_step
from dkdm.core.few_steps.grid import Grid, grid_levels, grid_of
from dkdm.core.few_steps.heads import ParallelHeads
from dkdm.core.few_steps.objective import HeadsObjective
from dkdm.core.few_steps.rolled import empty_rolled, rolled
from dkdm.core.objectives.objective import Objective
from dkdm.core.shards import Shards
from dkdm.core.sources.chains import Stride
from dkdm.core.sources.fill import empty_pool, fill_few_step
from dkdm.errors import UsageError
from dkdm.evaluation.energy import energy_distance
from dkdm.students.heads import with_heads

T, HEADS, STEPS = 100, 16, (1, 2, 4, 8)
CPU = torch.device("cpu")
MIXTURE = GaussianMixture.of([[-1.2, -0.4], [0.8, 1.0]], std=[0.3, 0.5], weights=[0.4, 0.6])
PROCESSES = {
    "ddpm": from_betas(beta_schedule("squaredcos_cap_v2", T)),
    "flow": rectified_flow(T),
    "edm": karras(T),
}
KINDS = [
    ("ddpm", "epsilon"),
    ("ddpm", "v_prediction"),
    ("flow", "flow_prediction"),
    ("flow", "sample"),
    ("edm", "edm"),
]


def process_and_grid(name):
    process = PROCESSES[name]
    teacher = mixture_denoiser(MIXTURE, process, Parameterization("sample"))
    return process, grid_of(teacher, process, grid_levels(process, HEADS), STEPS)


class Heads(nn.Module):
    """A network whose heads are a function of (state, interval), whatever it is asked as."""

    def __init__(self, grid, heads):
        super().__init__()
        self.grid, self.heads = grid, heads

    def forward(self, x, time):
        first = (self.grid.time.float() - time.unsqueeze(1)).abs().argmin(1)
        return self.heads(x, first).flatten(1, 2).to(x.dtype)


def student_of(process, kind, grid, velocities):
    """A student whose heads have these velocities: a function of (x~, interval) -> [B, N, ...]."""
    like = Denoiser(lambda x, time: x, process, Parameterization(kind), (2,))

    def heads(shown, first):
        shape = ParallelHeads.of(like, grid)
        sigma = grid.sigma[first]
        factor = (sigma**2 + 0.5**2).sqrt() if kind == "edm" else torch.ones_like(sigma)
        x = shown.double() * factor.unsqueeze(1)
        wanted = velocities(x / per_sample(grid.scale[first], x), first)
        return torch.stack([shape.wanted(v, x, first) for v in wanted.unbind(1)], 1)

    return ParallelHeads.of(
        Denoiser(Heads(grid, heads), process, Parameterization(kind), (2,)),
        grid,
    )


@pytest.mark.parametrize("name", PROCESSES)
def test_a_ddim_step_is_an_euler_step_in_flow_coordinates(name):
    process = PROCESSES[name]
    t, s = torch.tensor([T - 1, 60, 60, 7]), torch.tensor([60, 13, -1, -1])
    x_0, eps = torch.randn(2, 4, 3, dtype=torch.float64)
    x = process.add_noise(x_0, eps, t)
    guess = Prediction(x_0, x_0 + 0.3, eps - 0.2)
    (a_t, s_t), (a_s, s_s) = process.at(t), process.at(s)
    guess = guess._replace(eps=(x - per_sample(a_t, x) * guess.x_0) / per_sample(s_t, x))
    moved = reverse_step(process, Parameterization("sample"), x, guess, t, s, eps, eta=0.0)
    tau = [sigma / (alpha + sigma) for alpha, sigma in ((a_t, s_t), (a_s, s_s))]
    place = x / per_sample(a_t + s_t, x) + per_sample(tau[1] - tau[0], x) * (guess.eps - guess.x_0)
    torch.testing.assert_close(moved, per_sample(a_s + s_s, x) * place)


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_folded_heads_are_rolled_heads(name, kind):
    """Averaged outputs in a DDIM step, as a student samples, against the sum of Euler steps."""
    process, grid = process_and_grid(name)
    drift = torch.randn(HEADS, 2, dtype=torch.float64)
    student = student_of(process, kind, grid, lambda place, _: drift * (1 + place.unsqueeze(1)))
    noise = torch.randn(5, 2)
    x = process.start_std * noise.double() / grid.scale[0]
    for steps in STEPS:
        place = x
        for block in grid.blocks(steps):
            first, last = (torch.full((5,), end) for end in (block.start, block.stop))
            velocities = drift * (1 + place.unsqueeze(1))
            place = rolled(place, velocities, grid.widths, first, last)
        drawn = student.sample(lambda _: noise, {}, steps)
        torch.testing.assert_close(drawn.double(), place * grid.scale[-1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_exact_mean_velocities_draw_the_exact_sample_in_any_number_of_steps(name, kind):
    """Of one Gaussian: the probability flow is x = alpha mu + sqrt(alpha^2 s^2 + sigma^2) z."""
    process, grid = process_and_grid(name)
    mean, std = torch.tensor([0.5, -1.0], dtype=torch.float64), 0.4
    width = ((grid.alpha * std) ** 2 + grid.sigma**2).sqrt()

    def on_the_way(z):
        each = grid.alpha[:, None] * mean + width[:, None] * z.unsqueeze(1)
        return each / grid.scale[:, None]

    def velocities(place, first):
        x = place * grid.scale[first].unsqueeze(1)
        z = (x - grid.alpha[first].unsqueeze(1) * mean) / width[first].unsqueeze(1)
        return on_the_way(z).diff(dim=1) / grid.widths[:, None]

    student = student_of(process, kind, grid, velocities)
    z = torch.randn(6, 2, dtype=torch.float64)
    start = (grid.alpha[0] * mean + width[0] * z) / process.start_std
    for steps in STEPS:
        drawn = student.sample(lambda _: start.float(), {}, steps)
        torch.testing.assert_close(drawn.double(), mean + std * z, rtol=2e-4, atol=2e-4)


def perfect(teacher, grid, levels, kind):
    """A student whose heads are what its teacher says along its own roll."""

    def velocities(place, first):
        found = torch.zeros(len(place), HEADS, 2, dtype=torch.float64)
        for k in range(int(first.min()), HEADS):
            alpha, sigma = teacher.process.at(levels[k].repeat(len(place)))
            x = per_sample(alpha + sigma, place) * place
            said = teacher.predict(Batch(x, levels[k].repeat(len(place)), {}))
            on = (first <= k).unsqueeze(1)
            found[:, k] = torch.where(on, said.eps - said.x_0, 0)
            place = place + grid.widths[k] * found[:, k]
        return found

    return student_of(teacher.process, kind, grid, velocities)


@pytest.mark.parametrize(("name", "kind"), KINDS)
@pytest.mark.parametrize(("targets", "on_policy"), [(1, 1.0), (3, 0.5)])
def test_a_perfect_student_has_no_loss(name, kind, targets, on_policy):
    process, grid = process_and_grid(name)
    teacher = mixture_denoiser(MIXTURE, process, Parameterization("sample"))
    levels = grid_levels(process, HEADS)
    student = perfect(teacher, grid, levels, kind)
    pool = empty_rolled(teacher, student, levels, 12, CPU, targets=targets, on_policy=on_policy)
    objective = HeadsObjective(student, anchor=1.0)
    for step in range(4):
        batch = pool.draw(8)
        target = pool.target(batch)
        loss = objective(student, batch, target)
        off = objective(student, batch, target._replace(eps=target.eps + 1))
        # at pure noise, eps hardly depends on the velocity: the loss of any student is small there
        assert loss.shape == (8 * targets,) and float((loss / off).max()) < 1e-4
        assert float(loss.max()) < 1e-6
        pool.advance(batch, target)
        assert pool.evaluations == 8 * targets * (step + 1)
    assert set(pool.first.tolist()) <= set(range(0, HEADS, grid.shortest))
    # in one step it goes the way that its teacher goes by DDIM in as many steps as there are heads
    noise = torch.randn(4, 2)
    x = process.start_std * noise
    for t, s in zip(levels[:-1].tolist(), levels[1:].tolist(), strict=True):
        at, to = torch.full((4,), t), torch.full((4,), s)
        said = teacher.predict(Batch(x, at, {}))
        x = reverse_step(process, teacher.parameterization, x, said, at, to, x, eta=0.0)
    drawn = student.sample(lambda _: noise, {}, 1)
    torch.testing.assert_close(drawn, x, rtol=1e-3, atol=1e-3)


def learner(grid, seed=0):
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(3, 48), nn.SiLU(), nn.Linear(48, 2 * HEADS))
    denoiser = Denoiser(network, PROCESSES["ddpm"], Parameterization("v_prediction"), (2,))
    denoiser.call = lambda network, x, time, cond: network(torch.cat([x, time.unsqueeze(1) / T], 1))
    return ParallelHeads.of(denoiser, grid)


def pool_of(student, **laws):
    process = PROCESSES["ddpm"]
    teacher = mixture_denoiser(MIXTURE, process, Parameterization("v_prediction"))
    return empty_rolled(teacher, student, grid_levels(process, HEADS), 24, CPU, **laws)


def test_the_teacher_moves_a_state_by_a_ddim_step_at_no_further_cost():
    process, grid = process_and_grid("ddpm")
    pool = pool_of(learner(grid), on_policy=0.0)
    before = pool.x.clone()
    batch = pool.draw(10)
    target = pool.target(batch)
    rows, last = batch.rows.rows, torch.full((10,), int(pool.levels[grid.shortest]))
    pool.advance(batch, target)
    assert pool.evaluations == 10 and batch.t.tolist() == [T - 1] * 10
    moved = reverse_step(
        process, Parameterization("sample"), batch.x, target, batch.t, last, batch.x, eta=0.0
    )
    torch.testing.assert_close(pool.x[rows], moved / float(grid.scale[grid.shortest]))
    assert pool.first[rows].tolist() == [grid.shortest] * 10
    others = [row for row in range(24) if row not in rows.tolist()]
    assert torch.equal(pool.x[others], before[others])


def steps_of(pool, student, count):
    objective, found = HeadsObjective(student), []
    for _ in range(count):
        batch = pool.draw(8)
        target = pool.target(batch)
        found.append(objective(student, batch, target).detach())
        pool.advance(batch, target)
    return torch.stack(found)


def test_a_pool_that_is_saved_goes_on_bit_by_bit():
    _, grid = process_and_grid("ddpm")
    student = learner(grid)
    pool, other = pool_of(student), pool_of(student)
    steps_of(pool, student, 5)
    other.load_state_dict({name: each.clone() for name, each in pool.state_dict().items()})
    assert torch.equal(steps_of(pool, student, 9), steps_of(other, student, 9))
    assert other.evaluations == pool.evaluations == 8 * 14
    small = {**pool.state_dict(), "x": pool.x[:5]}
    with pytest.raises(UsageError, match="--few-step-pool 5"):
        other.load_state_dict(small)


def test_the_gradient_reaches_the_taught_head_alone():
    _, grid = process_and_grid("ddpm")
    student = learner(grid)
    pool = pool_of(student)
    batch = pool.draw(1)
    loss = HeadsObjective(student)(student, batch, pool.target(batch))
    loss.sum().backward()
    touched = student.network[2].weight.grad.reshape(HEADS, -1).abs().sum(1).nonzero().flatten()
    assert touched.tolist() == batch.rows.asked.flatten().tolist()


def test_the_anchor_is_the_plain_loss_where_the_teacher_was_asked():
    _, grid = process_and_grid("ddpm")
    student = learner(grid)
    pool = pool_of(student, targets=2)
    steps_of(pool, student, 3)  # states of every interval
    batch = pool.draw(8)
    target = pool.target(batch)
    found = HeadsObjective(student, anchor=0.7)(student, batch, target)
    loss = HeadsObjective(student)(student, batch, target)
    said = student.predict(batch).output  # of the head that begins at the batch's level
    alpha, sigma = PROCESSES["ddpm"].at(batch.t)
    v = from_x_0_eps("v_prediction", target.x_0, target.eps, alpha, sigma)
    expected = loss + 0.7 * (said - v).square().flatten(1).mean(1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", PROCESSES)
def test_the_grid_is_even_in_the_share_of_noise(name):
    process, grid = process_and_grid(name)
    share = process.sigma / (process.alpha + process.sigma)
    assert float(grid.tau[0]) == float(share[-1]) and float(grid.tau[-1]) == 0
    even = torch.linspace(float(share[-1]), 0, HEADS + 1, dtype=torch.float64)
    assert float((grid.tau - even).abs().max()) <= float(share.diff().max())
    shifted = grid_of(
        mixture_denoiser(MIXTURE, process, Parameterization("sample")),
        process,
        grid_levels(process, 8, shift=3.0),
        (1,),
    )
    middle = 3 * 0.5 / (1 + 2 * 0.5) * float(share[-1])
    assert abs(float(shifted.tau[4]) - middle) <= float(share.diff().max())


def test_a_grid_finer_than_the_levels_is_refused():
    with pytest.raises(UsageError, match="--few-step-heads 64: .* 100 levels"):
        grid_levels(PROCESSES["ddpm"], 64)


def test_a_student_of_another_process_is_fed_the_same_shares_of_noise():
    process = PROCESSES["ddpm"]
    flow = mixture_denoiser(MIXTURE, rectified_flow(1000), Parameterization("sample"))
    levels = grid_levels(process, HEADS)
    grid = grid_of(flow, process, levels, STEPS)
    alpha, sigma = process.at(levels)
    torch.testing.assert_close(grid.tau, sigma / (alpha + sigma))
    torch.testing.assert_close(grid.scale, torch.ones(HEADS + 1, dtype=torch.float64))
    # its time is 1000 tau, between two of its levels
    torch.testing.assert_close(grid.time, 1000 * grid.tau[:-1], rtol=0, atol=0.6)
    edm = mixture_denoiser(MIXTURE, karras(20), Parameterization("sample"))
    with pytest.raises(UsageError, match="--student-process"):
        grid_of(edm, rectified_flow(T), grid_levels(rectified_flow(T), 4), (1,))


def test_sampling_is_refused_where_the_heads_do_not_lead():
    _, grid = process_and_grid("ddpm")
    student = learner(grid)
    noise = torch.randn(2, 2)

    def draw(*args, **kwargs):
        return student.sample(lambda _: noise, {}, *args, **kwargs)

    with pytest.raises(UsageError, match="3 sampling steps: .* draws in 1, 2, 4 or 8"):
        draw(3)
    with pytest.raises(UsageError, match="takes no guidance scale: guidance was mixed"):
        draw(1, guidance_scale=2.0)
    with pytest.raises(UsageError, match="--sampler ddim"):
        draw(1, eta=1.0)
    assert draw(8).shape == (2, 2)


def test_a_saved_grid_is_read_again_and_a_damaged_one_refused():
    _, grid = process_and_grid("ddpm")
    values = json.loads(json.dumps(grid.as_dict()))
    again = Grid.of_dict(values, "index")
    for name in ("alpha", "sigma", "time"):
        assert torch.equal(getattr(again, name), getattr(grid, name))
    assert again.steps == STEPS
    wrong = [
        [],
        {**values, "steps": [3]},
        {**values, "steps": [0]},
        {**values, "steps": [1.5]},
        {**values, "steps": [1e300]},
        {**values, "steps": 4},
        {**values, "time": [1e300, *values["time"][1:]]},
        {**values, "sigma": [-1.0, *values["sigma"][1:]]},
        {**values, "alpha": [-1e-3, *values["alpha"][1:]]},
        {**values, "time": values["time"][:-1]},
        {**values, "sigma": values["sigma"][::-1]},
        {**values, "alpha": [math.nan] * (HEADS + 1)},
        {key: values[key] for key in ("alpha", "sigma", "steps")},
    ]
    for each in wrong:
        with pytest.raises(UsageError, match="index"):
            Grid.of_dict(each, "index")


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("1:8", (1, 2, 4, 8)),
        ("4", (4,)),
        ("1,4", (1, 4)),
        ("1:6", (1, 2, 4, 6)),
        ("2:8", (2, 4, 8)),
    ],
)
def test_numbers_of_steps(text, steps):
    assert parse_steps(text) == steps


@pytest.mark.parametrize("text", ["8:1", "1:2:4", "0:4", "", "1,", "four", "-1"])
def test_other_numbers_of_steps_are_refused(text):
    with pytest.raises(UsageError, match="--student-steps"):
        parse_steps(text)


@pytest.mark.slow
def test_one_step_is_as_good_as_sixteen_of_the_plain_student_at_equal_evaluations():
    """Energy distances to the mixture; the last 35 % of a run learn few steps, in half batches."""
    random = torch.Generator().manual_seed(0)
    means = 1.3 * torch.randn(8, 4, generator=random, dtype=torch.float64)
    mixture, process = GaussianMixture.of(means, std=0.25), rectified_flow(200)
    kind = Parameterization("flow_prediction")
    teacher = mixture_denoiser(mixture, process, kind)

    def plain(steps):
        torch.manual_seed(0)
        pool = empty_pool(
            teacher, 4096, CPU, torch.float32, Shards(1), stride=Stride(1, 39), eta=0.0
        )
        fill_few_step(pool, 8, 1024)
        student = Denoiser(toy_networks.Mlp(4), process, kind, (4,))
        return toy_networks.trained(pool, student, Objective(student, teacher), steps)

    whole, begun = plain(3000), plain(1950)
    levels = grid_levels(process, 32)
    wide = with_heads(begun, grid_of(begun, process, levels, STEPS))
    pool = empty_rolled(teacher, wide, levels, 1024, CPU)
    toy_networks.trained(pool, wide, HeadsObjective(wide, anchor=1.0), 2100, 128)
    real = mixture.sample(4000, random)
    noise = torch.randn(4000, 4, generator=random)

    def distance(model, steps):
        return energy_distance(model.sample(lambda _: noise, {}, steps), real).distance

    sixteen = distance(whole, 16)
    assert distance(whole, 1) > 50 * sixteen
    assert distance(wide, 1) < 1.5 * sixteen
    assert distance(wide, 4) < sixteen
