"""A network of points, and how it is trained on a source."""

from itertools import pairwise

import torch
from torch import nn


class Mlp(nn.Module):
    """A network of points, told the level by sines."""

    def __init__(self, outputs, width=128, period=200):
        super().__init__()
        self.register_buffer("frequencies", torch.arange(1, 9) * torch.pi / period)
        widths = [4 + 16, width, width, width]
        layers = [nn.Sequential(nn.Linear(a, b), nn.SiLU()) for a, b in pairwise(widths)]
        self.layers = nn.Sequential(*layers, nn.Linear(width, outputs))

    def forward(self, x, time):
        phase = time.unsqueeze(1) * self.frequencies
        return self.layers(torch.cat([x, phase.sin(), phase.cos()], 1))


def trained(pool, student, objective, steps, batch_size=256):
    optimizer = torch.optim.Adam(student.network.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        batch = pool.draw(batch_size)
        target = pool.target(batch)
        loss = objective(student, batch, target).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        pool.advance(batch, target)
    return student
