"""The ADM network against the original repositories' own code: same names, same numbers."""

import pytest
import torch

import programs
from dkdm.core.denoisers.conditioning import ClassLabels, Unconditional
from dkdm.core.saving.checkpoint import load_strict
from dkdm.errors import DkdmError, UsageError
from dkdm.models import load_teacher
from dkdm.networks import network_class
from dkdm.networks.adm import AdmUNet
from dkdm.shipping.pipeline_folder import write_pipeline
from dkdm.students import Interface, as_denoiser, build_network
from factories import denoiser
from formula_weights import few, filled, numbers
from programs import SAMPLED

SMALL = {"sample_size": 8, "num_res_blocks": 1, "channel_mult": (1, 2), "model_channels": 32}
UPDOWN = {**SMALL, "attention_resolutions": (2,), "out_channels": 6, "resblock_updown": True}
UNLEARNED = {
    **SMALL,
    "channel_mult": (1, 1, 2),
    "num_res_blocks": 2,
    "attention_resolutions": (1, 4),
    "num_heads": 2,
    "num_heads_upsample": 4,
    "use_scale_shift_norm": False,
    "conv_resample": False,
}
LEARNED = {**SMALL, "attention_resolutions": (2,), "out_channels": 6, "num_heads": 4}
NEW_ORDER = {"num_head_channels": 16, "use_new_attention_order": True, "num_class_embeds": 3}

# What UNetModel of the named repository gives: six numbers of its output, and the mean square.
ORIGINALS = {
    "guided-diffusion": (
        UPDOWN | NEW_ORDER,
        [-0.3895459, -0.2624532, -0.7922134, 0.8052447, 0.4949622, 0.1759471, 0.3388262],
    ),
    "guided-diffusion, nothing optional": (
        UNLEARNED,
        [-0.5113647, -0.1283009, -0.440742, 0.2029645, 0.6593453, 0.0913723, 0.3163878],
    ),
    "improved-diffusion": (
        LEARNED,
        [-0.471635, -0.3012975, -0.1382946, 1.1472876, 0.0903505, 0.2539968, 0.3471904],
    ),
    "DDPM-IP": (
        UPDOWN | {"num_head_channels": 32},
        [-0.4750849, -0.4328012, -0.7098643, 1.2501428, 1.0210257, 0.4014763, 0.3423144],
    ),
}


def inputs(network):
    labelled = network.config.num_class_embeds is not None
    x, time = numbers("x", 2, 3, 8, 8), torch.tensor([3.0, 712.5])
    return (x, time, torch.tensor([0, 2])) if labelled else (x, time)


@pytest.mark.parametrize("name", ORIGINALS)
def test_outputs_are_the_originals(name):
    config, expected = ORIGINALS[name]
    network = filled(AdmUNet(**config))
    with torch.no_grad():
        assert few(network(*inputs(network))) == pytest.approx(expected, abs=1e-5)


def test_weights_have_the_names_of_the_originals():
    names = set(AdmUNet(**UPDOWN | NEW_ORDER).state_dict())
    assert {
        "time_embed.2.bias",
        "label_emb.weight",
        "input_blocks.0.0.weight",
        "input_blocks.2.0.out_layers.3.weight",
        "input_blocks.3.0.skip_connection.weight",
        "input_blocks.3.1.proj_out.weight",
        "middle_block.1.qkv.bias",
        "output_blocks.1.2.in_layers.2.weight",
        "out.2.weight",
    } <= names


def test_saved_and_loaded_it_is_the_same(tmp_path):
    network = filled(AdmUNet(**UPDOWN | NEW_ORDER))
    network.save_pretrained(tmp_path)
    again = network_class("AdmUNet").from_pretrained(tmp_path)
    assert torch.equal(network(*inputs(network)), again(*inputs(network)))


def test_gradient_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointed in (False, True):
        network = filled(AdmUNet(**UPDOWN | NEW_ORDER)).train()
        if checkpointed:
            network.enable_gradient_checkpointing()
        network(*inputs(network)).square().mean().backward()
        gradients.append(network.input_blocks[0][0].weight.grad)
    torch.testing.assert_close(*gradients)


def test_fresh_network_gives_zero():
    network = AdmUNet(**UPDOWN)
    assert not network(*inputs(network)).any()


@pytest.mark.parametrize("classes", [None, 3])
def test_classes_must_be_given_where_there_are_some(classes):
    network = AdmUNet(**SMALL, num_class_embeds=classes)
    x, time = numbers("x", 2, 3, 8, 8), torch.zeros(2)
    with pytest.raises(ValueError, match=f"num_class_embeds is {classes}"):
        network(x, time, None if classes else torch.zeros(2, dtype=torch.int64))


@pytest.mark.parametrize("heads", [{"num_heads": 5}, {"num_head_channels": 48}])
def test_heads_must_divide_the_channels(heads):
    with pytest.raises(ValueError, match="attention over 64 channels cannot have"):
        AdmUNet(**SMALL, attention_resolutions=(2,), **heads)


def test_other_weights_are_refused_whole():
    network, before = AdmUNet(**SMALL), AdmUNet(**UPDOWN).state_dict()
    kept = network.input_blocks[0][0].weight.clone()
    with pytest.raises(DkdmError, match="Nothing was loaded"):
        load_strict(network, before, "file.pt")
    assert torch.equal(network.input_blocks[0][0].weight, kept)


@pytest.mark.parametrize(
    ("name", "parameters"),
    {
        "adm-14m": 14_301_446,
        "adm-24m": 24_866_214,
        "adm-32m": 32_136_582,
        "adm-44m": 44_177_286,
        "adm-57m": 57_094_662,
    }.items(),
)
def test_presets_have_the_papers_sizes(name, parameters):
    with torch.device("meta"):
        network = build_network(name, Interface((3, 32, 32), 6, Unconditional()))
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters


def test_preset_fits_itself_to_sample_and_classes():
    with torch.device("meta"):
        network = build_network("adm-14m", Interface((4, 64, 32), 4, ClassLabels(5, null_class=5)))
    assert network.config.sample_size == (64, 32)
    assert network.config.attention_resolutions == (4, 8)
    assert network.config.num_class_embeds == 6
    with pytest.raises(UsageError, match="divisible by 8"):
        build_network("adm-14m", Interface((3, 12, 12), 3, Unconditional()))


def test_student_samples_without_dkdm_and_loads_again(tmp_path):
    network = AdmUNet(**SMALL | {"in_channels": 1, "out_channels": 1}, num_class_embeds=4)
    student = as_denoiser("small", network, denoiser())
    write_pipeline(tmp_path, student)
    assert (tmp_path / "unet" / "adm.py").is_file()
    again = load_teacher(str(tmp_path))
    assert isinstance(again.network, AdmUNet)
    done = programs.run(SAMPLED, tmp_path)
    assert "sampled" in done.stdout, done.stderr
