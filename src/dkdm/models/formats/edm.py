"""Weights of NVlabs/edm (arXiv 2206.00364), saved as a state dict."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dkdm.core.denoisers.conditioning import ClassLabels, Unconditional
from dkdm.core.denoisers.denoiser import Denoiser
from dkdm.core.diffusion.prediction import Parameterization
from dkdm.core.diffusion.schedules import karras
from dkdm.errors import UsageError
from dkdm.models.architectures import ARCHITECTURES
from dkdm.models.formats.flags import one_of, read_flags
from dkdm.models.formats.state_dict import Weights, frozen, without_prefix
from dkdm.models.options import LoadOptions
from dkdm.networks.edm import DhariwalUNet, SongUNet

FLAGS = {"precond": one_of("edm")}
AUGMENT = "map_augment.weight"  # used by training alone


def recognizes(tensors: Mapping[str, Tensor]) -> bool:
    """Whether these are weights of one of its UNets, with or without preconditioning around it."""
    return "map_layer0.weight" in _of_the_unet(tensors)


def load(weights: Weights, options: LoadOptions) -> Denoiser:
    """A UNet under EDM's own preconditioning, on 1000 levels of its noise.

    The file does not say how the UNet was preconditioned: for one trained with VP or VE
    (`--precond`), the numbers would be wrong. Raises UsageError for iDDPM's, which shows in its
    table, KeyError for weights that are missing.
    """
    read_flags(options.flags, FLAGS)
    if "u" in weights.tensors:
        raise UsageError(f"{weights.path}: iDDPM's preconditioning is not supported, only EDM's")
    tensors = _of_the_unet(weights.tensors)
    cls = DhariwalUNet if "out_conv.weight" in tensors else SongUNet
    config = _adm_config(tensors) if cls is DhariwalUNet else _song_config(tensors)
    used = {key: value for key, value in tensors.items() if key != AUGMENT}
    return edm_denoiser(frozen(cls(**config), used, weights.path, options.dtype), options)


def edm_denoiser(network: Any, options: LoadOptions, **fields: Any) -> Denoiser:
    """A network as EDM preconditions and samples it. fields: any other field of `Denoiser`."""
    classes = network.config.num_class_embeds
    return Denoiser(
        network,
        karras(1000),
        Parameterization("edm", sigma_data=0.5),
        ARCHITECTURES[type(network).__name__].shape(dict(network.config), options.sample_size),
        ClassLabels(classes) if classes else Unconditional(),
        **fields,
    )


def _of_the_unet(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return without_prefix(tensors, "model.") or dict(tensors)


def levels(tensors: Mapping[str, Tensor], conv: str) -> dict[str, Any]:
    """What the names and shapes of encoder and decoder say of a UNet's config.

    conv: name of a block's first convolution. Raises KeyError for a name that is missing.
    """
    sizes = sorted({_size(key) for key in tensors if key.startswith("enc.")}, reverse=True)
    if not sizes:
        raise KeyError("enc")
    top = sizes[0]
    blocks = [f"enc.{size}x{size}_block0" for size in sizes]
    label = tensors.get("map_label.weight", tensors.get("emb_label.weight"))
    return {
        "sample_size": top,
        "in_channels": tensors[f"enc.{top}x{top}_conv.weight"].shape[1],
        "block_out_channels": tuple(len(tensors[f"{name}.{conv}.weight"]) for name in blocks),
        "layers_per_block": sum(
            key.startswith(f"enc.{top}x{top}_block") and key.endswith(f"{conv}.weight")
            for key in tensors
        ),
        "num_class_embeds": None if label is None else label.shape[1],
    }


def _size(key: str) -> int:
    """16 of `enc.16x16_block0.norm0.weight`."""
    return int(key.split(".")[1].partition("x")[0])


def attention(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], qkv: str
) -> tuple[int, ...]:
    """The resolutions of a config's levels whose blocks have attention weights of this name."""
    sizes = [config["sample_size"] >> i for i in range(len(config["block_out_channels"]))]
    return tuple(size for size in sizes if f"enc.{size}x{size}_block0.{qkv}.weight" in tensors)


def _common_config(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    config = levels(tensors, "conv0")
    return config | {
        "attention_resolutions": attention(tensors, config, "qkv"),
        "emb_channels": len(tensors["map_layer1.weight"]),
    }


def _adm_config(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    return _common_config(tensors) | {
        "out_channels": len(tensors["out_conv.weight"]),
        "model_channels": tensors["map_layer0.weight"].shape[1],
    }


def _song_config(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    config = _common_config(tensors)
    top = f"{config['sample_size']}x{config['sample_size']}"
    half = f"{config['sample_size'] // 2}x{config['sample_size'] // 2}"
    filter = tensors.get(f"enc.{half}_down.conv0.resample_filter")
    return config | {
        "out_channels": len(tensors[f"dec.{top}_aux_conv.weight"]),
        "model_channels": len(tensors[f"enc.{top}_conv.weight"]),
        "noise_channels": tensors["map_layer0.weight"].shape[1],
        "fourier": "map_noise.freqs" in tensors,
        "residual_input": f"enc.{half}_aux_residual.weight" in tensors,
        "resample_filter": (1, 1) if filter is None else _line(filter),
    }


def _line(filter: Tensor) -> tuple[int, ...]:
    """One dimension of a separable filter [1, 1, K, K], in whole numbers that start with 1."""
    row = filter[0, 0, 0]
    return tuple((row / row[0]).round().int().tolist())
