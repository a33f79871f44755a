"""What a folder says is what the stock pipeline object holds after loading it.

Folders are saved by diffusers, and every key that has a default is taken out of their configs, as
older versions of diffusers did not write it.
"""

import inspect
import json
import shutil
from functools import partial
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DiffusionPipeline, PNDMScheduler
from safetensors.torch import load_file, save_file

import pipelines
from dkdm import DkdmError, UsageError, load_teacher
from dkdm.core.denoisers.conditioning import Unconditional
from dkdm.core.denoisers.denoiser import Batch
from dkdm.models import LoadOptions
from dkdm.models.effective import _CORRECTIONS, class_config, effective_config, pipeline_entries
from dkdm.shipping.pipeline_folder import write_pipeline
from pipelines import PARTS, edit, plain, strip

BUILDERS = {
    "ddpm": pipelines.ddpm,
    "ddim": pipelines.ddim,
    "classes": pipelines.class_conditional,
    "edm": pipelines.edm,
    "ldm-vq": pipelines.ldm_vq,
    "ldm-kl": pipelines.ldm_kl,
    "dit": pipelines.dit,
    "stable-diffusion": pipelines.stable_diffusion,
    "stable-diffusion-v": pipelines.stable_diffusion_v,
    "sdxl": pipelines.sdxl,
    "pixart": pipelines.pixart,
    "pixart-sigma": pipelines.pixart_sigma,
    "sd3": partial(pipelines.sd3, True),
    "flux": pipelines.flux,
    "sana": pipelines.sana,
    "lumina": pipelines.lumina,
    "wan": pipelines.wan,
    "dance": pipelines.dance,
}
SIZES = {"flux": (8, 8), "wan": (2, 2, 2)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Saved pipelines by name, each made once."""
    root, known = tmp_path_factory.mktemp("folders"), {}

    def folder(name):
        if name not in known:
            torch.manual_seed(0)
            known[name] = root / name
            BUILDERS[name]().save_pretrained(known[name])
        return known[name]

    return folder


@pytest.fixture
def copied(folders, tmp_path):
    return lambda name: Path(shutil.copytree(folders(name), tmp_path / name))


def public(config):
    return {k: v for k, v in plain(dict(config)).items() if not k.startswith("_")}


def stock(folder):
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def assert_same(folder, pipeline):
    """Every component's config and every setting of the index, key by key."""
    index = json.loads((folder / "model_index.json").read_text())
    for name in PARTS:
        if name in index and index[name][0] is not None:
            ours = effective_config(folder, index, name)
            theirs = getattr(pipeline, name).config
            assert public(ours) == public(theirs), name
            assert ours["_class_name"] == type(getattr(pipeline, name)).__name__
    settings = {k: v for k, v in public(pipeline.config).items() if not isinstance(v, list)}
    ours = pipeline_entries(index)
    assert {key: plain(ours[key]) for key in settings} == settings


@pytest.mark.parametrize("name", BUILDERS)
def test_stripped_configs_are_what_the_stock_object_holds(name, copied):
    folder = copied(name)
    strip(folder)
    pipeline = stock(folder)
    assert_same(folder, pipeline)
    teacher = load_teacher(str(folder), options=LoadOptions(sample_size=SIZES.get(name)))
    network = getattr(pipeline, "unet", None) or pipeline.transformer
    weights = teacher.network.state_dict()
    assert all(torch.equal(weights[key], value) for key, value in network.state_dict().items())
    coder = getattr(pipeline, "vae", None) or getattr(pipeline, "vqvae", None)
    if coder is None:
        return
    shift, scale = (torch.tensor(v) for v in teacher.bundle.autoencoder.standard())
    latents = torch.randn(1, *teacher.sample_shape)
    shift, scale = (v.view(1, -1, *[1] * (latents.ndim - 2)) for v in (shift, scale))
    if name != "wan":
        assert scale.item() == pytest.approx(coder.config.scaling_factor)
    with torch.no_grad():
        expected = coder.decode(latents / scale + shift).sample
    torch.testing.assert_close(teacher.to_pixels(latents), expected)


def test_a_missing_scaling_factor_is_the_class_default(copied):
    folder = copied("ldm-kl")
    edit(folder / "vqvae" / "config.json", ["scaling_factor", "shift_factor"])
    teacher, pipeline = load_teacher(str(folder)), stock(folder)
    assert teacher.bundle.autoencoder.standard() == ([0.0], [0.18215])
    x = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        expected = pipeline.vqvae.decode(x / pipeline.vqvae.config.scaling_factor).sample
    torch.testing.assert_close(teacher.to_pixels(x), expected)


def test_factors_that_a_pipeline_does_not_read_are_not_applied(copied):
    folder = copied("stable-diffusion")
    edit(folder / "vae" / "config.json", shift_factor=0.5, latents_mean=[1.0] * 4)
    assert load_teacher(str(folder)).bundle.autoencoder.standard() == ([0.0], [0.18215])


@pytest.mark.filterwarnings("ignore:.*configuration file:FutureWarning")
@pytest.mark.parametrize("kind", ["StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline"])
def test_old_stable_diffusion_is_corrected_as_by_its_constructor(copied, kind):
    folder = copied("stable-diffusion-v")
    edit(folder / "model_index.json", _class_name=kind)
    edit(folder / "scheduler" / "scheduler_config.json", ["clip_sample", "steps_offset"])
    edit(folder / "unet" / "config.json", _diffusers_version="0.6.0")
    assert_same(folder, getattr(diffusers, kind).from_pretrained(folder))
    teacher = load_teacher(str(folder))
    assert teacher.sample_shape == (4, 64, 64)
    assert teacher.process.clipping.range is None
    assert teacher.process.steps_offset == 1
    assert teacher.bundle.pipeline == "StableDiffusionPipeline"


def test_every_pipeline_that_corrects_configs_is_known():
    """Those that dkdm may be given; of the others the components are refused."""
    others = ("AltDiffusion", "Onnx")
    names = [n for n in dir(diffusers) if "Pipeline" in n and not n.startswith(others)]
    correcting = set()
    for name in names:
        if not name.startswith(("StableDiffusion", "LEditsPP", "CycleDiffusion")):
            continue
        source = inspect.getsource(getattr(diffusers, name).__init__)
        if "FrozenDict" in source:
            correcting.add(name)
    assert correcting == set(_CORRECTIONS["sample_size"])


@pytest.mark.parametrize("saved", [DDPMScheduler, PNDMScheduler])
def test_ddim_pipelines_convert_their_scheduler(tmp_path, saved):
    pipelines.ddim().save_pretrained(tmp_path)
    saved(prediction_type="v_prediction").save_pretrained(tmp_path / "scheduler")
    edit(tmp_path / "model_index.json", scheduler=["diffusers", saved.__name__])
    pipeline = stock(tmp_path)
    assert type(pipeline.scheduler) is DDIMScheduler
    assert_same(tmp_path, pipeline)


def test_a_solver_type_of_another_scheduler_changes_nothing(copied):
    folder = copied("pixart")
    before = load_teacher(str(folder)).process.scheduler
    edit(folder / "scheduler" / "scheduler_config.json", solver_type="bh2")
    assert stock(folder).scheduler.config.solver_type == "midpoint"
    assert load_teacher(str(folder)).process.scheduler == before


@pytest.mark.parametrize("name", ["dit", "pixart"])
def test_networks_by_their_old_name(copied, name):
    folder = copied(name)
    edit(folder / "model_index.json", transformer=["diffusers", "Transformer2DModel"])
    norm = {"dit": "ada_norm_zero", "pixart": "ada_norm_single"}[name]
    file = folder / "transformer" / "config.json"
    edit(file, _class_name="Transformer2DModel", norm_type=norm, use_linear_projection=False)
    assert_same(folder, stock(folder))
    load_teacher(str(folder))


def test_components_in_the_root_folder(tmp_path):
    pipeline = pipelines.ddpm(clip_sample=False)
    pipeline.save_config(tmp_path)
    pipeline.unet.save_pretrained(tmp_path)
    pipeline.scheduler.save_pretrained(tmp_path)
    assert_same(tmp_path, stock(tmp_path))
    teacher = load_teacher(str(tmp_path))
    batch = Batch(torch.randn(1, 3, 8, 8), torch.tensor([7]), {}, torch.tensor([7]))
    with torch.no_grad():
        expected = pipeline.unet(batch.x, 7).sample
    torch.testing.assert_close(teacher.predict(batch).output, expected)


def test_spectrograms_without_an_autoencoder(copied):
    folder = copied("ddpm")
    changes = {"_class_name": "AudioDiffusionPipeline", "mel": ["audio_diffusion", "Mel"]}
    edit(folder / "model_index.json", **changes, vqvae=[None, None])
    teacher = load_teacher(str(folder))
    assert teacher.bundle.autoencoder is None
    assert not teacher.bundle.components


def test_latents_need_their_autoencoder(copied):
    folder = copied("ldm-kl")
    edit(folder / "model_index.json", vqvae=[None, None])
    with pytest.raises(DkdmError, match="no autoencoder"):
        load_teacher(str(folder))


def test_a_pipeline_of_somebody_else_is_read_by_its_components(copied):
    folder = copied("stable-diffusion-v")
    edit(folder / "scheduler" / "scheduler_config.json", clip_sample=True)
    edit(folder / "model_index.json", _class_name="LongPromptPipeline")
    teacher = load_teacher(str(folder))
    assert teacher.bundle.pipeline == "StableDiffusionPipeline"
    assert teacher.process.clipping.range is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"controlnet": ["diffusers", "ControlNetModel"]}, r"controlnet \(ControlNetModel\)"),
        ({"text_encoder": [None, None], "tokenizer": [None, None]}, "lists no text encoder"),
        (
            {"_class_name": "OtherPipeline", "text_encoder": ["transformers", "BertModel"]},
            "how OtherPipeline encodes prompts is not known",
        ),
    ],
)
def test_parts_that_make_another_model_are_refused(copied, changes, message):
    folder = copied("stable-diffusion-v")
    edit(folder / "model_index.json", **changes)
    with pytest.raises(UsageError, match=message):
        load_teacher(str(folder))


