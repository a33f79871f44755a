"""What a folder's configs ask for beyond a plain network: a null class, a package, embeddings."""

import json

import pytest
import torch
from diffusers import (
    DDPMPipeline,
    DDPMScheduler,
    FluxTransformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
)

import dkdm
import dkdm.conditioning
from dkdm.calls import CALLS
from dkdm.denoiser import Batch
from dkdm.errors import UsageError
from dkdm.export import write_pipeline
from dkdm.teachers import LoadOptions

SMALL = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "layers_per_block": 1,
    "block_out_channels": (8, 8),
    "norm_num_groups": 4,
    "down_block_types": ("DownBlock2D",) * 2,
    "up_block_types": ("UpBlock2D",) * 2,
}


def folder_of(folder, network):
    DDPMPipeline(network, DDPMScheduler()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def eleven(tmp_path_factory):
    return folder_of(tmp_path_factory.mktemp("eleven"), UNet2DModel(**SMALL, num_class_embeds=11))


@pytest.mark.parametrize("null", [10, 3])
def test_the_null_class_is_named_and_not_drawn(eleven, tmp_path, null):
    teacher = dkdm.load_teacher(str(eleven), options=LoadOptions(null_class=null))
    drawn = teacher.conditioning.draw(500, torch.Generator().manual_seed(0))["class_labels"]
    assert set(drawn.tolist()) == set(range(11)) - {null}
    assert teacher.conditioning.null(2)["class_labels"].tolist() == [null, null]
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([5, 900])
    cond = teacher.conditioning.of([1, 2])
    guided = teacher.predict(Batch(x, t, cond, t), 3.0).output
    with torch.no_grad():
        c, u = (
            teacher.network(x, t, class_labels=torch.tensor(ids)).sample
            for ids in ([1, 2], [null, null])
        )
    torch.testing.assert_close(guided, u + 3 * (c - u))
    write_pipeline(tmp_path, teacher)
    assert dkdm.load_teacher(str(tmp_path)).conditioning == teacher.conditioning


@pytest.mark.parametrize("null", [-1, 11])
def test_a_null_class_that_is_not_embedded_is_refused(eleven, null):
    with pytest.raises(UsageError, match=r"expected an id that the network embeds, 0\.\.10"):
        dkdm.load_teacher(str(eleven), options=LoadOptions(null_class=null))


def test_a_guided_run_without_one_names_the_option(eleven):
    with pytest.raises(UsageError, match="--teacher-null-class 10"):
        dkdm.load_teacher(str(eleven)).conditioning.null(1)


def test_none_says_that_there_is_no_null_class(eleven):
    conditioning = dkdm.load_teacher(str(eleven), options=LoadOptions(null_class=10)).conditioning
    assert dkdm.conditioning.with_null_class(conditioning, "none").null_class is None
    with pytest.raises(UsageError, match="has no classes"):
        dkdm.conditioning.with_null_class(dkdm.conditioning.Unconditional(), 3)


@pytest.mark.parametrize(
    ("asks", "message"),
    [
        ({"quant_method": "bitsandbytes"}, "bitsandbytes"),
        ({"quant_method": "absent_one"}, "with absent_one, which is not installed"),
        ({"quant_method": 3}, "which is unknown"),
        ({"load_in_4bit": True}, "bitsandbytes"),
    ],
)
def test_quantized_components_say_what_they_need(tmp_path, asks, message):
    file = folder_of(tmp_path, UNet2DModel(**SMALL)) / "unet" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": asks}))
    with pytest.raises(UsageError, match=message) as caught:
        dkdm.load_teacher(str(tmp_path))
    assert "plain weights" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (lambda: UNet2DModel(**SMALL, class_embed_type="timestep"), "'timestep' takes continuous"),
        (lambda: UNet2DModel(**SMALL, class_embed_type="identity"), "'identity' takes continuous"),
        (
            lambda: UNet2DConditionModel(**SMALL, num_class_embeds=5, cross_attention_dim=16),
            "with cross-attention is conditioned on text, but",
        ),
    ],
    ids=["timestep", "identity", "cross-attention"],
)
def test_other_embeddings_are_refused_by_the_config(tmp_path, network, message):
    with pytest.raises(UsageError, match=message) as caught:
        dkdm.load_teacher(str(folder_of(tmp_path, network())))
    assert "module:factory" in str(caught.value)


def test_a_conditional_unet_by_classes_alone_is_read(tmp_path):
    network = UNet2DConditionModel(**SMALL, num_class_embeds=5, mid_block_type=None)
    teacher = dkdm.load_teacher(str(folder_of(tmp_path, network)))
    assert teacher.conditioning.num_classes == 5


class Recorder(torch.nn.Module):
    """Keeps the time that it was fed; its weights are bfloat16."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))

    def forward(self, x=None, time=None, *_, hidden_states=None, timestep=None, **__):
        self.time = time if timestep is None else timestep
        return x if hidden_states is None else hidden_states


SCALES = {"FluxTransformer2DModel": 1e-3, "Lumina2Transformer2DModel": None}


@pytest.mark.parametrize("name", sorted(CALLS))
def test_every_call_feeds_times_in_float32(name):
    network, x = Recorder(), torch.zeros(1, 4, 4, 4, dtype=torch.bfloat16)
    rows = {"encoder_hidden_states": torch.zeros(1, 3, 4, dtype=torch.bfloat16)}
    rows |= {"encoder_attention_mask": torch.ones(1, 3), "pooled_projections": torch.zeros(1, 4)}
    time = torch.tensor([978.26])
    CALLS[name](network, x, time, rows)
    scale = SCALES.get(name, 1.0)
    expected = 1 - time / 1000 if scale is None else time * scale
    assert network.time.dtype == torch.float32
    torch.testing.assert_close(network.time, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("guided", [False, True])
def test_flux_embeds_its_time_exactly_in_bfloat16(guided):
    network = FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=0,
        attention_head_dim=16,
        num_attention_heads=1,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        guidance_embeds=guided,
        axes_dims_rope=(4, 6, 6),
    ).bfloat16()
    seen = []
    network.time_text_embed.time_proj.register_forward_hook(
        lambda _, args, __: seen.append(args[0])
    )
    x = torch.randn(1, 1, 4, 4).bfloat16()
    cond = {"encoder_hidden_states": torch.randn(1, 3, 8).bfloat16()}
    cond["pooled_projections"] = torch.randn(1, 8).bfloat16()
    if guided:
        cond["guidance"] = torch.tensor([3.5]).bfloat16()
    with torch.no_grad():
        output = CALLS["FluxTransformer2DModel"](network, x, torch.tensor([978.26]), cond)
    assert output.shape == x.shape
    assert not network.time_text_embed._forward_pre_hooks
    assert seen[0].dtype == torch.float32
    assert [float(v) for v in seen] == pytest.approx([978.26, 3500.0][: 1 + guided])
