"""The teacher is held in evaluation mode, however it is wrapped, and left as it was found."""

import copy
import functools
from dataclasses import replace

import pytest
import torch
from torch import nn

import dkdm
from dkdm.checks.inspection import check_denoising
from dkdm.config import SamplingOptions
from dkdm.core.denoisers.modes import WAS_TRAINING, evaluating, modules_behind, put_into_evaluation
from dkdm.runs.outputs import sample_to_file

VP = dkdm.from_betas(torch.linspace(1e-4, 0.02, 50))


class Noisy(nn.Module):
    """BatchNorm and dropout: both show at once whether it is in training mode."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.drop, self.last = nn.Dropout(0.5), nn.Conv2d(4, 1, 3, padding=1)
        self.modes = set()

    def forward(self, x, t):
        del t
        self.modes.add(self.training or self.norm.training or self.drop.training)
        return self.last(self.drop(torch.relu(self.norm(self.first(x)))))


class Stubborn(Noisy):
    """Keeps its BatchNorm in training mode, as some networks do on purpose."""

    def train(self, mode=True):
        super().train(mode)
        self.norm.training = True
        return self


class Wrapper:
    def __init__(self, network):
        self.network = network

    def __call__(self, x, t):
        return self.network(x, t)

    def predict(self, x, t):
        return self.network(x, t)


def lambda_over(network):
    return lambda x, t: network(x, t)


def with_default(network):
    def call(x, t, network=network):
        return network(x, t)

    return call


IN_GLOBALS = Noisy()


def named_global(x, t):
    return IN_GLOBALS(x, t)


WRAPPED = {
    "module": lambda network: network,
    "closure": lambda_over,
    "default": with_default,
    "object": Wrapper,
    "bound method": lambda network: Wrapper(network).predict,
    "forward": lambda network: network.forward,
    "partial": lambda network: functools.partial(lambda net, x, t: net(x, t), network),
    "partial of a method": lambda network: functools.partial(Wrapper(network).predict),
    "list": lambda network: lambda_over([network].__getitem__(0)),
}


def denoiser(network):
    return dkdm.Denoiser(network, VP, dkdm.Parameterization("epsilon"), (1, 8, 8))


@pytest.mark.parametrize("how", sorted(WRAPPED))
def test_modules_are_found_behind_every_wrapping(how):
    network = Noisy()
    found = modules_behind(WRAPPED[how](network))
    assert {id(m) for m in network.modules()} <= {id(m) for m in found}
    assert len(found) == len({id(m) for m in found})


def test_globals_that_a_function_names_are_found_and_others_are_not():
    assert IN_GLOBALS in modules_behind(named_global)
    assert IN_GLOBALS not in modules_behind(lambda_over(Noisy()))


@pytest.mark.parametrize("kind", [Noisy, Stubborn])
def test_modes_and_gradients_are_restored_exactly(kind):
    network = kind().train()
    network.drop.eval()
    network.first.weight.requires_grad_(False)
    modes = [m.training for m in network.modules()]
    wanted = [p.requires_grad for p in network.parameters()]
    with evaluating(network, frozen=True) as changed:
        assert changed
        assert not any(m.training for m in network.modules())
        assert not any(p.requires_grad for p in network.parameters())
    assert [m.training for m in network.modules()] == modes
    assert [p.requires_grad for p in network.parameters()] == wanted
    with evaluating(kind().eval()) as changed:
        assert changed == (kind is Stubborn)


@pytest.mark.parametrize("kind", [Noisy, Stubborn])
@pytest.mark.parametrize("how", ["module", "closure", "bound method"])
def test_distillation_holds_statistics_and_mode_of_the_teacher(tmp_path, capsys, kind, how):
    network = kind().train()
    before = copy.deepcopy(network.state_dict())
    dkdm.distill(
        denoiser(WRAPPED[how](network)),
        "dit-tiny",
        dkdm.DistillConfig(
            output_dir=tmp_path / "run",
            max_train_steps=2,
            train_batch_size=4,
            pool_size=8,
            fill_steps=2,
            evaluation_samples=0,
            validation_steps=0,
        ),
    )
    assert network.modes == {False}
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert not any(m.training for m in network.modules())
    assert all(p.requires_grad for p in network.parameters())
    assert capsys.readouterr().err.count(WAS_TRAINING) == 1


def test_students_train_in_training_mode(tmp_path):
    student = Noisy().eval()
    config = dkdm.DistillConfig(
        output_dir=tmp_path / "run",
        max_train_steps=1,
        train_batch_size=4,
        pool_size=8,
        fill_steps=1,
        evaluation_samples=0,
        validation_steps=0,
    )
    dkdm.distill(denoiser(Noisy()), student, config)
    assert student.training
    assert True in student.modes
    assert int(student.norm.num_batches_tracked) == 1


def test_a_network_cannot_teach_itself(tmp_path):
    teacher = denoiser(Noisy())
    config = dkdm.DistillConfig(output_dir=tmp_path / "run")
    with pytest.raises(dkdm.UsageError, match="deepcopy"):
        dkdm.distill(teacher, teacher.network, config)


def test_inspection_and_sampling_hold_the_model_still(tmp_path, capsys):
    network = Noisy().train()
    model = denoiser(lambda_over(network))
    check_denoising(model, num_steps=2, max_trials=2)
    sample_to_file(model, SamplingOptions(tmp_path / "s.safetensors", num_samples=2, steps=2))
    model.check()
    assert network.modes == {False}
    assert network.training
    assert int(network.norm.num_batches_tracked) == 0
    assert capsys.readouterr().err.count(WAS_TRAINING) == 2


def test_functions_without_modules_are_left_alone():
    assert modules_behind(lambda x, t: x, torch.relu, abs, Wrapper, 3, None) == []
    assert not put_into_evaluation(lambda x, t: x)


def in_training_mode():
    return replace(denoiser(Noisy().train()), name="mine")


def test_what_a_factory_makes_is_put_into_evaluation_mode(capsys):
    model = dkdm.load_teacher("test_modes:in_training_mode")
    assert not any(m.training for m in model.network.modules())
    assert WAS_TRAINING in capsys.readouterr().err
