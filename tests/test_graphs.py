"""CUDA graphs where there is no CUDA; `test_cuda.py` has the rest."""

from dataclasses import replace

import pytest
import torch

from dkdm.config import TrainingOptions
from dkdm.core.denoisers.compiled import Compiled
from dkdm.core.denoisers.faster import faster
from dkdm.core.denoisers.graphs import Replayed, own_stream, replayed, unreplayed
from dkdm.evaluation.fingerprint import fingerprint
from factories import denoiser, some_batch


def test_on_a_cpu_a_network_is_called_as_it_is():
    model = denoiser()
    assert replayed(model) is model
    wrapped, batch = replace(model, call=Replayed(model.call)), some_batch(model)
    with torch.no_grad():
        for _ in range(5):
            assert torch.equal(wrapped.predict(batch).output, model.predict(batch).output)
    assert not wrapped.call.graphs


def test_a_replayed_model_is_the_same_model():
    model = denoiser()
    wrapped = replace(model, call=Replayed(model.call))
    assert unreplayed(wrapped.call) is unreplayed(model.call) is model.call
    assert fingerprint(wrapped) == fingerprint(model)


class Small(torch.nn.Module):
    """A convolution that sees the time."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x, time):
        return self.conv(x) + time[:, None, None, None]


def test_a_shape_that_comes_again_is_compiled_and_learns_the_same(capsys):
    model = replace(denoiser(classes=None), network=Small(), call=None)
    compiled = replace(model, call=Compiled(model.call, backend="eager"))
    for count in (2, 3, 3, 3, 3, 3):
        batch, found = some_batch(model, count), []
        for each in (model, compiled):
            model.network.zero_grad()
            output = each.predict(batch).output
            output.square().mean().backward()
            found.append((output.detach(), model.network.conv.weight.grad.clone()))
        torch.testing.assert_close(found[1], found[0])
    assert len(compiled.call.graphs) == 1
    assert capsys.readouterr().err.count("note: compiling Small for 3 samples took") == 1


def test_what_cannot_be_compiled_is_called_as_it_is(capsys):
    model = replace(denoiser(classes=None), network=Small(), call=None)
    compiled = replace(model, call=Compiled(model.call, backend="nothing of this name"))
    batch = some_batch(model)
    with torch.no_grad():
        for _ in range(6):
            assert torch.equal(compiled.predict(batch).output, model.predict(batch).output)
    assert capsys.readouterr().err.count("note: Small is not compiled") == 1


def test_calls_are_made_as_the_option_says():
    model = denoiser()
    assert faster(model, "off") is faster(model, "networks") is model  # there is no CUDA device
    assert isinstance(faster(model, "compile").call, Compiled)
    assert unreplayed(faster(model, "compile").call) is model.call
    options = TrainingOptions(gradient_accumulation_steps=2)
    assert (options.acceleration, options.of_student) == ("graph", "off")
    assert TrainingOptions(cuda_graphs=False, accelerate="graph").acceleration == "off"
    assert replace(options, accelerate="compile").of_student == "compile"


def test_a_capture_that_fails_does_not_leave_its_stream(monkeypatch):
    current = ["home"]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "set_stream", current.append)
    with pytest.raises(RuntimeError), own_stream():
        current.append("capture")
        raise RuntimeError("operation not permitted when stream is capturing")
    assert current[-1] == "home"
