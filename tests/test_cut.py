"""Students cut from the teacher, and the teacher's weights in them, held against hand-made ones."""

import copy

import pytest
import torch
from diffusers import (
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    Lumina2Transformer2DModel,
    PixArtTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
    WanTransformer3DModel,
)
from torch import nn

from dkdm.checks.student_table import list_students
from dkdm.core.denoisers.conditioning import ClassLabels
from dkdm.core.objectives.positions import counterparts, evenly
from dkdm.errors import UsageError
from dkdm.students import PRESETS, Interface, build_network
from dkdm.students.start import inherit
from factories import denoiser

CUT = ["bk-base", "bk-small", "bk-tiny", "thin-75", "thin-50", "thin-25", "shallow-50"]
SIZES = {"sample_size": 8, "norm_num_groups": 4}


def seeded(network):
    """Every parameter random, so that nothing that is zero or one at first hides an error."""
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    return network.eval()


def text_unet(**config):
    down, up = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
    sizes = {
        "in_channels": 4,
        "out_channels": 8,
        "layers_per_block": 2,
        "block_out_channels": (8, 16, 16),
        "down_block_types": (down, down, "DownBlock2D"),
        "up_block_types": ("UpBlock2D", up, up),
        "cross_attention_dim": 12,
        "attention_head_dim": (2, 4, 4),
    }
    return seeded(UNet2DConditionModel(**{**SIZES, **sizes, **config}))


def unet(**config):
    sizes = {
        "in_channels": 1,
        "out_channels": 2,
        "layers_per_block": 2,
        "block_out_channels": (8, 16, 16),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 8,
        "num_class_embeds": 4,
    }
    return seeded(UNet2DModel(**{**SIZES, **sizes, **config}))


def dit(**config):
    sizes = {
        "num_attention_heads": 4,
        "attention_head_dim": 8,
        "in_channels": 2,
        "out_channels": 4,
        "num_layers": 5,
        "sample_size": 8,
        "num_embeds_ada_norm": 3,
    }
    return seeded(DiTTransformer2DModel(**{**sizes, **config}))


def sd3(**config):
    sizes = {
        "sample_size": 8,
        "in_channels": 2,
        "out_channels": 2,
        "num_layers": 4,
        "attention_head_dim": 8,
        "num_attention_heads": 4,
        "joint_attention_dim": 12,
        "caption_projection_dim": 32,
        "pooled_projection_dim": 6,
        "pos_embed_max_size": 8,
        "dual_attention_layers": (0, 1),
        "qk_norm": "rms_norm",
    }
    return seeded(SD3Transformer2DModel(**{**sizes, **config}))


def flux():
    return seeded(
        FluxTransformer2DModel(
            in_channels=4,
            num_layers=3,
            num_single_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=12,
            pooled_projection_dim=6,
            axes_dims_rope=(4, 2, 2),
        )
    )


def pixart():
    return seeded(
        PixArtTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=8,
            num_layers=4,
            cross_attention_dim=16,
            sample_size=8,
            caption_channels=12,
        )
    )


def sana():
    return seeded(
        SanaTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_layers=3,
            num_attention_heads=2,
            attention_head_dim=4,
            num_cross_attention_heads=2,
            cross_attention_head_dim=4,
            cross_attention_dim=8,
            caption_channels=16,
            sample_size=8,
        )
    )


def lumina():
    return seeded(
        Lumina2Transformer2DModel(
            sample_size=8,
            in_channels=4,
            hidden_size=16,
            num_layers=3,
            num_refiner_layers=1,
            num_attention_heads=2,
            num_kv_heads=1,
            multiple_of=16,
            axes_dim_rope=(4, 2, 2),
            axes_lens=(300, 16, 16),
            cap_feat_dim=16,
        )
    )


def wan():
    return seeded(
        WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=32,
            freq_dim=16,
            ffn_dim=16,
            num_layers=3,
            rope_max_seq_len=32,
        )
    )


def cut(name, teacher):
    """The student of this name with all that it can take from the teacher, and the report."""
    config = teacher.config
    shape = (config.in_channels, 8, 8)
    gives = config.get("out_channels") or config.in_channels
    interface = Interface(shape, gives, ClassLabels(4), teacher)
    student = build_network(name, interface)
    return student.eval(), inherit(student, teacher.state_dict(), "teacher")


