"""One-file checkpoints: told by their keys, read by diffusers where configs are at hand."""

import json
import shutil

import diffusers
import pytest
import torch
import yaml
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file

import pipelines
from dkdm import UsageError, load_teacher
from dkdm.cli import main
from dkdm.models import LoadOptions
from dkdm.networks.adm import AdmUNet
from formula_weights import state_of
from original_files import latent as ldm

UNET = "model.diffusion_model"
CLIP = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"
TO_K = f"{UNET}.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
CODER = {"first_stage_model.encoder.conv_in.weight": (8, 3, 3, 3)}


def stable(channels=4, text=768, **more):
    return {f"{UNET}.input_blocks.0.0.weight": (8, channels, 3, 3), TO_K: (8, text), **more}


def sdxl(labels, **more):
    return stable(text=2048, **{f"{UNET}.label_emb.0.0.weight": (8, labels), **more})


FULL = '.from_single_file("model.safetensors").save_pretrained("FOLDER")'
FLUX = {"double_blocks.0.img_attn.qkv.weight": (4, 4), "img_in.weight": (4, 4)}
SD3 = {"joint_blocks.0.context_block.adaLN_modulation.1.bias": (4,)}
OPEN = "cond_stage_model.model.token_embedding.weight"
XL_TEXT = {
    "conditioner.embedders.0.transformer.text_model.embeddings.token_embedding.weight": (4, 4)
}

# Keys and shapes, and what is said.
FILES = {
    "sd1": (stable(**{CLIP: (4, 768)}, **CODER), f"StableDiffusionPipeline{FULL}"),
    "sd1 unet": (stable(), "unet=UNet2DConditionModel.from_single_file("),
    "sd2": (stable(text=1024, **{OPEN: (4, 4)}), "does not say whether it predicts noise or v"),
    "sdxl": (sdxl(2816, **XL_TEXT), f"StableDiffusionXLPipeline{FULL}"),
    "refiner": (sdxl(2560, **XL_TEXT), "the refiner of SDXL"),
    "inpainting": (stable(9, **{CLIP: (4, 768)}), "takes 9 channels: a model for inpainting"),
    "sd3": (SD3 | {"text_encoders.clip_l.a": (4,)}, f"StableDiffusion3Pipeline{FULL}"),
    "sd3 alone": (SD3, "transformer=SD3Transformer2DModel.from_single_file("),
    "flux schnell": (FLUX, 'FluxPipeline.from_pretrained("black-forest-labs/FLUX.1-schnell", '),
    "flux dev": (FLUX | {"guidance_in.in_layer.weight": (4, 4)}, "FLUX.1-dev"),
    "flux of comfy": ({f"{UNET}.{k}": v for k, v in FLUX.items()}, "a Flux schnell file"),
    "wan": ({"head.modulation": (1, 2, 4)}, "WanTransformer3DModel"),
    "lora": ({"lora_unet_a.lora_down.weight": (4, 4)}, "this file as --lora"),
    "lora of peft": ({"transformer.a.lora_A.weight": (4, 4)}, "this file as --lora"),
    "controlnet": ({"control_model.time_embed.0.weight": (4, 4)}, "a ControlNet"),
    "vae": ({"decoder.conv_in.weight": (4, 4)}, "an autoencoder alone"),
    "vae of a file": (CODER, "an autoencoder alone"),
    "clip": ({"text_model.embeddings.token_embedding.weight": (4, 4)}, "a text encoder alone"),
    "t5": ({"shared.weight": (4, 4)}, "a text encoder alone"),
    "embedding": ({"emb_params": (1, 4)}, "a textual inversion"),
    "diffusers": ({"down_blocks.0.resnets.0.conv1.weight": (4, 4)}, "without its config"),
}


def saved(folder, shapes):
    file = folder / "model.safetensors"
    save_file({key: torch.zeros(shape) for key, shape in shapes.items()}, file)
    return file


