"""Which files of a hub repository are fetched: those that diffusers' own loader fetches."""

import json
from pathlib import Path

import huggingface_hub
import pytest
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import constants

import pipelines
from dkdm import load_teacher
from dkdm.errors import UsageError
from dkdm.models.locate import download, needed_files
from hub_stand_in import Hub

INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.20.0",
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "scheduler": ["diffusers", "PNDMScheduler"],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
}
CONFIGS = (
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "tokenizer/merges.txt",
    "tokenizer/special_tokens_map.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/vocab.json",
    "unet/config.json",
    "vae/config.json",
)
LEFT_OUT = (
    "v1-5-pruned.ckpt",
    "v1-5-pruned-emaonly.safetensors",
    "v1-inference.yaml",
    "unet/diffusion_flax_model.msgpack",
    "unet/model.onnx",
    "unet/openvino_model.xml",
    "unet/diffusion_pytorch_model.non_ema.safetensors",
    "unet/diffusion_pytorch_model.non_ema.bin",
    "images/merge.png",
    "unet/evil.py",
)
UNET, VAE, TEXT = (
    f"{name}/diffusion_pytorch_model" if name != "text_encoder" else "text_encoder/model"
    for name in ("unet", "vae", "text_encoder")
)
SHARDS = (f"{UNET}-00001-of-00002.safetensors", f"{UNET}-00002-of-00002.safetensors")
FP16_SHARDS = (f"{UNET}.fp16-00001-of-00002.safetensors", f"{UNET}.fp16-00002-of-00002.safetensors")
OLD_SHARDS = (f"{UNET}-00001-of-00002.fp16.safetensors", f"{UNET}-00002-of-00002.fp16.safetensors")
SAFE = (f"{UNET}.safetensors", f"{VAE}.safetensors", f"{TEXT}.safetensors")
HALF = (f"{UNET}.fp16.safetensors", f"{VAE}.fp16.safetensors", f"{TEXT}.fp16.safetensors")
OLD = (f"{UNET}.bin", f"{VAE}.bin", "text_encoder/pytorch_model.bin")