def test_only_some_components_have_the_variant(copied):
    folder = copied("ldm-kl")
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    file.rename(file.with_name("diffusion_pytorch_model.fp16.safetensors"))
    with pytest.raises(DkdmError, match="only weights of the variant fp16: .*--teacher-variant"):
        load_teacher(str(folder))
    teacher = load_teacher(str(folder), options=LoadOptions(variant="fp16"))
    teacher.to_pixels(torch.zeros(1, 3, 8, 8))


def test_shards_by_their_old_names(copied):
    folder = copied("ddpm") / "unet"
    whole = folder / "diffusion_pytorch_model.safetensors"
    weights = load_file(whole)
    names = [f"diffusion_pytorch_model-0000{i}-of-00002.fp16.safetensors" for i in (1, 2)]
    homes = {key: names[i % 2] for i, key in enumerate(weights)}
    for name in names:
        part = {key: value for key, value in weights.items() if homes[key] == name}
        save_file(part, folder / name, {"format": "pt"})
    listed = {"metadata": {"total_size": 1}, "weight_map": homes}
    index = folder / "diffusion_pytorch_model.safetensors.index.fp16.json"
    index.write_text(json.dumps(listed))
    whole.unlink()
    load_teacher(str(folder.parent), options=LoadOptions(variant="fp16"))


