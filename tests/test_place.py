"""Teachers that are held small: moved in layer by layer, or with int8 linear layers."""

import copy
import sys
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

import pipelines
from dkdm.config import EvaluateCommand, HarvestCommand, SampleCommand
from dkdm.core.denoisers.bundle import Bundle
from dkdm.core.denoisers.denoiser import Batch
from dkdm.errors import DkdmError
from dkdm.models import LoadOptions, load_teacher, with_texts
from dkdm.models import place as places
from dkdm.models.place import device_of_run, place, quantize_int8
from dkdm.models.text import text_conditioning
from dkdm.reading.command_line import parse
from factories import denoiser


def predicted(teacher):
    x = torch.randn(3, *teacher.sample_shape, generator=torch.Generator().manual_seed(1))
    cond = teacher.conditioning.in_turns(3)
    with torch.no_grad():
        return teacher.predict(Batch(x, torch.tensor([3, 20, 45]), cond, torch.arange(3))).x_0


def test_offloaded_layers_give_the_same_numbers():
    whole = denoiser()
    parted = replace(whole, network=copy.deepcopy(whole.network))
    place(parted, torch.device("cpu"), "layers")
    assert all(p.device.type == "meta" for p in parted.network.parameters())
    assert parted.device.type == "cpu"
    torch.testing.assert_close(predicted(parted), predicted(whole), rtol=0, atol=0)


def test_prompts_are_encoded_on_the_device_of_the_run(tmp_path, monkeypatch):
    pipelines.stable_diffusion().save_pretrained(tmp_path)
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(AcceleratorState, "_shared_state", {})
    assert device_of_run() == torch.device("cuda")
    Accelerator(cpu=True)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert device_of_run() == torch.device("cpu")
    teacher = with_texts(load_teacher(str(tmp_path)), "a red cat on a device")
    assert predicted(teacher).shape == (3, *teacher.sample_shape)


def test_missing_torchao_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(DkdmError, match=r"pip install 'dkdm\[quant\]'"):
        quantize_int8(denoiser().network)


@pytest.mark.filterwarnings("ignore")  # torchao's own, about its CUDA kernels
def test_int8_teacher_predicts_nearly_the_same():
    pytest.importorskip("torchao", reason="torchao is an extra")
    whole = load_teacher("builtin:fashion")
    small = load_teacher("builtin:fashion", options=LoadOptions(dtype="int8"))
    x = torch.randn(8, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    t, cond = torch.linspace(0, 999, 8).long(), whole.conditioning.in_turns(8)
    with torch.no_grad():
        a, b = (model.predict(Batch(x, t, cond, t)).output for model in (whole, small))
    error = (a - b).square().mean() / a.square().mean()
    assert 0 < error < 1e-3


def test_missing_transformers_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr("dkdm.models.text.find_spec", lambda name: None)
    with pytest.raises(DkdmError, match=r"pip install 'dkdm\[text\]'"):
        text_conditioning(tmp_path, Bundle("StableDiffusionPipeline"))


def test_who_draws_brings_a_model_to_the_device_unless_it_is_on_one(monkeypatch):
    moved, there = [], torch.device("cuda:1")
    monkeypatch.setattr(places, "place", lambda *given: moved.append(given))
    monkeypatch.setattr(places, "device_of_run", lambda: there)
    model, elsewhere = denoiser(), denoiser()
    elsewhere.network.to("meta")
    assert places.ready_to_draw(model, True) is model
    assert places.ready_to_draw(elsewhere, False) is elsewhere
    assert moved == [(model, there)]


@pytest.mark.parametrize("command", [SampleCommand, EvaluateCommand, HarvestCommand])
def test_commands_that_draw_may_leave_graphs_out(command):
    drawing = ("sampling", "harvest")
    for args, expected in (([], True), (["--no-cuda-graphs"], False)):
        options = parse(command, args)
        group = next(getattr(options, name) for name in drawing if hasattr(options, name))
        assert group.cuda_graphs is expected
