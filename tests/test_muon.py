"""Muon beside torch's own, beside AdamW, and beside the polar factor that it approaches."""

import copy
import math

import pytest
import torch
from torch import nn

from dkdm.core.training.muon import Muon, hidden_matrices, orthogonal
from watched import Watched

RATE = 0.02


def steps(optimizer, weight, gradients):
    """The weight after one step for each gradient."""
    for gradient in gradients:
        weight.grad = gradient.clone().view_as(weight)
        optimizer.step()
    return weight.detach().clone()


def given(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator).requires_grad_()
    return weight, [torch.randn(shape, generator=generator) for _ in range(3)]


@pytest.mark.parametrize("shape", [(2, 24, 40), (3, 40, 24)])
def test_a_matrix_becomes_nearly_its_polar_factor(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    found = orthogonal(matrices)
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.65
    assert values.max() < 1.25
    # the same singular vectors: diagonal between them
    between = left.mT @ found @ right.mT
    assert (between - torch.diag_embed(between.diagonal(dim1=1, dim2=2))).abs().max() < 1e-4


def test_it_moves_as_torchs_own_does():
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    weight, gradients = given(48, 32)
    start, theirs = weight.detach().clone(), weight.detach().clone().requires_grad_()
    own = steps(Muon([weight], [], RATE, weight_decay=0.1), weight, gradients)
    other = torch.optim.Muon([theirs], RATE, weight_decay=0.1)
    moved = (own - start).norm()
    # theirs calculates in bfloat16
    assert (own - steps(other, theirs, gradients)).norm() < 0.02 * moved


def test_a_convolution_and_a_layer_of_one_shape_move_together():
    layer, gradients = given(16, 12)
    kernel = layer.detach().clone()[..., None, None].requires_grad_()
    both = Muon([layer, kernel], [], RATE)
    for gradient in gradients:
        layer.grad, kernel.grad = gradient, gradient[..., None, None]
        both.step()
    assert torch.equal(layer, kernel[..., 0, 0])


def test_a_convolution_is_a_matrix_of_its_output_channels():
    kernel, gradients = given(16, 8, 3, 3)
    matrix = kernel.detach().flatten(1).clone().requires_grad_()
    moved = steps(Muon([kernel], [], RATE), kernel, gradients)
    expected = steps(Muon([matrix], [], RATE), matrix, [g.flatten(1) for g in gradients])
    assert torch.equal(moved.flatten(1), expected)


def test_matrices_of_one_shape_do_not_see_one_another():
    (first, gradients), (second, others) = given(16, 16), given(16, 16, seed=5)
    alone = first.detach().clone().requires_grad_()
    both = Muon([first, second], [], RATE)
    for one, two in zip(gradients, others, strict=True):
        first.grad, second.grad = one, two
        both.step()
    torch.testing.assert_close(first, steps(Muon([alone], [], RATE), alone, gradients))


def test_the_rest_learns_by_adamw_with_a_tenth_of_the_rate():
    bias, gradients = given(24)
    same = bias.detach().clone().requires_grad_()
    matrix = given(16, 16)[0]  # without a gradient: it stays
    moved = steps(Muon([matrix], [bias], RATE, weight_decay=0.1), bias, gradients)
    adamw = torch.optim.AdamW([same], RATE / 10, weight_decay=0.1)
    assert torch.equal(moved, steps(adamw, same, gradients))
    assert torch.equal(matrix, given(16, 16)[0])


def test_a_tall_matrix_is_moved_by_the_root_of_its_shape():
    weight, gradients = given(64, 16)
    start = weight.detach().clone()
    moved = steps(Muon([weight], [], RATE), weight, gradients[:1]) - start
    assert math.isclose(moved.norm(), RATE * 2 * 16**0.5, rel_tol=0.2)


@pytest.mark.parametrize("shape", [(1, 9), (9, 1), (16, 16)])
def test_a_gradient_of_zero_moves_nothing(shape):
    weight = given(*shape)[0]
    before = weight.detach().clone()
    assert torch.equal(steps(Muon([weight], [], RATE), weight, [torch.zeros(shape)] * 2), before)


def test_weights_of_half_precision_move_like_others():
    weight, gradients = given(24, 16)
    small = weight.detach().bfloat16().requires_grad_()
    start = weight.detach().clone()
    moved = steps(Muon([weight], [], 1.0), weight, gradients) - start
    halved = steps(Muon([small], [], 1.0), small, [each.bfloat16() for each in gradients])
    assert halved.dtype == torch.bfloat16
    assert (halved.float() - start - moved).norm() < 0.05 * moved.norm()


def test_a_schedule_scales_both():
    matrix, bias = given(16, 16)[0], given(24)[0]
    optimizer = Muon([matrix], [bias], RATE)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [RATE / 2, RATE / 20]


def test_it_goes_on_from_its_state():
    weight, gradients = given(16, 12)
    same = weight.detach().clone().requires_grad_()
    optimizer, again = Muon([weight], [], RATE), Muon([same], [], RATE)
    steps(optimizer, weight, gradients[:2])
    with torch.no_grad():
        same.copy_(weight)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert torch.equal(steps(optimizer, weight, gradients), steps(again, same, gradients))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.inner = nn.Embedding(16, 16), nn.Linear(16, 32)
        self.conv, self.out = nn.Conv2d(16, 8, 3), nn.Conv2d(16, 3, 3)


def test_hidden_matrices_are_those_of_layers_that_are_not_narrow():
    network = Net()
    assert hidden_matrices(network) == {network.inner.weight, network.conv.weight}


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_a_flag_on_the_device_says_whether_a_step_changes_anything(decay):
    """Step by step as without it, a bad step left out; nothing is read by the host."""
    pairs = []
    for _ in range(2):
        (first, gradients), (second, _) = given(24, 16), given(24, 16, seed=3)
        bias, others = given(24, seed=5)
        optimizer = Muon([first, second], [bias], RATE, decay)
        pairs.append((optimizer, (first, second, bias), (gradients, gradients[::-1], others)))
    (usual, expected, given_), (guarded, found, _) = pairs
    for number, bad in ((0, True), (0, False), (1, False), (1, True), (2, True), (2, False)):
        for weight, own, gradients in zip(expected, found, given_, strict=True):
            weight.grad = gradients[number].clone()
            own.grad = torch.full_like(own, math.nan) if bad else gradients[number].clone()
        before = [weight.detach().clone() for weight in found]
        state = copy.deepcopy(guarded.state_dict()["state"])
        guarded.found_inf = torch.tensor(float(bad))
        with Watched():
            guarded.step()
        if not bad:
            usual.step()
            continue
        assert all(torch.equal(*pair) for pair in zip(before, found, strict=True))
        for key, entry in guarded.state_dict()["state"].items():
            known = state.get(key, {})
            assert all(
                torch.equal(v, known.get(n, torch.zeros(()) + 0 * v)) for n, v in entry.items()
            )
    for weight, own in zip(expected[:2], found[:2], strict=True):
        assert torch.equal(weight, own)
    # AdamW's kernel for the device rounds otherwise
    torch.testing.assert_close(found[2], expected[2], rtol=1e-5, atol=1e-7)
    assert int(guarded.state[found[2]]["step"]) == 3