@torch.no_grad()
def output(network):
    random = torch.Generator().manual_seed(0)
    x = torch.randn(2, network.config.in_channels, 8, 8, generator=random)
    t, words = torch.tensor([3, 700]), torch.randn(2, 5, 12, generator=random)
    if isinstance(network, UNet2DConditionModel):
        return network(x, t, words).sample
    if isinstance(network, SD3Transformer2DModel):
        pooled = torch.randn(2, 6, generator=random)
        return network(x, words, pooled, t).sample
    if isinstance(network, DiTTransformer2DModel):
        return network(x, t, class_labels=torch.tensor([0, 3])).sample
    return network(x, t, torch.tensor([0, 3])).sample


def without_blocks(teacher, name):
    """BK-SDM by hand: the teacher's own modules, those that it removes taken out."""
    network = copy.deepcopy(teacher)
    for block in [*network.down_blocks, *network.up_blocks]:
        layers = [block.resnets, *([block.attentions] if hasattr(block, "attentions") else [])]
        for modules in layers:
            del modules[1]
    if name != "bk-base":
        network.mid_block = None
    if name == "bk-tiny":
        del network.down_blocks[-1], network.up_blocks[0]
        network.down_blocks[-1].downsamplers = None
    return network


@pytest.mark.parametrize("name", ["bk-base", "bk-small", "bk-tiny"])
@pytest.mark.parametrize("make", [text_unet, unet])
def test_network_of_fewer_blocks_is_the_teacher_without_these(name, make):
    teacher = make()
    student, start = cut(name, teacher)
    assert torch.equal(output(student), output(without_blocks(teacher, name)))
    assert start.share == 1.0
    assert not start.sliced
    assert not start.random
    assert not torch.equal(output(student), output(teacher))


def test_middle_block_alone_is_removed_where_stages_have_one_block():
    teacher = unet(layers_per_block=1)
    student, start = cut("bk-small", teacher)
    without = copy.deepcopy(teacher)
    without.mid_block = None
    assert torch.equal(output(student), output(without))


PLAIN_STAGES = {
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}


def two_stages(*widths, **config):
    return unet(block_out_channels=widths, norm_num_groups=8, **PLAIN_STAGES, **config)


def kill_channels_that_a_narrow_network_lacks(teacher):
    """Zero all weights that read from the second half of 16 channels, or of what is made of these.

    Concatenations are [from below, skip], and the sinusoids of the time, cosines and then sines,
    have the frequencies 10000^(-i/8), of which a network of half the width has every other.
    """
    for name, parameter in teacher.named_parameters():
        if parameter.ndim < 2 or name.startswith(("class_embedding", "conv_in")):
            continue
        channels = parameter.shape[1]
        read = torch.arange(channels) < channels // 2
        if channels == 32:
            read = torch.arange(channels) % 16 < 8
        if name == "time_embedding.linear_1.weight":
            read = torch.arange(channels) % 2 == 0
        with torch.no_grad():
            parameter[:, ~read] = 0


@pytest.mark.parametrize("time", ["default", "scale_shift"])
def test_narrow_network_computes_what_the_teacher_does_with_its_channels(time):
    teacher = two_stages(16, 16, resnet_time_scale_shift=time, attn_norm_num_groups=8)
    kill_channels_that_a_narrow_network_lacks(teacher)
    student, start = cut("thin-50", teacher)
    assert student.config.block_out_channels == (8, 8)
    assert student.config.norm_num_groups == student.config.attn_norm_num_groups == 4
    assert start.share == 1.0
    assert start.whole == ("conv_out.bias",)
    expected = output(teacher)
    assert expected.std() > 0.1
    assert torch.allclose(output(student), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("widths", "name"), [((12, 24), "thin-75"), ((20, 40), "thin-25")])
def test_an_odd_width_takes_the_sinusoids_and_leaves_the_padding(widths, name):
    teacher = unet(block_out_channels=widths, **PLAIN_STAGES, attn_norm_num_groups=4)
    student, start = cut(name, teacher)
    assert student.config.block_out_channels[0] % 2
    assert "time_embedding.linear_1.weight" in (*start.sliced, *start.random)
    assert output(student).isfinite().all()


