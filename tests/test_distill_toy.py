"""The method on the exact teacher: a small network learns a mixture from noise alone."""

import pytest
import torch
from torch import nn

from dkdm.config import PoolOptions
from dkdm.core.denoisers.denoiser import Denoiser
from dkdm.core.denoisers.toy import GaussianMixture, mixture_denoiser
from dkdm.core.diffusion.prediction import Parameterization
from dkdm.core.diffusion.schedules import beta_schedule, from_betas, rectified_flow
from dkdm.core.objectives.objective import Objective
from dkdm.core.shards import Shards
from dkdm.core.sources.chains import Stride
from dkdm.core.sources.fill import empty_pool, fill_few_step

LEVELS, BATCH, STEPS = 100, 256, 700
MIXTURE = GaussianMixture.of([[-1.2, -0.4], [0.8, 1.0]], std=[0.3, 0.5], weights=[0.4, 0.6])


class Mlp(nn.Module):
    """A network of 2-d points, told the level by sines of network time."""

    def __init__(self, largest_time, width=96):
        super().__init__()
        self.register_buffer("frequencies", torch.arange(1, 9) * torch.pi / largest_time)
        layers = [nn.Linear(2 + 16, width), nn.SiLU()]
        layers += [nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x, time):
        phase = time.unsqueeze(1) * self.frequencies
        return self.layers(torch.cat([x, phase.sin(), phase.cos()], dim=1))


def distil(student, pool, steps):
    """The four verbs; returns the loss of every step."""
    objective = Objective(student, pool.teacher)
    optimizer = torch.optim.Adam(student.network.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses = []
    for _ in range(steps):
        batch = pool.draw(BATCH)
        target = pool.target(batch)
        loss = objective(student, batch, target).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        pool.advance(batch, target)
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize(
    ("process", "teacher_kind", "student_kind", "stride"),
    [
        (from_betas(beta_schedule("squaredcos_cap_v2", LEVELS)), "epsilon", "v_prediction", "1"),
        (rectified_flow(LEVELS), "sample", "flow_prediction", "random:10"),
    ],
    ids=["ddpm", "flow"],
)
def test_a_student_learns_the_mixture(process, teacher_kind, student_kind, stride):
    teacher = mixture_denoiser(MIXTURE, process, Parameterization(teacher_kind))
    network = Mlp(largest_time=float(process.network_time[-1]))
    student = Denoiser(network, process, Parameterization(student_kind), (2,))
    pool = empty_pool(
        teacher,
        4000,
        torch.device("cpu"),
        torch.float32,
        stride=Stride.of_options(PoolOptions(stride=stride), LEVELS),
        shards=Shards(1),
    )
    fill_few_step(pool, num_steps=10, batch_size=500)
    losses = torch.tensor(distil(student, pool, STEPS))
    assert losses[-50:].mean() < 0.02 * losses[0]
    x = student.sample(lambda _: torch.randn(4000, 2), {}, LEVELS, eta=1.0).double()
    mean, covariance = MIXTURE.moments()
    torch.testing.assert_close(x.mean(0), mean, rtol=0, atol=0.1)
    torch.testing.assert_close(torch.cov(x.T), covariance, rtol=0, atol=0.12)
