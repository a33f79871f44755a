"""Networks that lie alone, as the checkpoints of diffusers' training scripts do."""

import json
import re

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from diffusers.training_utils import EMAModel
from safetensors.torch import save_file

import pipelines
from dkdm import ClassLabels, DkdmError, UsageError, load_teacher
from dkdm.cli import main
from dkdm.core.denoisers.denoiser import Batch
from dkdm.models import LoadOptions

SCHEDULER = {"num_train_timesteps": 50, "beta_schedule": "squaredcos_cap_v2"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A training script's output folder: a checkpoint of a network and of its average."""
    folder = tmp_path_factory.mktemp("ddpm-model-64")
    network = pipelines.unet(num_class_embeds=5)
    ema = EMAModel(
        network.parameters(), decay=0.99, model_cls=type(network), model_config=network.config
    )
    network.save_pretrained(folder / "checkpoint-500" / "unet")
    with torch.no_grad():
        for value in ema.shadow_params:
            value.add_(0.1)
    ema.save_pretrained(folder / "checkpoint-500" / "unet_ema")
    DDPMScheduler(**SCHEDULER).save_pretrained(folder / "noise")
    DDPMPipeline(network, DDPMScheduler(**SCHEDULER)).save_pretrained(folder / "pipeline")
    return folder


def refused(path, kind=UsageError, **options):
    with pytest.raises(kind) as caught:
        load_teacher(str(path), options=LoadOptions(**options))
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def test_an_average_keeps_its_settings_in_the_config(run):
    config = json.loads((run / "checkpoint-500" / "unet_ema" / "config.json").read_text())
    assert config["decay"] == 0.99
    assert "optimization_step" in config


@pytest.mark.parametrize("place", ["noise", "noise/scheduler_config.json", "pipeline"])
def test_an_averaged_network_with_its_scheduler(run, place):
    path = run / "checkpoint-500" / "unet_ema"
    teacher = load_teacher(str(path), options=LoadOptions(scheduler=run / place))
    pipeline = load_teacher(str(run / "pipeline"))
    assert torch.equal(teacher.process.alpha, pipeline.process.alpha)
    assert teacher.process.clipping == pipeline.process.clipping
    assert teacher.parameterization == pipeline.parameterization
    assert teacher.sample_shape == pipeline.sample_shape
    assert teacher.conditioning == pipeline.conditioning == ClassLabels(5)
    average, plain = teacher.network.state_dict(), pipeline.network.state_dict()
    for key, value in plain.items():
        torch.testing.assert_close(average[key], value + 0.1)
    t = torch.tensor([3, 49])
    cond = {"class_labels": torch.tensor([1, 4])}
    x = torch.randn(2, *teacher.sample_shape)
    expected = teacher.network(x, t, **cond).sample
    torch.testing.assert_close(teacher.predict(Batch(x, t, cond, t)).output, expected)


@pytest.mark.parametrize(
    ("name", "levels"), [("ddpm-linear", 1000), ("ddpm-cosine", 1000), ("flow", 1000)]
)
def test_schedulers_by_name(run, name, levels):
    path = run / "checkpoint-500" / "unet"
    teacher = load_teacher(str(path), options=LoadOptions(scheduler=name))
    assert teacher.process.num_levels == levels
    if name != "flow":
        assert teacher.process.clipping is not None


def test_commands_take_it(run, capsys):
    path, scheduler = run / "checkpoint-500" / "unet", run / "noise"
    flags = ("--steps", "2", "--num-samples", "2", "--json")
    main(["inspect", str(path), "--scheduler", str(scheduler), *flags])
    assert json.loads(capsys.readouterr().out)
    assert main(["inspect", str(path), *flags]) == 2
    assert "give --scheduler with" in capsys.readouterr().err


def test_what_is_missing_is_named(run, tmp_path):
    checkpoint = run / "checkpoint-500"
    assert "does not say how noise is added" in refused(checkpoint / "unet_ema")
    assert "give one network of it" in refused(checkpoint)
    assert f"{checkpoint / 'unet_ema'} (there is unet too)" in refused(checkpoint)
    assert f"give the pipeline's folder, {run / 'pipeline'}" in refused(run / "pipeline" / "unet")
    assert "has a scheduler: remove this option" in refused(
        run / "pipeline", scheduler="ddpm-linear"
    )
    assert "give a diffusers pipeline folder" in refused(tmp_path)
    message = refused(checkpoint / "unet", scheduler=tmp_path)
    assert "is not a file: give a scheduler_config.json or a folder with one" in message
    assert "ddpm-lin" in refused(checkpoint / "unet", scheduler="ddpm-lin")
    (tmp_path / "a.safetensors").touch()
    message = refused(checkpoint / "unet", scheduler="flow", lora=(tmp_path / "a.safetensors",))
    assert "remove this option" in message


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_state_of_accelerate(tmp_path, name):
    (tmp_path / name).touch()
    message = refused(tmp_path)
    assert f"{name} without a config.json, as accelerate saves a run" in message


def test_networks_that_cannot_be_read_alone(tmp_path):
    pipelines.text_unet().save_pretrained(tmp_path / "unet")
    assert "text" in refused(tmp_path / "unet", scheduler="ddpm-linear")
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "CLIPTextModel"}))
    assert "CLIPTextModel" in refused(tmp_path, scheduler="ddpm-linear")
    pipelines.unet().save_pretrained(tmp_path / "damaged")
    save_file({"a": torch.ones(1)}, tmp_path / "damaged" / "diffusion_pytorch_model.safetensors")
    assert refused(tmp_path / "damaged", DkdmError, scheduler="ddpm-linear")


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("vae", r"an autoencoder \(AutoencoderKL\) and no denoiser"),
        ("text_encoder", "a model of transformers, such as a text encoder, and no denoiser"),
        ("tokenizer", "a tokenizer alone"),
        ("scheduler", "a scheduler alone"),
        ("unet", "UNet2DConditionModel is conditioned on text: give the pipeline folder"),
    ],
)
def test_other_parts_alone_are_named(tmp_path, part, message):
    pipelines.stable_diffusion().save_pretrained(tmp_path / "whole")
    (tmp_path / "whole" / part).rename(tmp_path / part)
    assert re.search(message, refused(tmp_path / part))
    (tmp_path / part).rename(tmp_path / "whole" / part)
    assert f"give the pipeline's folder, {tmp_path / 'whole'}" in refused(tmp_path / "whole" / part)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("adapter_config.json", "an adapter of peft .*merge_and_unload"),
        ("pytorch_lora_weights.safetensors", "a LoRA .* this folder as --teacher-lora"),
    ],
)
def test_a_folder_of_a_lora(tmp_path, name, message):
    (tmp_path / name).write_text("{}")
    assert re.search(message, refused(tmp_path))