def test_inputs_of_a_concatenation_are_sliced_one_by_one():
    teacher = two_stages(16, 32)
    student, _ = cut("thin-50", teacher)
    wide, narrow = teacher.up_blocks[0].resnets, student.up_blocks[0].resnets
    weight = wide[1].conv1.weight  # 32 channels from below, 16 of the first stage's output
    assert weight.shape[:2] == (32, 48)
    assert torch.equal(narrow[1].conv1.weight, torch.cat([weight[:16, :16], weight[:16, 32:40]], 1))
    norm = wide[1].norm1.bias
    assert torch.equal(narrow[1].norm1.bias, torch.cat([norm[:16], norm[32:40]]))
    last = teacher.up_blocks[1].resnets[0].conv_shortcut.weight  # 32 and 16 again
    expected = torch.cat([last[:8, :16], last[:8, 32:40]], 1)
    assert torch.equal(student.up_blocks[1].resnets[0].conv_shortcut.weight, expected)


def test_halves_of_a_gated_layer_are_sliced_one_by_one():
    teacher = text_unet(block_out_channels=(16, 32, 32), norm_num_groups=8)
    student, start = cut("thin-50", teacher)
    assert student.config.attention_head_dim == (1, 2, 2)  # heads of 8 channels, as before
    assert start.share == 1.0
    assert output(student).isfinite().all()
    name = "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj.weight"
    gated, taken = teacher.state_dict()[name], student.state_dict()[name]
    assert gated.shape == (128, 16)
    assert torch.equal(taken, torch.cat([gated[:32, :8], gated[64:96, :8]]))
    text = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    assert torch.equal(student.state_dict()[text], teacher.state_dict()[text][:16])


def test_fourier_features_keep_their_frequencies():
    teacher = two_stages(16, 32, time_embedding_type="fourier")
    student, start = cut("thin-50", teacher)
    wide = teacher.time_embedding.linear_1.weight
    assert torch.equal(student.time_proj.weight, teacher.time_proj.weight[:8])
    expected = torch.cat([wide[:32, :8], wide[:32, 16:24]], dim=1)
    assert torch.equal(student.time_embedding.linear_1.weight, expected)
    assert start.share == 1.0


def test_narrow_transformer_reads_the_positions_that_it_is_given():
    teacher = dit()
    student, start = cut("thin-50", teacher)
    assert student.config.num_attention_heads == 2
    assert student.config.out_channels == 4
    assert start.share == 1.0
    every_other = torch.arange(0, 32, 2)  # of four rows of 8 sinusoids
    wide, narrow = teacher.pos_embed.pos_embed, student.pos_embed.pos_embed
    assert torch.allclose(narrow, wide[..., every_other], atol=1e-6)
    theirs, own = teacher.transformer_blocks[1], student.transformer_blocks[1]
    to_q = theirs.attn1.to_q.weight
    assert torch.equal(own.attn1.to_q.weight, to_q[:16][:, every_other])
    to_out = theirs.attn1.to_out[0].weight
    assert torch.equal(own.attn1.to_out[0].weight, to_out[every_other][:, :16])
    six = torch.cat([32 * i + every_other for i in range(6)])
    assert torch.equal(own.norm1.linear.bias, theirs.norm1.linear.bias[six])
    assert torch.equal(student.proj_out_2.weight, teacher.proj_out_2.weight[:, every_other])


@pytest.mark.parametrize(("name", "make"), [("thin-50", unet), ("shallow-50", dit)])
def test_variance_that_is_not_to_be_learned_is_left_out(name, make):
    teacher = make()
    channels = teacher.config.in_channels
    student = build_network(name, Interface((channels, 8, 8), channels, teacher=teacher)).eval()
    assert student.config.out_channels == channels
    whole, _ = cut(name, teacher)
    inherit(student, teacher.state_dict(), "teacher")
    assert torch.allclose(output(student), output(whole)[:, :channels], atol=1e-5)


def test_narrow_sd3_transformer():
    student, start = cut("thin-75", sd3())
    assert student.config.num_attention_heads == 3
    assert student.config.caption_projection_dim == 24
    assert start.share == 1.0
    assert output(student).isfinite().all()


