"""One-file checkpoints of Stable Diffusion, SDXL, SD3, Flux ..., and files that are no model."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import huggingface_hub
import torch

from dkdm.core.denoisers.denoiser import Denoiser
from dkdm.errors import DkdmError, UsageError
from dkdm.models.architectures import component_of
from dkdm.models.locate import INDEX
from dkdm.models.lora import merge_loras, read_choices
from dkdm.models.options import LoadOptions
from dkdm.models.pipeline_folder import describe_pipeline_folder, load_pipeline_folder
from dkdm.models.pipelines import PIPELINES
from dkdm.reading.fields import read_json, shown
from dkdm.reading.files import cache_dir, cached_folder

Shapes = Mapping[str, tuple[int, ...]]
UNET = "model.diffusion_model."
TEXT = ("cond_stage_model.transformer.text_model.", "cond_stage_model.model.", "conditioner.")


@dataclass(frozen=True)
class SingleFile:
    """A kind of file that diffusers' `from_single_file` reads.

    what: its name. pipeline: class. repository: whose other parts it goes with. whole: whether text
    encoders lie in the file too.
    """

    what: str
    pipeline: str
    repository: str
    whole: bool = False

    @property
    def network(self) -> str:
        """The class of its denoiser."""
        return PIPELINES[self.pipeline].network

    @property
    def component(self) -> str:
        """The name of its denoiser in the pipeline."""
        return component_of(self.network)

    def line(self, path: Path, more: str = "") -> str:
        """The Python that makes the file a folder."""
        file = f'"{path.name}"{more}'
        if self.whole:
            return f'{self.pipeline}.from_single_file({file}).save_pretrained("FOLDER")'
        part = f"{self.component}={self.network}.from_single_file({file})"
        made = f'{self.pipeline}.from_pretrained("{self.repository}", {part})'
        return f'{made}.save_pretrained("FOLDER")'


def recognize(shapes: Shapes) -> SingleFile | str | None:
    """What a file is by its names and shapes: a model, why it is refused, or None if unknown."""
    for pattern, what in _NO_MODEL:
        if any(re.search(pattern, key) for key in shapes):
            return what
    whole = any(key.startswith((*TEXT, "text_encoders.")) for key in shapes)
    if f"{UNET}input_blocks.0.0.weight" in shapes:
        return _stable_diffusion(shapes, whole)
    inner = {key.removeprefix(UNET) for key in shapes}
    found = next((kind for key, kind in _TRANSFORMERS.items() if key in inner), None)
    return None if found is None else replace(found, whole=whole)


_NO_MODEL = (
    (
        r"lora_(up|down|A|B)\b|\.lora\.(up|down)\.|_lora\.(up|down)\.|hada_w1|lokr_w",
        "a LoRA, which changes a model: give that model, and this file as --teacher-lora",
    ),
    (
        r"^control_model\.|^controlnet_|^input_hint_block|^controlnet_blocks\.",
        "a ControlNet, which is fed an image too and has no noise process of its own: give the "
        "model that it was made for",
    ),
    (r"^string_to_(token|param)$|^emb_params$", "a textual inversion and no model"),
)


def _stable_diffusion(shapes: Shapes, whole: bool) -> SingleFile | str | None:
    """Stable Diffusion 1, 2 or SDXL by the widths of what conditions the UNet."""
    channels = shapes[f"{UNET}input_blocks.0.0.weight"][1]
    text = next((v[1] for k, v in shapes.items() if k.endswith("attn2.to_k.weight")), None)
    labels = shapes.get(f"{UNET}label_emb.0.0.weight", (0, 0))[1]
    if (text is None or not whole) and not labels and text not in (768, 1024):
        return None  # CompVis/latent-diffusion, or a checkpoint of its trainers
    if channels != 4:
        return (
            f"a UNet that takes {channels} channels: a model for inpainting, depth, "
            "super-resolution or editing is fed an image too, and cannot be distilled without one"
        )
    if labels == 2560:
        return "the refiner of SDXL, which continues another model's images: distil SDXL"
    make = _SDXL if labels == 2816 else _SD2 if text == 1024 else _SD1
    return replace(make, whole=whole)


_SD1 = SingleFile(
    "a Stable Diffusion 1 file",
    "StableDiffusionPipeline",
    "stable-diffusion-v1-5/stable-diffusion-v1-5",
)
_SD2 = SingleFile(
    "a Stable Diffusion 2 file (it does not say whether it predicts noise or v: compare "
    "prediction_type in the scheduler's config with the model's page)",
    "StableDiffusionPipeline",
    "stabilityai/stable-diffusion-2-1",
)
_SDXL = SingleFile(
    "an SDXL file", "StableDiffusionXLPipeline", "stabilityai/stable-diffusion-xl-base-1.0"
)
# A name that only this model has, and what the file is; the first that is found counts.
_TRANSFORMERS = {
    "guidance_in.in_layer.weight": SingleFile(
        "a Flux dev file", "FluxPipeline", "black-forest-labs/FLUX.1-dev"
    ),
    "double_blocks.0.img_attn.qkv.weight": SingleFile(
        "a Flux schnell file", "FluxPipeline", "black-forest-labs/FLUX.1-schnell"
    ),
    "joint_blocks.0.context_block.adaLN_modulation.1.bias": SingleFile(
        "a Stable Diffusion 3 file",
        "StableDiffusion3Pipeline",
        "stabilityai/stable-diffusion-3-medium-diffusers",
    ),
    "cap_embedder.0.weight": SingleFile(
        "a Lumina 2 file", "Lumina2Pipeline", "Alpha-VLLM/Lumina-Image-2.0"
    ),
    "blocks.0.cross_attn.q_linear.weight": SingleFile(
        "a SANA file", "SanaPipeline", "Efficient-Large-Model/Sana_1600M_1024px_diffusers"
    ),
    "head.modulation": SingleFile("a Wan file", "WanPipeline", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"),
}


def part_of_a_model(path: Path, shapes: Shapes) -> str | None:
    """What a file is that holds one component of a model by itself; None if unknown."""
    if (path.parent / "config.json").is_file():
        return f"the weights of what {path.parent / 'config.json'} describes: give that folder"
    return next((what for key, what in _PARTS if any(n.startswith(key) for n in shapes)), None)


_ALONE = "give the folder that has model_index.json, where its other parts lie"
_PARTS = (
    ("decoder.conv_in.", f"an autoencoder alone, without a denoiser: {_ALONE}"),
    ("first_stage_model.", f"an autoencoder alone, without a denoiser: {_ALONE}"),
    ("text_model.", f"a text encoder alone: {_ALONE}"),
    ("shared.weight", f"a text encoder alone: {_ALONE}"),
    ("encoder.block.0.", f"a text encoder alone: {_ALONE}"),
    (
        "down_blocks.",
        "the weights of a diffusers network without its config: give the folder where its "
        "config.json lies, or a teacher:load of your own that makes it",
    ),
)


def load_single_file(path: Path, kind: SingleFile, options: LoadOptions) -> Denoiser:
    """Load such a file by diffusers' `from_single_file`, with configs that lie on this machine.

    options.config: a diffusers folder of the same model, whose configs are taken (and the parts
    that the file lacks), or the YAML of the original repository; None is the hub's cache. Raises
    UsageError, with the line of Python that makes a folder of the file, where there are none or
    they are those of another model.
    """
    config = options.config or _cached(kind.repository)
    if config is None:
        raise UsageError(
            f"{path}: {kind.what}. Make it a folder, in Python: {kind.line(path)}; or give "
            f"--teacher-config with a folder of {kind.repository}"
        )
    try:
        return _loaded(path, kind, config, replace(options, config=None))
    except DkdmError:
        raise
    except Exception as error:  # of diffusers, transformers or safetensors, by what does not match
        more = f', original_config="{config}"' if config.is_file() else ""
        first = " ".join(str(error).split())[:200] or type(error).__name__
        raise UsageError(
            f"{path}: {kind.what}, which cannot be loaded with --teacher-config {config} on this "
            f"machine ({first}). Make it a folder, in Python: {kind.line(path, more)}"
        ) from error


def _cached(repository: str) -> Path | None:
    """The folder of a repository in the hub's cache, if its index lies there."""
    found = huggingface_hub.try_to_load_from_cache(repository, INDEX)
    return Path(found).parent if isinstance(found, str) else None


