"""The noise of a sample is a function of (seed, number, step), however many are drawn together."""

import hashlib

import torch

from dkdm.evaluation.same_noise import shared_noise
from factories import denoiser


def of_one(shape, seed, index, step):
    """From the law alone: a generator of its own."""
    digest = hashlib.sha256(f"{seed}/comparison/{index}/{step}".encode()).digest()
    random = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.empty(shape).normal_(generator=random)


def test_noise_of_a_sample_depends_on_neither_its_neighbours_nor_the_order_of_steps():
    model = denoiser()
    noise = shared_noise(model, 7, range(3, 6))
    drawn = {step: noise(step) for step in (4, -1, 4)}
    for step, found in drawn.items():
        wanted = [of_one(model.sample_shape, 7, index, step) for index in (3, 4, 5)]
        assert torch.equal(found, torch.stack(wanted))
