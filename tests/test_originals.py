"""Checkpoint files of different repositories are told apart by their keys."""

import functools
from pathlib import Path

import pytest
import torch

from dkdm import UsageError, load_teacher
from dkdm.models import FORMATS, LoadOptions
from dkdm.models.formats.originals import _format_of
from dkdm.models.formats.single_file import recognize
from dkdm.models.formats.state_dict import Weights, read_weights, without_prefix
from dkdm.networks.adm import AdmUNet
from formula_weights import filled
from original_files import dit, edm, guided, latent, lucidrains

MADE = {
    "dit": lambda: [dit.checkpoint()],
    "sit": lambda: [dit.sit_checkpoint()],
    "edm": lambda: [edm.checkpoint(kind) for kind in ("ddpmpp", "ncsnpp", "adm")],
    "edm2": lambda: [
        without_prefix(edm.checkpoint(kind), "unet.") for kind in ("edm2", "edm2-pixels")
    ],
    "lucidrains": lambda: [lucidrains.checkpoint()],
    "guided-diffusion": lambda: [
        filled(AdmUNet(**config)).state_dict()
        for config in (guided.GUIDED, guided.IMPROVED, guided.PERTURBED)
    ],
    "latent-diffusion": lambda: [latent.checkpoint(kind) for kind in ("vq", "class")],
}


@functools.cache
def files(name):
    """The weights of files of a format, made when a test asks for them."""
    return MADE[name]()


@pytest.mark.parametrize("name", FORMATS)
def test_only_its_own_format_recognizes_a_file(name):
    for state in files(name):
        assert [key for key, one in FORMATS.items() if one.recognizes(state)] == [name]
        assert recognize({key: tuple(value.shape) for key, value in state.items()}) is None


HOLDERS = (
    "module.",
    "_orig_mod.",
    "module._orig_mod.",
    "model.",
    "ema_model.",
    "model.module.",
    "_forward_module.model._orig_mod.",
    "diffusion_model.",
    "unet.",
    "state_dict.module.net.",
)


def behind(holder, state):
    return {f"{holder}{key}": value for key, value in state.items()}


@pytest.mark.parametrize("holder", HOLDERS)
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_known_behind_what_held_the_network(tmp_path, name, holder):
    state = files(name)[0]
    torch.save({"state_dict": behind(holder, state), "epoch": 3}, tmp_path / "model.pt")
    weights = read_weights(tmp_path / "model.pt")
    found, view = _format_of(weights, None, ema=True)
    assert found == name
    for key, value in state.items():
        assert any(torch.equal(view.tensors[k], value) for k in view.tensors if k.endswith(key))


def test_averages_come_before_the_weights_beside_them():
    plain = dit.checkpoint()
    average = {key: value + 1 for key, value in plain.items()}
    flat = {f"model_ema.{key.replace('.', '')}": value for key, value in average.items()}
    counts = {"model_ema.decay": torch.ones(()), "model_ema.num_updates": torch.ones(())}
    files = {
        "listed by name": behind("ema.", average) | behind("model.", plain),
        "online": behind("online_model.", plain) | behind("ema_model.", average),
        "without dots": flat | counts | behind("model.", plain),
    }
    for tensors in files.values():
        for ema, expected in ((True, average), (False, plain)):
            _, view = _format_of(Weights(Path("a.pt"), tensors), "dit", ema)
            assert view.tensors.keys() == plain.keys()
            assert all(torch.equal(view.tensors[key], expected[key]) for key in plain)


def test_a_network_of_ones_own_is_answered_with_the_lines_that_wrap_it(tmp_path):
    file = tmp_path / "model.pth"
    network = torch.nn.Linear(2, 3)
    torch.save(network.state_dict(), file)
    with pytest.raises(UsageError, match="the format of these weights is not known") as told:
        load_teacher(str(file))
    lines = str(told.value).splitlines()[1:]
    assert len(lines) == 4
    code = "\n".join(line[4:] for line in lines).replace("from yours import YourNetwork", "")
    names = {"YourNetwork": lambda: torch.nn.Linear(2, 3)}
    exec(code, names)
    teacher = names["load"]()
    assert torch.equal(teacher.network.weight, network.weight)
    assert teacher.sample_shape == (3, 32, 32)


def test_options_of_pipelines_are_refused(tmp_path):
    torch.save(dit.checkpoint(), tmp_path / "dit.pt")
    with pytest.raises(UsageError, match="takes no LoRA: remove this option"):
        load_teacher(str(tmp_path / "dit.pt"), options=LoadOptions(lora=("a.safetensors",)))