def _loaded(path: Path, kind: SingleFile, config: Path, options: LoadOptions) -> Denoiser:
    arguments = {"torch_dtype": getattr(torch, options.dtype), "local_files_only": True}
    if config.is_dir():
        _check_parts(config)
        arguments["config"] = str(config)
    elif kind.whole:
        arguments["original_config"] = str(config)
    else:
        raise UsageError(
            f"{path}: {kind.what} without text encoders: give --teacher-config with a folder "
            f"of {kind.repository}, which has them"
        )
    if kind.whole:
        return load_pipeline_folder(_folder_of(path, kind, config, arguments), options)
    return _with_network(path, kind, config, arguments, options)


def _check_parts(folder: Path) -> None:
    index = read_json(folder / INDEX, "a diffusers pipeline folder")
    for name, value in index.items():
        pair = isinstance(value, list) and len(value) == 2 and name != "safety_checker"
        if pair and value[0] not in (None, "diffusers", "transformers"):
            raise UsageError(
                f"{folder / INDEX}: {name} is {shown(value)}: use a class of diffusers or "
                "transformers"
            )


def _with_network(
    path: Path, kind: SingleFile, folder: Path, arguments: dict[str, Any], options: LoadOptions
) -> Denoiser:
    loras = read_choices(options.lora)
    described = describe_pipeline_folder(folder, options).denoiser
    cls = getattr(diffusers, kind.network)
    network = cls.from_single_file(str(path), subfolder=kind.component, **arguments).eval()
    merge_loras(network, kind.pipeline, kind.component, loras)
    return replace(described, network=network.requires_grad_(False), call=None)


def _folder_of(path: Path, kind: SingleFile, config: Path, arguments: dict[str, Any]) -> Path:
    """The folder of a file, written once: it is named by what it is made of."""
    sources = [path, config / INDEX if config.is_dir() else config]
    stats = [(str(one.resolve()), one.stat().st_size, one.stat().st_mtime_ns) for one in sources]
    made_of = repr((stats, str(arguments["torch_dtype"]), kind.pipeline))
    folder = cache_dir("single-files") / hashlib.sha256(made_of.encode()).hexdigest()[:16]
    read = getattr(diffusers, kind.pipeline).from_single_file
    return cached_folder(folder, lambda to: read(str(path), **arguments).save_pretrained(to))
