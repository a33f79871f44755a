"""What a folder's configs ask for beyond a plain network: a null class, a package, embeddings."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from diffusers import (
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    FluxTransformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
)

import dkdm
import dkdm.core.denoisers.conditioning
import pipelines
import small_runs
from dkdm.core.denoisers.calls import CALLS
from dkdm.core.denoisers.denoiser import Batch
from dkdm.errors import UsageError
from dkdm.models import LoadOptions, sketch_teacher, with_texts
from dkdm.shipping.pipeline_folder import write_pipeline
from dkdm.students import as_denoiser

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
    with pytest.raises(UsageError, match=r"give an id that the network embeds, 0\.\.10"):
        dkdm.load_teacher(str(eleven), options=LoadOptions(null_class=null))


def test_a_guided_run_without_one_names_the_option(eleven):
    with pytest.raises(UsageError, match="--teacher-null-class 10"):
        dkdm.load_teacher(str(eleven)).conditioning.null(1)


def test_none_says_that_there_is_no_null_class(eleven):
    conditioning = dkdm.load_teacher(str(eleven), options=LoadOptions(null_class=10)).conditioning
    assert dkdm.core.denoisers.conditioning.with_null_class(conditioning, "none").null_class is None
    with pytest.raises(UsageError, match="has no classes"):
        dkdm.core.denoisers.conditioning.with_null_class(
            dkdm.core.denoisers.conditioning.Unconditional(), 3
        )


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
            "UNet2DConditionModel is conditioned on text, but",
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


SMALL_FLUX = {
    "in_channels": 4,
    "num_layers": 1,
    "num_single_layers": 0,
    "attention_head_dim": 16,
    "num_attention_heads": 1,
    "joint_attention_dim": 8,
    "pooled_projection_dim": 8,
    "axes_dims_rope": (4, 6, 6),
}


def recorded(network):
    """What a Flux network embeds, as it comes."""
    seen = []
    network.time_text_embed.time_proj.register_forward_hook(
        lambda _, args, __: seen.append(args[0])
    )
    return seen


@pytest.mark.parametrize("guided", [False, True])
def test_flux_embeds_its_time_exactly_in_bfloat16(guided):
    network = FluxTransformer2DModel(**SMALL_FLUX, guidance_embeds=guided).bfloat16()
    seen = recorded(network)
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


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"boundary_ratio": 0.875}, r"two denoisers, .*\(boundary_ratio in"),
        ({"transformer_2": ["diffusers", "WanTransformer3DModel"]}, r"\(transformer_2 in"),
        ({"expand_timesteps": True}, "a time for each token"),
    ],
    ids=["boundary", "second", "tokens"],
)
def test_wan_with_other_times_is_refused(tmp_path, entry, message):
    pipelines.wan().save_pretrained(tmp_path)
    pipelines.edit(tmp_path / "model_index.json", **entry)
    with pytest.raises(UsageError, match=message) as caught:
        dkdm.load_teacher(str(tmp_path), options=LoadOptions(sample_size=(2, 2, 2)))
    assert "module:factory" in str(caught.value)


@pytest.fixture(scope="module")
def stable(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stable")
    pipelines.stable_diffusion().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"time_cond_proj_dim": 16}, "an embedding of the guidance scale"),
        ({"encoder_hid_dim_type": "image_proj"}, "embeddings of images"),
        ({"encoder_hid_dim_type": "text_image_proj"}, "embeddings of images"),
        ({"addition_embed_type": "image"}, "embeddings of images"),
        ({"addition_embed_type": "image_hint"}, "embeddings of images"),
        ({"addition_embed_type": "text_image"}, "embeddings of images"),
        ({"addition_embed_type": "text_time"}, "text_encoder_2"),
    ],
)
def test_inputs_that_nothing_in_the_folder_gives(stable, changes, message):
    file = stable / "unet" / "config.json"
    text = file.read_text()
    pipelines.edit(file, **changes)
    try:
        for load in (dkdm.load_teacher, sketch):
            with pytest.raises(UsageError, match=message):
                load(str(stable))
    finally:
        file.write_text(text)


def sketch(folder):
    return sketch_teacher(folder, LoadOptions())


@pytest.mark.parametrize(
    "config",
    [
        {"encoder_hid_dim": 32, "cross_attention_dim": 16},
        {"addition_embed_type": "text", "addition_embed_type_num_heads": 4},
        {"resnet_time_scale_shift": "scale_shift"},
    ],
    ids=["text_proj", "text", "scale_shift"],
)
def test_inputs_that_the_prompt_gives(tmp_path, config):
    network = pipelines.text_unet(**config)
    pipelines.stable_diffusion(network=network).save_pretrained(tmp_path)
    sketch(str(tmp_path)).check()
    teacher = with_texts(dkdm.load_teacher(str(tmp_path)), "a red cat")
    x, t = torch.randn(1, 4, 8, 8), torch.tensor([7])
    found = teacher.predict(Batch(x, t, teacher.conditioning.of(["a red cat"]), t)).output
    text = teacher.conditioning.encoders.encode(["a red cat"])["encoder_hidden_states"]
    with torch.no_grad():
        torch.testing.assert_close(found, network(x, t, text).sample)


def test_a_table_of_times_takes_whole_numbers(tmp_path):
    network = UNet2DModel(**SMALL, time_embedding_type="learned", num_train_timesteps=1000)
    teacher = dkdm.load_teacher(str(folder_of(tmp_path, network)))
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([5, 900])
    with torch.no_grad():
        expected = network.eval()(x, t).sample
    torch.testing.assert_close(teacher.predict(Batch(x, t, {}, t)).output, expected)
    with pytest.raises(UsageError, match="times are 0, 1, 2"):
        dkdm.core.denoisers.calls.unet(network, x, torch.tensor([5.0, 900.5]), {})


def test_a_control_network_of_flux_is_fed_a_picture(tmp_path):
    pipelines.flux().save_pretrained(tmp_path)
    pipelines.edit(tmp_path / "transformer" / "config.json", in_channels=32, out_channels=16)
    with pytest.raises(UsageError, match="is fed an image too"):
        dkdm.load_teacher(str(tmp_path), options=LoadOptions(sample_size=(8, 8)))


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # of layer norms
@pytest.mark.parametrize("low", ["weights", "autocast"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_guidance_and_times_are_embedded_in_float32(low, wrapped):
    network = FluxTransformer2DModel(**SMALL_FLUX, guidance_embeds=True).eval()
    seen = recorded(network)
    network = network.bfloat16() if low == "weights" else network
    called = torch.nn.DataParallel(network) if wrapped else network
    process = dkdm.rectified_flow(1000, shift=3.0)
    student = dkdm.Denoiser(
        called,
        process,
        dkdm.Parameterization("flow_prediction"),
        (1, 4, 4),
        constants={"encoder_hidden_states": torch.randn(3, 8), "pooled_projections": torch.ones(8)},
        call=CALLS["FluxTransformer2DModel"],
    )
    t = torch.tensor([937])
    with torch.autocast("cpu", torch.bfloat16, enabled=low == "autocast"), torch.no_grad():
        student.predict(Batch(torch.randn(1, 1, 4, 4), t, {}, t), 4.37)
    assert [v.dtype for v in seen] == [torch.float32] * 2
    time = float(process.network_time[937])  # 978.26
    assert [float(v) for v in seen] == pytest.approx([time, 4370.0], rel=1e-6)


def test_a_shipped_pipeline_of_flux_embeds_them_in_float32_too(tmp_path):
    pipelines.sd3(True).save_pretrained(tmp_path / "teacher")
    teacher = with_texts(dkdm.load_teacher(str(tmp_path / "teacher")), "a red cat")
    widths = {"in_channels": 16, "joint_attention_dim": 96, "pooled_projection_dim": 64}
    network = FluxTransformer2DModel(**{**SMALL_FLUX, **widths}, guidance_embeds=True)
    write_pipeline(tmp_path / "out", as_denoiser("flux", network, teacher))
    pipeline = DiffusionPipeline.from_pretrained(
        tmp_path / "out", trust_remote_code=True, dtype=torch.bfloat16
    )
    pipeline.set_progress_bar_config(disable=True)
    seen = recorded(pipeline.transformer)
    pipeline("a red cat", num_inference_steps=3, guidance_scale=4.37, output_type="latent")
    times, guidance = seen[::2], seen[1::2]
    assert all(v.dtype == torch.float32 for v in seen)
    torch.testing.assert_close(torch.cat(times), pipeline.scheduler.timesteps)
    assert [float(v) for v in guidance] == pytest.approx([4370.0] * 3, rel=1e-6)
    assert not pipeline.transformer.time_text_embed._forward_pre_hooks


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
def test_a_run_in_mixed_precision_feeds_exact_times(tmp_path):
    """Teacher and student: every time that reaches a network is one of the flow's, in float32."""
    flow, seen = dkdm.rectified_flow(1000, shift=3.0), []

    class Watched(UNet2DModel):
        def forward(self, x, time, **options):
            seen.append((self.training, time))
            return super().forward(x, time, **options)

    parameterization = dkdm.Parameterization("flow_prediction")
    make = partial(dkdm.Denoiser, process=flow, parameterization=parameterization)
    teacher = make(Watched(**SMALL).eval(), sample_shape=(1, 8, 8))
    student = make(Watched(**SMALL), sample_shape=(1, 8, 8))
    config = replace(small_runs.SMALL, output_dir=tmp_path / "run", mixed_precision="bf16")
    dkdm.distill(teacher, student, config)
    assert {training for training, _ in seen} == {True, False}
    exact = set(flow.network_time.float().tolist())
    for _, time in seen:
        assert time.dtype == torch.float32
        assert set(time.tolist()) <= exact
