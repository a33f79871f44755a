"""Multiply-accumulates against counts by hand, and measurements that leave no trace."""

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from dkdm.core.denoisers.denoiser import Denoiser
from dkdm.core.diffusion.prediction import Parameterization
from dkdm.core.diffusion.schedules import beta_schedule, from_betas
from dkdm.evaluation.cost import (
    count_macs,
    evaluations_in_turns,
    evaluations_per_second,
    undisturbed,
)

TOKENS, WIDTH, HEADS = 16, 8, 2
pytestmark = pytest.mark.measures


class OfX(nn.Module):
    """A network that looks at x only."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x, time):
        del time
        return self.inner(x)


class Attention(nn.Module):
    def forward(self, x):
        heads = x.reshape(len(x), TOKENS, HEADS, WIDTH // HEADS).transpose(1, 2)
        attended = scaled_dot_product_attention(heads, heads, heads)
        return attended.transpose(1, 2).reshape(x.shape)


class TorchAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, x):
        tokens = x.reshape(len(x), TOKENS, WIDTH)
        return self.layer(tokens, tokens, tokens, need_weights=False)[0].reshape(x.shape)


def denoiser(inner: nn.Module, shape: tuple[int, ...]) -> Denoiser:
    process = from_betas(beta_schedule("linear", 20))
    return Denoiser(OfX(inner), process, Parameterization("epsilon"), shape)


@pytest.mark.parametrize(
    ("inner", "shape", "macs"),
    [
        (nn.Conv2d(3, 3, 3, padding=1), (3, 8, 6), 3 * 3 * 9 * 8 * 6),
        (nn.Conv2d(4, 4, 3, padding=1, groups=4), (4, 5, 5), 4 * 9 * 25),
        (nn.Linear(10, 10), (10,), 100),
        (Attention(), (1, TOKENS, WIDTH), 2 * TOKENS * TOKENS * WIDTH),
        (
            TorchAttention(),
            (1, TOKENS, WIDTH),
            4 * TOKENS * WIDTH * WIDTH + 2 * TOKENS * TOKENS * WIDTH,
        ),
    ],
    ids=["convolution", "depthwise", "linear", "attention", "attention module"],
)
def test_multiply_accumulates_are_those_of_the_formula(inner, shape, macs):
    assert count_macs(denoiser(inner, shape)) == macs


def test_measuring_leaves_modes_and_backends_as_they_were():
    model = denoiser(nn.Sequential(nn.Conv2d(1, 1, 1), nn.Dropout(0.5)), (1, 4, 4))
    model.network.train()
    model.network.inner[0].eval()
    count_macs(model)
    evaluations_per_second(model, batch_size=3, seconds=0.0)
    assert [m.training for m in model.network.modules()] == [True, True, False, True]
    assert torch.backends.mha.get_fastpath_enabled()


def test_networks_are_measured_in_evaluation_mode_and_restored_after_a_failure():
    model = denoiser(nn.Dropout(0.5), (1, 4, 4))

    def fail() -> None:
        assert not model.network.training
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"), undisturbed(model):
        fail()
    assert model.network.training


def test_speed_counts_samples_and_takes_the_median(monkeypatch):
    durations = iter([9.0, 0.5, 0.1, 0.2])  # a slow warm-up, then three batches
    clock = iter([0.0, 0.5, 0.6, 1.1])
    monkeypatch.setattr("dkdm.evaluation.cost._timed", lambda *_: next(durations))
    monkeypatch.setattr("dkdm.evaluation.cost.time.perf_counter", lambda: next(clock))
    model = denoiser(nn.Identity(), (1, 2, 2))
    assert evaluations_per_second(model, batch_size=8, seconds=1.2) == pytest.approx(8 / 0.2)


def test_networks_take_turns_and_each_has_its_own_median(monkeypatch):
    order, seconds = [], iter([9.0, 9.0, 0.4, 0.1, 0.2, 0.1, 0.2, 0.3])
    monkeypatch.setattr(
        "dkdm.evaluation.cost._timed", lambda model, _: order.append(model.name) or next(seconds)
    )
    clock = iter([0.0, 0.5, 0.8, 1.1])
    monkeypatch.setattr("dkdm.evaluation.cost.time.perf_counter", lambda: next(clock))
    models = [denoiser(nn.Identity(), (1, 2, 2)) for _ in range(2)]
    models[0].name, models[1].name = "a", "b"
    assert evaluations_in_turns(models, batch_size=8, seconds=1.3) == pytest.approx([40, 80])
    assert order == ["a", "b"] * 4
