"""Checkpoints of CompVis/latent-diffusion: unconditional, or conditioned on a class.

The `.ckpt` holds UNet, averaged UNet, autoencoder and class embeddings; what they are is in the
YAML file beside it. Latents are not clipped.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dkdm.core.denoisers.conditioning import ClassLabels, Conditioning, Unconditional
from dkdm.core.denoisers.denoiser import Denoiser
from dkdm.core.diffusion.prediction import Parameterization
from dkdm.errors import DkdmError, UsageError
from dkdm.models.architectures import ARCHITECTURES
from dkdm.models.formats.first_stage import autoencoder_bundle
from dkdm.models.formats.state_dict import Weights, frozen, without_prefix
from dkdm.models.options import LoadOptions
from dkdm.models.schedulers import from_scheduler_config
from dkdm.networks.adm import AdmUNet
from dkdm.reading.fields import read_text, read_yaml

Config = Mapping[str, Any]
UNET, AVERAGE, CODER = "model.diffusion_model.", "model_ema.", "first_stage_model."
CLASSES = "cond_stage_model.embedding.weight"


def recognizes(tensors: Mapping[str, Tensor]) -> bool:
    """Whether these are a UNet and an autoencoder by the names that CompVis gives them."""
    return all(any(key.startswith(part) for key in tensors) for part in (UNET, CODER))


def load(weights: Weights, options: LoadOptions) -> Denoiser:
    """The model of the YAML file `options.config`; its averaged weights if asked for and there.

    Raises UsageError if there is no such file or it describes a model of another kind, DkdmError
    if the weights are not those of that model.
    """
    config = _model_config(options.config, weights.path)
    tensors = _unet_tensors(weights, options.ema)
    classes = _num_classes(config, weights)
    if classes is not None:
        tensors["label_emb.weight"] = weights.tensors[CLASSES]
    network = _network(config["unet_config"]["params"], classes)
    _check_channels(config, network, weights.path)
    measured: Any = weights.tensors.get("scale_factor")
    scale = float(config.get("scale_factor", 1.0) if measured is None else measured)
    coder = without_prefix(weights.tensors, CODER)
    return Denoiser(
        frozen(network, tensors, weights.path, options.dtype),
        from_scheduler_config(_scheduler(config)),
        Parameterization("sample" if config.get("parameterization") == "x0" else "epsilon"),
        ARCHITECTURES["AdmUNet"].shape(dict(network.config), options.sample_size),
        _conditioning(classes),
        bundle=autoencoder_bundle(config["first_stage_config"], coder, scale, weights.path),
    )


def _model_config(file: Path | None, checkpoint: Path) -> Config:
    """`model.params` of the YAML file."""
    if file is None:
        raise UsageError(
            f"{checkpoint}: give --teacher-config with the YAML file that the repository has "
            "for it, such as models/ldm/celeba256/config.yaml"
        )
    try:
        text = read_text(file, "a YAML file")
        params: Config = read_yaml(text, f"--teacher-config {file}")["model"]["params"]
        unet, coder = params["unet_config"]["params"], params["first_stage_config"]["params"]
        found = isinstance(unet, Mapping) and isinstance(coder["ddconfig"], Mapping)
    except (KeyError, TypeError):
        found = False
    if not found:
        raise UsageError(
            f"--teacher-config {file}: give a config of CompVis/latent-diffusion, with "
            "model.params.unet_config.params and model.params.first_stage_config.params.ddconfig"
        )
    return params


def _unet_tensors(weights: Weights, averaged: bool) -> dict[str, Tensor]:
    """The UNet's weights; the averaged ones have its names with the dots left out."""
    plain = without_prefix(weights.tensors, UNET)
    average = without_prefix(weights.tensors, AVERAGE)
    if not (averaged and average):
        return plain
    names = {key: f"diffusion_model{key}".replace(".", "") for key in plain}
    missing = [key for key, name in names.items() if name not in average]
    if missing:
        raise DkdmError(
            f"{weights.path}: {len(missing)} of the averaged weights are missing "
            f"({', '.join(missing[:3])}): give the whole checkpoint"
        )
    return {key: average[name] for key, name in names.items()}