def test_a_network_alone_with_a_scheduler(folders):
    teacher = load_teacher(str(folders("ddpm")))
    noise = LoadOptions(scheduler=folders("ddpm") / "scheduler")
    alone = load_teacher(str(folders("ddpm") / "unet"), options=noise)
    assert alone.process.clipping == teacher.process.clipping
    torch.testing.assert_close(alone.network.state_dict(), teacher.network.state_dict())
    with pytest.raises(UsageError, match="conditioned on text"):
        load_teacher(str(folders("stable-diffusion") / "unet"), options=noise)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("AutoencoderKL", {"scaling_factor": 0}),
        ("AutoencoderKL", {"scaling_factor": None}),
        ("AutoencoderKL", {"latent_channels": 4, "latents_mean": [1.0]}),
        ("UNet2DModel", {"sample_size": -8}),
        ("UNet2DModel", {"in_channels": "3"}),
        ("UNet2DModel", {"out_channels": [3]}),
    ],
)
def test_values_that_cannot_be_are_refused(name, values):
    with pytest.raises(UsageError, match=list(values)[-1]):
        class_config(values, name, "config.json")


SINGLY = ("ldm-kl", "stable-diffusion", "sdxl")


@pytest.mark.parametrize("name", SINGLY)
def test_each_key_that_is_absent_by_itself(name, copied):
    folder = copied(name)
    pipeline = stock(folder)
    index = json.loads((folder / "model_index.json").read_text())
    count = 0
    for part in (part for part in PARTS if part in index):
        file = next(folder.glob(f"{part}/*config.json"))
        held, text = getattr(pipeline, part), file.read_text()
        for key in pipelines.defaulted(json.loads(text), type(held)):
            edit(file, [key])
            assert public(effective_config(folder, index, part)) == public(held.config), key
            file.write_text(text)
            count += 1
    assert count > 40


def test_a_student_takes_its_autoencoder_alone_from_a_root_folder(tmp_path):
    root, out = tmp_path / "root", tmp_path / "out"
    pipelines.ldm_kl().save_pretrained(root)
    for file in (root / "vqvae").iterdir():
        file.rename(root / file.name)
    (root / "vqvae").rmdir()
    (root / "v1-pruned.safetensors").write_bytes(b"the teacher's weights")
    teacher, pipeline = load_teacher(str(root)), stock(root)
    x = torch.randn(1, 3, 8, 8)
    expected = pipeline.vqvae.decode(x / 0.2).sample
    torch.testing.assert_close(teacher.to_pixels(x), expected)
    write_pipeline(out, teacher)
    names = {file.name for file in (out / "vqvae").rglob("*")}
    assert names == {"config.json", "diffusion_pytorch_model.safetensors"}
    torch.testing.assert_close(stock(out).vqvae.decode(x / 0.2).sample, expected)


