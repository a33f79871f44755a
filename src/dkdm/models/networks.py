"""What dkdm must know of each diffusers network class beyond its config."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from dkdm.core.bundle import Bundle
from dkdm.core.conditioning import Condition
from dkdm.errors import UsageError
from dkdm.models.own_network import OWN_CLASS

Config = dict[str, Any]
Size = tuple[int, ...] | None


def _shape(config: Config, size: Size) -> tuple[int, ...]:
    """(channels, height, width) by `sample_size`."""
    return int(config["in_channels"]), *_spatial(config.get("sample_size"), size, 2)


def _audio_shape(config: Config, size: Size) -> tuple[int, ...]:
    """(channels, length)."""
    return int(config["in_channels"]), *_spatial(config.get("sample_size"), size, 1)


def _video_shape(config: Config, size: Size) -> tuple[int, ...]:
    """(channels, frames, height, width), which the config does not say."""
    return int(config["in_channels"]), *_spatial(None, size, 3)


def _own_shape(config: Config, size: Size) -> tuple[int, ...]:
    """A user's own network was made for `sample_shape`."""
    channels, *sides = config["sample_shape"]
    return int(channels), *_spatial(sides, size, len(sides))


def _flux_shape(config: Config, size: Size) -> tuple[int, ...]:
    """Tokens hold 2x2 latents; Flux is made for 1024x1024 pixels."""
    return int(config["in_channels"]) // 4, *_spatial(128, size, 2)


def _any_shape(config: Config, size: Size) -> tuple[int, ...]:
    """(channels, ...) of a network that names every side of its samples; vectors have no sides."""
    configured = tuple(config["sample_size"])
    return int(config["in_channels"]), *_spatial(configured, size, len(configured))


def _spatial(configured: Any, asked: Size, dimensions: int) -> tuple[int, ...]:
    if asked is not None:
        if len(asked) != dimensions:
            raise UsageError(
                f"--teacher-size: expected {dimensions} numbers for this network, found {asked}"
            )
        return asked
    if configured is None:
        raise UsageError(
            f"the network's config has no sample_size: expected --teacher-size with the "
            f"{dimensions} numbers of one sample as the network sees it, channels aside"
        )
    return (configured,) * dimensions if isinstance(configured, int) else tuple(configured)


_EMBED = {  # the classes that read these entries
    "class_embed_type": ("UNet2DModel", "UNet2DConditionModel"),
    "addition_embed_type": ("UNet2DConditionModel",),
    "encoder_hid_dim_type": ("UNet2DConditionModel",),
}
_LABELS = "continuous labels, which are no class ids"
_IMAGES = "embeddings of images"
_ODD_EMBEDDINGS = {
    "class_embed_type": {
        "timestep": _LABELS,
        "identity": _LABELS,
        "projection": _LABELS,
        "simple_projection": _LABELS,
    },
    "addition_embed_type": {
        "image": _IMAGES,
        "image_hint": _IMAGES,
        "text_image": _IMAGES,
    },
    "encoder_hid_dim_type": {
        "image_proj": _IMAGES,
        "text_image_proj": _IMAGES,
        "ip_image_proj": _IMAGES,
    },
}


def check_embeddings(config: Config, reads_text: bool, where: str) -> None:
    """Raise UsageError if a diffusers UNet is fed what neither class ids nor prompts give it.

    reads_text: whether the folder has a text encoder. where: the config, for messages.
    """
    way = "wrap the model in Python, --teacher module:factory"
    network = config.get("_class_name")
    for name, odd in _ODD_EMBEDDINGS.items():
        kind = config.get(name) if network in _EMBED.get(name, ()) else None
        if isinstance(kind, str) and kind in odd:
            raise UsageError(f"{where}: {name} '{kind}' takes {odd[kind]}; {way}")
    if network != "UNet2DConditionModel":
        return
    if config.get("time_cond_proj_dim"):
        raise UsageError(
            f"{where}: time_cond_proj_dim takes an embedding of the guidance scale, as of models "
            f"that were distilled to few steps; distil the model that this one came from, or {way}"
        )
    if reads_text and config.get("num_class_embeds"):
        raise UsageError(f"{where}: num_class_embeds beside prompts is not supported; {way}")
    if not reads_text and _attends(config):
        raise UsageError(
            f"{where}: UNet2DConditionModel with cross-attention is conditioned on text, but the "
            "folder lists no text encoder: give a folder with text_encoder and tokenizer, or "
            f"{way}"
        )