def test_half_as_deep_is_the_teacher_without_every_other_block():
    teacher = dit()
    student, start = cut("shallow-50", teacher)
    del teacher.transformer_blocks[3], teacher.transformer_blocks[1]
    assert torch.equal(output(student), output(teacher))
    assert start.share == 1.0


def test_half_as_deep_keeps_the_second_attention_of_the_blocks_that_it_keeps():
    teacher = sd3()
    student, start = cut("shallow-50", teacher)
    assert student.config.dual_attention_layers == (0,)
    del teacher.transformer_blocks[1:3]
    assert torch.equal(output(student), output(teacher))
    assert start.share == 1.0


@pytest.mark.parametrize(
    ("make", "counts"),
    [
        (flux, (2, 1)),
        (pixart, (2, None)),
        (sana, (2, None)),
        (lumina, (2, None)),
        (wan, (2, None)),
    ],
)
def test_other_transformers_half_as_deep(make, counts):
    teacher = make()
    student, start = cut("shallow-50", teacher)
    config = student.config
    assert (config.num_layers, config.get("num_single_layers")) == counts
    assert start.share == 1.0
    assert (start.sliced, start.random) == ((), ())


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        (
            "bk-base",
            dit,
            "bk-base: this preset is cut from UNet2DModel or UNet2DCondition",
        ),
        ("bk-base", lambda: unet(layers_per_block=1), "one residual block each already"),
        (
            "bk-tiny",
            lambda: unet(
                block_out_channels=(8,),
                down_block_types=("DownBlock2D",),
                up_block_types=("UpBlock2D",),
            ),
            "the teacher has a single stage, and the innermost one is to be removed",
        ),
        ("thin-50", flux, "SD3Transformer2DModel; the teacher's network is a FluxTransformer2D"),
        ("thin-75", lambda: dit(num_attention_heads=1), "one head or one group each already"),
        (
            "shallow-50",
            unet,
            "num_layers in its config, .*; the teacher's network is a UNet2D",
        ),
        ("shallow-50", lambda: dit(num_layers=1), "a single block"),
        ("thin-25", lambda: dit(attention_head_dim=2), "DiTTransformer2DModel refuses"),
    ],
)
def test_teacher_that_cannot_be_cut_is_refused(name, make, message):
    with pytest.raises(UsageError, match=message):
        cut(name, make())


@pytest.mark.parametrize("name", CUT)
def test_without_a_teacher_there_is_nothing_to_cut(name):
    with pytest.raises(UsageError, match=f"{name}: this teacher has no network that"):
        build_network(name, Interface((1, 8, 8), 1))


def test_listing_shows_them_and_why_one_does_not_fit(monkeypatch):
    few = {name: PRESETS[name] for name in ("thin-50", "bk-small", "shallow-50")}
    monkeypatch.setattr("dkdm.checks.student_table.PRESETS", few)
    rows = {row.name: row for row in list_students(denoiser(levels=2))}
    assert rows["shallow-50"].misfit.startswith("only a diffusers transformer, with num_layers")
    assert rows["thin-50"].parameter_ratio < rows["bk-small"].parameter_ratio < 1


def test_evenly_spaced_positions_have_the_first_and_the_last():
    assert evenly(3, 5) == [0, 2, 4]
    assert evenly(12, 24)[0] == 0
    assert evenly(12, 24)[-1] == 23
    assert evenly(1, 4) == [0]
    assert all(0.5 < b - a < 3.5 for a, b in zip(evenly(7, 16), evenly(7, 16)[1:], strict=False))
    assert evenly(7, 13) == [0, 2, 4, 6, 8, 10, 12]


def test_stages_correspond_from_the_outside_in():
    own = ["down_blocks.0.a", "down_blocks.1.a", "up_blocks.0.a", "up_blocks.1.a", "extra.a"]
    theirs = [f"{way}_blocks.{i}.a" for way in ("down", "up") for i in range(3)]
    assert counterparts(own, theirs) == {
        "down_blocks.0.a": "down_blocks.0.a",
        "down_blocks.1.a": "down_blocks.1.a",
        "up_blocks.0.a": "up_blocks.1.a",
        "up_blocks.1.a": "up_blocks.2.a",
    }