@pytest.mark.parametrize("name", FILES)
def test_what_a_file_is_and_what_to_do(tmp_path, capsys, name):
    shapes, said = FILES[name]
    assert main(["inspect", str(saved(tmp_path, shapes))]) == 2
    told = capsys.readouterr().err
    assert said in told
    assert len(told.splitlines()) == 1


def test_weights_beside_their_config(tmp_path):
    pipelines.unet().save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="config.json describes: give that folder"):
        load_teacher(str(tmp_path / "diffusion_pytorch_model.safetensors"))


@pytest.mark.parametrize("suffix", ["ckpt", "safetensors"])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4265380512\n",
            "lfs pull",
        ),
        ("<!DOCTYPE html>\n<html><head><title>Login</title></head></html>", "a web page"),
        ('{"error":"Unauthorized"}', "a web page"),
        ("GGUF\x03\x00\x00\x00", "a GGUF file"),
    ],
    ids=["lfs", "html", "json", "gguf"],
)
def test_files_that_only_have_the_name(tmp_path, suffix, content, said):
    file = tmp_path / f"model.{suffix}"
    file.write_text(content)
    with pytest.raises(UsageError, match=said):
        load_teacher(str(file))


@pytest.mark.parametrize("part", ["unet", "vqvae"])
def test_a_folder_that_was_cloned_without_git_lfs(tmp_path, part):
    pipelines.ldm_kl().save_pretrained(tmp_path)
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 335\n"
    (tmp_path / part / "diffusion_pytorch_model.safetensors").write_text(pointer)
    with pytest.raises(UsageError, match="run git lfs pull in its folder"):
        load_teacher(str(tmp_path))


# --- read by from_single_file ---------------------------------------------------------------------


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DKDM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def stable_diffusion(tmp_path_factory):
    """A whole file by the original names, and a folder of the same model with other weights."""
    folder = tmp_path_factory.mktemp("single")
    params = ldm.UNET | {"context_dim": 32, "transformer_depth": 1, "num_head_channels": 16}
    params |= {"attention_resolutions": (1, 2), "use_scale_shift_norm": False}
    params.pop("image_size")
    unet = state_of(AdmUNet(**params).state_dict())
    tensors = {f"{UNET}.{key}": value for key, value in unet.items()}
    tensors |= state_of(ldm.coder_shapes("kl"))
    clip = pipelines.clip()
    own = {key.removeprefix("text_model."): value for key, value in clip.state_dict().items()}
    tensors |= {f"cond_stage_model.transformer.text_model.{k}": v for k, v in own.items()}
    save_file(
        {key: value.contiguous() for key, value in tensors.items()}, folder / "sd.safetensors"
    )
    network = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=(2, 4),
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
    )
    pipeline = pipelines.stable_diffusion(network=network)
    pipeline.vae = AutoencoderKL(
        block_out_channels=(32, 64),
        layers_per_block=2,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    pipeline.register_modules(vae=pipeline.vae)
    pipeline.save_pretrained(folder / "base")
    return folder


def test_a_whole_file_with_the_configs_of_a_folder(stable_diffusion, cache):
    file, base = stable_diffusion / "sd.safetensors", stable_diffusion / "base"
    teacher = load_teacher(str(file), options=LoadOptions(config=base))
    stock = diffusers.StableDiffusionPipeline.from_single_file(
        str(file), config=str(base), local_files_only=True
    )
    for key, value in stock.unet.state_dict().items():
        assert torch.equal(teacher.network.state_dict()[key], value)
    assert teacher.process.num_levels == stock.scheduler.config.num_train_timesteps
    (folder,) = (cache / "single-files").iterdir()
    kept = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    for name in ("vae", "text_encoder"):
        for key, value in getattr(stock, name).state_dict().items():
            assert torch.equal(getattr(kept, name).state_dict()[key], value)
    load_teacher(str(file), options=LoadOptions(config=base))
    assert list((cache / "single-files").iterdir()) == [folder]


def test_configs_of_another_model_and_of_another_place(stable_diffusion, tmp_path):
    file = stable_diffusion / "sd.safetensors"
    pipelines.stable_diffusion().save_pretrained(tmp_path / "other")
    with pytest.raises(UsageError, match="cannot be loaded with --teacher-config .* a folder, in"):
        load_teacher(str(file), options=LoadOptions(config=tmp_path / "other"))
    yaml_file = tmp_path / "v1-inference.yaml"
    yaml_file.write_text(yaml.safe_dump({"model": {"params": {}}}))
    with pytest.raises(UsageError, match=r'from_single_file\("sd.safetensors", original_config="'):
        load_teacher(str(file), options=LoadOptions(config=yaml_file))


def test_classes_of_other_libraries_are_not_imported(stable_diffusion, tmp_path, monkeypatch):
    shutil.copytree(stable_diffusion / "base", tmp_path / "base")
    index = tmp_path / "base" / "model_index.json"
    values = json.loads(index.read_text()) | {"feature_extractor": ["antigravity", "Net"]}
    index.write_text(json.dumps(values))
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "antigravity.py").write_text("raise SystemExit('imported')")
    with pytest.raises(UsageError, match="feature_extractor is"):
        load_teacher(
            str(stable_diffusion / "sd.safetensors"), options=LoadOptions(config=tmp_path / "base")
        )