def _num_classes(config: Config, weights: Weights) -> int | None:
    stage = config.get("cond_stage_config", "__is_unconditional__")
    if stage == "__is_unconditional__":
        return None
    kind = str(stage.get("target")).rpartition(".")[2]
    if kind != "ClassEmbedder":
        raise UsageError(
            f"{weights.path}: conditioned by {kind}: give an unconditional model or one with a "
            "ClassEmbedder. Stable Diffusion is loaded once it is a diffusers folder: "
            "StableDiffusionPipeline.from_single_file(FILE).save_pretrained(FOLDER)"
        )
    if CLASSES not in weights.tensors:
        raise DkdmError(f"{weights.path}: {CLASSES} is missing: give the whole checkpoint")
    return len(weights.tensors[CLASSES])


def _conditioning(classes: int | None) -> Conditioning:
    """1001 classes are ImageNet's and the one that means none (configs/latent-diffusion)."""
    if classes is None:
        return Unconditional()
    return ClassLabels(1000, null_class=1000) if classes == 1001 else ClassLabels(classes)


def _network(params: Config, classes: int | None) -> AdmUNet:
    unknown = sorted(params.keys() - {*_NAMES, *_DEFAULTS, *_IGNORED})
    if unknown:
        raise UsageError(f"--teacher-config: unet_config with {', '.join(unknown)} is not known")
    config = _DEFAULTS | {key: value for key, value in params.items() if key in _DEFAULTS}
    config |= {_NAMES[key]: value for key, value in params.items() if key in _NAMES}
    if config["num_head_channels"] == -1:
        config["num_head_channels"] = None
    try:
        return AdmUNet(**config, num_class_embeds=classes)
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise UsageError(f"--teacher-config: unet_config makes no network: {error}") from error


_NAMES = {"image_size": "sample_size"}
_DEFAULTS: dict[str, Any] = {
    "in_channels": None,
    "out_channels": None,
    "model_channels": None,
    "num_res_blocks": None,
    "attention_resolutions": (),
    "channel_mult": (1, 2, 4, 8),
    "num_heads": -1,
    "num_head_channels": -1,
    "use_scale_shift_norm": False,
    "resblock_updown": False,
    "conv_resample": True,
    "use_new_attention_order": False,
    "dropout": 0.0,
    "context_dim": None,
    "transformer_depth": 1,
}
_IGNORED = ("use_checkpoint", "use_fp16", "use_spatial_transformer", "legacy")


def _check_channels(config: Config, network: AdmUNet, path: Path) -> None:
    taken, given = network.config.in_channels, network.config.out_channels
    if not taken == given == config.get("channels", taken):
        raise UsageError(
            f"{path}: the network takes {taken} channels and gives {given}, for latents of "
            f"{config.get('channels')}: a model that is fed an image too cannot be distilled "
            "without one"
        )


def _scheduler(config: Config) -> dict[str, Any]:
    """The scheduler of `make_beta_schedule`; what it calls linear is linear in the square root."""
    name = config.get("beta_schedule", "linear")
    if name not in _SCHEDULES:
        raise UsageError(
            f"--teacher-config: beta_schedule {name}: use one of {', '.join(_SCHEDULES)}"
        )
    return {
        "_class_name": "DDPMScheduler",
        "num_train_timesteps": config.get("timesteps", 1000),
        "beta_schedule": _SCHEDULES[name],
        "beta_start": config.get("linear_start", 1e-4),
        "beta_end": config.get("linear_end", 2e-2),
        "clip_sample": False,
    }


_SCHEDULES = {
    "linear": "scaled_linear",
    "sqrt_linear": "linear",
    "cosine": "squaredcos_cap_v2",
}
