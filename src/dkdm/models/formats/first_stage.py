"""The autoencoder of a latent model: in its checkpoint, or in a folder beside it.

One in a checkpoint of CompVis/latent-diffusion becomes diffusers' VQModel or AutoencoderKL, and is
written once, under $DKDM_CACHE or ~/.cache/dkdm, so that a student can ship it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
from torch import Tensor

from dkdm.core.denoisers.bundle import Bundle
from dkdm.core.saving.checkpoint import save_network
from dkdm.errors import UsageError
from dkdm.models.components import Autoencoder, Component
from dkdm.models.formats.state_dict import frozen
from dkdm.reading.files import cache_dir, cached_folder
from dkdm.reading.places import check_folder, expanded

Config = Mapping[str, Any]
_PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.", "quantize.")


def latent_bundle(folder: str | None, channels: int, pipeline: str | None = None) -> Bundle:
    """A diffusers AutoencoderKL in `folder` as what comes with a model; None is no autoencoder.

    channels: of the latents. pipeline: the diffusers pipeline that takes both. Raises UsageError
    if there is no autoencoder, or one of other latents.
    """
    if folder is None:
        return Bundle()
    path = expanded(folder)
    if not (path / "config.json").is_file():
        raise UsageError(
            f"--vae {folder}: give the folder of a diffusers AutoencoderKL, with config.json"
        )
    component = Component(check_folder(path), "diffusers", "AutoencoderKL")
    autoencoder = Autoencoder(component)
    if autoencoder.latent_channels != channels:
        raise UsageError(
            f"--vae {folder}: its latents have {autoencoder.latent_channels} channels, the "
            f"network's samples {channels}: they do not belong together"
        )
    return Bundle(pipeline, {"vae": component}, autoencoder)


def autoencoder_bundle(
    first_stage: Config, tensors: Mapping[str, Tensor], scale: float, path: Path
) -> Bundle:
    """The autoencoder as what comes with a model.

    first_stage: `first_stage_config` of its YAML. tensors: the checkpoint's `first_stage_model`.
    scale: latents are multiplied by it. path: of the checkpoint. Raises UsageError for an
    autoencoder of another kind, DkdmError if the weights are not its own.
    """
    kind = str(first_stage.get("target")).rpartition(".")[2]
    if kind not in _CLASSES:
        raise UsageError(
            f"{path}: first_stage_config has target {kind}: use one of {', '.join(_CLASSES)}"
        )
    params = first_stage["params"]
    network = getattr(diffusers, _CLASSES[kind])(**_config(kind, params, scale))
    own = {key: value for key, value in tensors.items() if key.startswith(_PARTS)}
    frozen(network, converted(own, len(params["ddconfig"]["ch_mult"])), path)
    folder = cache_dir("autoencoders") / _fingerprint(network)
    folder = cached_folder(folder, lambda to: save_network(network, to))
    component = Component(folder, "diffusers", _CLASSES[kind])
    return Bundle(None, {"vae": component}, Autoencoder(component, network))


_CLASSES = {
    "VQModelInterface": "VQModel",
    "VQModel": "VQModel",
    "AutoencoderKL": "AutoencoderKL",
}


def _config(kind: str, params: Config, scale: float) -> dict[str, Any]:
    own = params["ddconfig"]
    widths = [own["ch"] * mult for mult in own["ch_mult"]]
    sizes = [own["resolution"] // 2**level for level in range(len(widths))]
    attends = ["Attn" if size in own["attn_resolutions"] else "" for size in sizes]
    config = {
        "sample_size": own["resolution"],
        "in_channels": own["in_channels"],
        "out_channels": own["out_ch"],
        "down_block_types": [f"{prefix}DownEncoderBlock2D" for prefix in attends],
        "up_block_types": [f"{prefix}UpDecoderBlock2D" for prefix in reversed(attends)],
        "block_out_channels": widths,
        "layers_per_block": own["num_res_blocks"],
        "latent_channels": own["z_channels"],
        "scaling_factor": scale,
    }
    if kind == "AutoencoderKL":
        return config
    return config | {"num_vq_embeddings": params["n_embed"], "vq_embed_dim": params["embed_dim"]}


def converted(tensors: Mapping[str, Tensor], levels: int) -> dict[str, Tensor]:
    """The weights by the names that diffusers has for them; attention as linear layers."""
    renamed = {_diffusers_name(key, levels): value for key, value in tensors.items()}
    return {
        key: value.flatten(1) if ".attentions." in key and value.ndim == 4 else value
        for key, value in renamed.items()
    }


def _diffusers_name(name: str, levels: int) -> str:
    """Levels on the way up are counted from the smallest size, blocks in the middle from 0."""
    for pattern, replacement in _RENAMED:
        name = re.sub(pattern, replacement, name)
    name = re.sub(r"\.up\.(\d+)\.", lambda m: f".up_blocks.{levels - 1 - int(m[1])}.", name)
    name = re.sub(r"\.mid\.block_(\d)\.", lambda m: f".mid_block.resnets.{int(m[1]) - 1}.", name)
    return name


_RENAMED = (
    (r"(\.mid\.attn_1|\.attn\.\d+)\.norm\.", r"\1.group_norm."),
    (r"(\.mid\.attn_1|\.attn\.\d+)\.([qkv])\.", r"\1.to_\2."),
    (r"(\.mid\.attn_1|\.attn\.\d+)\.proj_out\.", r"\1.to_out.0."),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"\.(down|up)\.(\d+)\.block\.", r".\1.\2.resnets."),
    (r"\.(down|up)\.(\d+)\.attn\.", r".\1.\2.attentions."),
    (r"\.(down|up)sample\.", r".\1samplers.0."),
    (r"\.down\.", ".down_blocks."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"\.norm_out\.", ".conv_norm_out."),
)


def _fingerprint(network: Any) -> str:
    digest = hashlib.sha256(json.dumps(dict(network.config), sort_keys=True, default=str).encode())
    for key, value in network.state_dict().items():
        digest.update(key.encode())
        digest.update(value.numpy().data)
    return digest.hexdigest()[:16]