def linear(name, given, taken):
    return {f"{name}.weight": (given, taken), f"{name}.bias": (given,)}


def joint_block(index, width, last):
    """A block of the original SD3; the last has no text on its way out."""
    tensors = {}
    for half, ends in (("x_block", False), ("context_block", last)):
        stem = f"joint_blocks.{index}.{half}"
        tensors |= linear(f"{stem}.attn.qkv", 3 * width, width)
        tensors |= linear(f"{stem}.adaLN_modulation.1", (2 if ends else 6) * width, width)
        if not ends:
            tensors |= linear(f"{stem}.attn.proj", width, width)
            tensors |= linear(f"{stem}.mlp.fc1", 4 * width, width)
            tensors |= linear(f"{stem}.mlp.fc2", width, 4 * width)
    return tensors


def test_a_transformer_alone_goes_into_the_folder_of_its_model(tmp_path):
    pipelines.sd3(True).save_pretrained(tmp_path / "base")
    width, text, pooled = 32, 96, 64
    shapes = {"pos_embed": (1, 64, width), "x_embedder.proj.weight": (width, 4, 2, 2)}
    shapes |= {"x_embedder.proj.bias": (width,), **linear("final_layer.linear", 16, width)}
    shapes |= linear("final_layer.adaLN_modulation.1", 2 * width, width)
    shapes |= linear("context_embedder", width, text)
    shapes |= linear("t_embedder.mlp.0", width, 256) | linear("t_embedder.mlp.2", width, width)
    shapes |= linear("y_embedder.mlp.0", width, pooled) | linear("y_embedder.mlp.2", width, width)
    shapes |= joint_block(0, width, False) | joint_block(1, width, True)
    file = tmp_path / "sd3.safetensors"
    save_file({f"{UNET}.{key}": torch.randn(shape) for key, shape in shapes.items()}, file)
    with pytest.raises(UsageError, match=r"transformer=SD3Transformer2DModel\.from_single_file"):
        load_teacher(str(file))
    options = LoadOptions(config=tmp_path / "base")
    teacher = load_teacher(str(file), options=options)
    stock = diffusers.SD3Transformer2DModel.from_single_file(
        str(file), config=str(tmp_path / "base"), subfolder="transformer", local_files_only=True
    )
    base = load_teacher(str(tmp_path / "base"))
    torch.testing.assert_close(teacher.network.state_dict(), stock.state_dict())
    assert teacher.process.scheduler == base.process.scheduler
    assert teacher.bundle.autoencoder.standard() == base.bundle.autoencoder.standard()
    network = base.network.state_dict()
    assert not torch.equal(teacher.network.proj_out.weight, network["proj_out.weight"])