def _attends(config: Config) -> bool:
    """Whether a UNet2DConditionModel has blocks that attend to a text."""
    middle = config.get("mid_block_type", "UNetMidBlock2DCrossAttn")
    blocks = [middle, *config.get("down_block_types", ["CrossAttn"])]
    return any("CrossAttn" in str(block) for block in [*blocks, *config.get("up_block_types", [])])


def _nothing(config: Config, shape: tuple[int, ...], bundle: Bundle) -> Condition:
    del config, shape, bundle
    return {}


def _sdxl_sizes(config: Config, shape: tuple[int, ...], bundle: Bundle) -> Condition:
    """SDXL's micro-conditions: original size, crop corner, target size, in pixels."""
    if config.get("addition_embed_type") != "text_time":
        return {}
    if bundle.pipeline != "StableDiffusionXLPipeline":
        raise UsageError(
            f"addition_embed_type text_time takes the pooled embedding of a second text encoder, "
            f"and {bundle.pipeline} has one alone: give a folder with text_encoder_2 and "
            "tokenizer_2"
        )
    if bundle.entries.get("requires_aesthetics_score"):
        raise UsageError("the refiner of SDXL goes on from another model's pictures: distil SDXL")
    height, width = pixels(shape, bundle)
    return {"time_ids": torch.tensor([height, width, 0, 0, height, width], dtype=torch.float32)}


def _pixart_sizes(config: Config, shape: tuple[int, ...], bundle: Bundle) -> Condition:
    """PixArt-alpha of 1024 pixels is told resolution and aspect ratio."""
    asked = config.get("use_additional_conditions")
    if not (config.get("sample_size") == 128 if asked is None else asked):
        return {}
    height, width = pixels(shape, bundle)
    return {
        "resolution": torch.tensor([float(height), float(width)]),
        "aspect_ratio": torch.tensor([height / width]),
    }


def pixels(shape: tuple[int, ...], bundle: Bundle) -> tuple[int, int]:
    """Height and width in pixels of a latent shape (C, ..., H, W)."""
    config = bundle.autoencoder.config if bundle.autoencoder else {}
    levels = config.get("block_out_channels") or config.get("encoder_block_out_channels") or [0]
    factor = config.get("scale_factor_spatial") or 2 ** (len(levels) - 1)
    return shape[-2] * factor, shape[-1] * factor


@dataclass(frozen=True)
class Facts:
    """Sample shape, patch size and constant conditions of a network class.

    shape: (config, asked size) -> (C, ...). patch: side of a token, from the config; it decides
        the length of the sequence. constants: (config, shape, bundle) -> what is always fed.
    reads_text: whether it is fed the embedding of a prompt.
    """

    class_name: str
    shape: Callable[[Config, Size], tuple[int, ...]] = _shape
    patch: Callable[[Config], int] = lambda config: int(config.get("patch_size") or 1)
    constants: Callable[[Config, tuple[int, ...], Bundle], Condition] = _nothing
    reads_text: bool = False


FACTS = {
    facts.class_name: facts
    for facts in (
        Facts("UNet2DModel"),
        Facts("AdmUNet"),
        Facts("SongUNet"),
        Facts("DhariwalUNet"),
        Facts("EDM2UNet"),
        Facts("LucidrainsUNet"),
        Facts(OWN_CLASS, _own_shape),
        Facts("UVit", _any_shape, lambda _: 1),
        Facts("LinearTransformer", _any_shape, lambda _: 1),
        Facts("MobileUNet", _any_shape),
        Facts("ResidualMLP", _any_shape),
        Facts("UNet1DModel", _audio_shape),
        Facts("DiTTransformer2DModel"),
        Facts("UNet2DConditionModel", constants=_sdxl_sizes, reads_text=True),
        Facts("PixArtTransformer2DModel", constants=_pixart_sizes, reads_text=True),
        Facts("SD3Transformer2DModel", reads_text=True),
        Facts("FluxTransformer2DModel", _flux_shape, lambda _: 2, reads_text=True),
        Facts("SanaTransformer2DModel", reads_text=True),
        Facts("Lumina2Transformer2DModel", reads_text=True),
        Facts("WanTransformer3DModel", _video_shape, lambda _: 1, reads_text=True),
    )
}