# Name: files, variant, and which of the weights are needed.
LAYOUTS = {
    "safetensors before bin": ((*SAFE, *OLD, *HALF), None, SAFE),
    "a variant": ((*SAFE, *OLD, *HALF), "fp16", HALF),
    "only the unet has it": ((*SAFE, HALF[0]), "fp16", (HALF[0], *SAFE[1:])),
    "bin alone": (OLD, None, OLD),
    "shards": (
        (*SHARDS, f"{UNET}.safetensors.index.json", *SAFE[1:]),
        None,
        (*SHARDS, f"{UNET}.safetensors.index.json", *SAFE[1:]),
    ),
    "shards of a variant": (
        (*FP16_SHARDS, f"{UNET}.safetensors.index.fp16.json", *SHARDS, *SAFE),
        "fp16",
        (*FP16_SHARDS, f"{UNET}.safetensors.index.fp16.json", *SAFE[1:]),
    ),
}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The stand-in, with a cache of its own."""
    server = Hub()
    urls = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, server.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", urls)
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", server.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    huggingface_hub.utils._http.close_session()
    yield server
    huggingface_hub.utils._http.close_session()
    server.close()


def fill(hub, names, index=INDEX, repo="someone/model"):
    hub.repositories[repo] = {name: name.encode() for name in names}
    if index:
        hub.repositories[repo]["model_index.json"] = json.dumps(index).encode()
    return repo


def fetched(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_files_that_are_needed(layout):
    weights, variant, needed = LAYOUTS[layout]
    names = (*CONFIGS, *LEFT_OUT, "README.md", *weights)
    assert set(needed_files(names, INDEX, variant)) == {*CONFIGS, "README.md", *needed}


def test_bin_for_the_parts_that_have_nothing_else():
    names = (*CONFIGS, *SAFE[:2], "text_encoder/pytorch_model.bin", f"{VAE}.bin")
    expected = {*CONFIGS, *SAFE[:2], "text_encoder/pytorch_model.bin"}
    assert set(needed_files(names, INDEX)) == expected


def test_shards_by_their_old_names():
    names = (*CONFIGS, *OLD_SHARDS, f"{UNET}.safetensors.fp16.index.json", *SAFE)
    found = set(needed_files(names, INDEX, "fp16")) - set(CONFIGS)
    assert found == {*OLD_SHARDS, f"{UNET}.safetensors.fp16.index.json", *SAFE[1:]}


def test_parts_that_lie_beside_the_index():
    index = {"_class_name": "DDPMPipeline", "unet": ["diffusers", "UNet2DModel"]}
    index |= {"scheduler": ["diffusers", "DDPMScheduler"]}
    names = ("config.json", "scheduler_config.json", "model_index.json", "sample.png", "old.ckpt")
    weights = ("diffusion_pytorch_model.bin", "diffusion_pytorch_model.safetensors")
    expected = {*names[:3], "diffusion_pytorch_model.safetensors"}
    assert set(needed_files((*names, *weights), index)) == expected


def test_parts_that_are_never_loaded():
    index = INDEX | {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]}
    names = (*CONFIGS, *SAFE, "safety_checker/config.json", "safety_checker/model.safetensors")
    assert set(needed_files(names, index)) == {*CONFIGS, *SAFE}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_as_diffusers_fetches_them(hub, tmp_path, layout):
    weights, variant, _ = LAYOUTS[layout]
    repo = fill(hub, (*CONFIGS, *LEFT_OUT, *weights))
    stock = DiffusionPipeline.download(repo, cache_dir=tmp_path / "stock", variant=variant)
    assert fetched(download(repo, variant=variant)) == fetched(Path(stock))


def test_a_pipeline_in_a_subfolder(hub):
    names = [f"ddpm/{name}" for name in (*CONFIGS, *LEFT_OUT, *SAFE)]
    repo = fill(hub, [*names, "other/unet/diffusion_pytorch_model.safetensors"], index=None)
    hub.files(repo)["ddpm/model_index.json"] = json.dumps(INDEX).encode()
    folder = download(repo, subfolder="ddpm")
    assert fetched(folder) == {f"ddpm/{name}" for name in (*CONFIGS, *SAFE)}
    with pytest.raises(UsageError, match="its pipelines lie in ddpm: give --teacher-subfolder"):
        download(repo)


def test_a_network_alone(hub):
    weights = "diffusion_pytorch_model.safetensors"
    names = ("unet_ema/config.json", f"unet_ema/{weights}", "optimizer.bin", f"unet/{weights}")
    repo = fill(hub, names, index=None)
    assert fetched(download(repo, subfolder="unet_ema")) == set(names[:2])


def test_configs_alone(hub):
    repo = fill(hub, (*CONFIGS, *SAFE, *LEFT_OUT))
    assert fetched(download(repo, weights=False)) == {n for n in CONFIGS if n.endswith(".json")}


def test_what_was_fetched_is_found_offline(hub, monkeypatch):
    repo = fill(hub, (*CONFIGS, *SAFE, *LEFT_OUT))
    folder = download(repo)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.utils._http.close_session()
    assert download(repo) == folder


@pytest.mark.parametrize(
    ("names", "way"),
    [
        (("sd.safetensors", "sd.ckpt"), "--local-dir .` and give --teacher sd.safetensors"),
        (("style_lora.safetensors",), "--teacher MODEL --teacher-lora style_lora.safetensors"),
        (("README.md", "data.csv"), "no checkpoint file in it"),
    ],
)
def test_repositories_that_are_no_pipeline(hub, names, way):
    with pytest.raises(UsageError) as told:
        download(fill(hub, names, index=None))
    assert way in str(told.value)


def test_a_repository_is_loaded_by_its_name(hub, tmp_path):
    pipelines.ddpm().save_pretrained(tmp_path / "ddpm")
    content = {p: (tmp_path / "ddpm" / p).read_bytes() for p in fetched(tmp_path / "ddpm")}
    hub.repositories["someone/ddpm"] = content | {"old.ckpt": b"0"}
    teacher = load_teacher("someone/ddpm")
    assert teacher.name == "someone/ddpm"
    here = load_teacher(str(tmp_path / "ddpm"))
    for key, value in here.network.state_dict().items():
        assert torch.equal(teacher.network.state_dict()[key], value)
    assert not any("old.ckpt" in path for _, path in hub.requests)