def test_a_stock_pipeline_is_named_only_if_it_reads_the_latents_factors(copied, tmp_path):
    folder = copied("ldm-kl")
    edit(folder / "vqvae" / "config.json", shift_factor=0.5)
    edit(folder / "model_index.json", _class_name="ShiftedPipeline")  # which is not diffusers'
    teacher = load_teacher(str(folder))
    assert teacher.bundle.autoencoder.standard() == ([0.5], [0.2])
    write_pipeline(tmp_path / "out", teacher)
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "out", trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    made = pipeline(num_inference_steps=2, output_type="latent", generator=generator()).images
    seen = pipeline(num_inference_steps=2, output_type="pt", generator=generator()).images
    torch.testing.assert_close(seen, (teacher.to_pixels(made) / 2 + 0.5).clamp(0, 1))


def generator():
    return torch.Generator().manual_seed(0)


def as_bin(folder, name, code=False):
    """The weights in a folder as a file of torch, with a class beside them where there is code."""
    whole = next(folder.glob("*.safetensors"))
    weights = load_file(whole)
    whole.unlink()
    torch.save({"path": folder, **weights} if code else weights, folder / name)


@pytest.mark.parametrize("code", [False, True])
def test_weights_in_files_of_torch(copied, code):
    folder = copied("stable-diffusion")
    kept = stock(folder)
    as_bin(folder / "unet", "diffusion_pytorch_model.bin")
    as_bin(folder / "text_encoder", "pytorch_model.bin", code)
    if code:
        with pytest.raises(UsageError, match=r"pytorch_model.bin: holds more than weights \(path"):
            load_teacher(str(folder))
        return
    teacher = load_teacher(str(folder))
    torch.testing.assert_close(teacher.network.state_dict(), kept.unet.state_dict())
    with torch.no_grad():
        expected = kept.encode_prompt("a cat", "cpu", 1, False)[0]
    found = teacher.conditioning.encoders.encode(["a cat"])["encoder_hidden_states"]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("part", ["vae", "text_encoder"])
def test_components_whose_weights_are_not_whole(copied, part):
    """diffusers and transformers go on with random ones."""
    folder = copied("stable-diffusion")
    file = next((folder / part).glob("*.safetensors"))
    weights = load_file(file)
    weights.popitem()
    save_file(weights, file, {"format": "pt"})
    teacher = load_teacher(str(folder))
    with pytest.raises(DkdmError, match=rf"{part}: the weights of this .* not whole: 1 missing"):
        if part == "vae":
            teacher.to_pixels(torch.zeros(1, 4, 8, 8))
        else:
            teacher.conditioning.encoders.encode(["a cat"])


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "lists tokenizer, but there is no such folder, or it is empty"),
        ({"spiece.model": "abc"}, "needs the package sentencepiece: pip install"),
        (
            {"vocab.json": "{}", "merges.txt": ""},
            "prompts cannot be encoded by text_encoder",
        ),
    ],
    ids=["empty", "pieces", "no words"],
)
def test_tokenizers_that_cannot_be_made(copied, monkeypatch, files, message):
    monkeypatch.setattr("dkdm.models.components.find_spec", lambda _: None)
    folder = copied("stable-diffusion")
    edit(folder / "model_index.json", tokenizer=["transformers", "CLIPTokenizer"])
    for file in (folder / "tokenizer").iterdir():
        file.unlink()
    for name, text in files.items():
        (folder / "tokenizer" / name).write_text(text)
    with pytest.raises(DkdmError, match=message):
        load_teacher(str(folder)).conditioning.encoders.encode(["a cat"])


def test_entries_of_other_classes_mean_nothing(copied):
    """They are kept, as diffusers does, and not read."""
    folder = copied("dit")
    edit(folder / "transformer" / "config.json", num_class_embeds=7, class_embed_type="timestep")
    teacher = load_teacher(str(folder))
    assert (teacher.conditioning.num_classes, teacher.conditioning.null_class) == (5, 5)
    assert_same(folder, stock(folder))
    other = copied("ddpm")
    edit(other / "unet" / "config.json", encoder_hid_dim_type="image_proj", num_embeds_ada_norm=9)
    assert isinstance(load_teacher(str(other)).conditioning, Unconditional)
