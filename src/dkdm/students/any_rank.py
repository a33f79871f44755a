"""Students for samples of any rank: vectors, audio, images and videos."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import diffusers
from torch import nn

from dkdm.core.denoisers.kinds import kind_of
from dkdm.errors import UsageError
from dkdm.networks import network_class
from dkdm.students.interface import Interface, check_halvings, patch_sides, preset

ATTENDED_PLACES = 1024


def transformer(interface: Interface, name: str, **sizes: int) -> nn.Module:
    """One of dkdm's transformers, UVit or LinearTransformer. Raises as `patch_sides`."""
    return _network(interface, name, patch_size=patch_sides(interface), **sizes)


def mobile(interface: Interface, channels: tuple[int, ...], blocks: int) -> nn.Module:
    """dkdm's MobileUNet, with more levels if attention would be over too many places.

    Raises UsageError for vectors, and if a side cannot be halved as often as there are levels.
    """
    sides = interface.shape_of("audio", "images", "videos")[1:]
    channels = _deep_enough(sides, channels)
    check_halvings(interface, len(channels))
    sizes = {"block_out_channels": channels, "layers_per_block": blocks}
    return _network(interface, "MobileUNet", **sizes)


def unet_1d(interface: Interface, channels: tuple[int, ...]) -> nn.Module:
    """diffusers' UNet1DModel, for audio without conditions; attention is in its middle only.

    Raises UsageError for other samples, for conditions, and for a length that cannot be halved as
    often as there are levels, the middle included.
    """
    in_channels, length = interface.shape_of("audio")
    if kind_of(interface.conditioning).asks:
        raise UsageError("UNet1DModel takes no classes and no text, which this teacher has")
    channels = _deep_enough((length,), channels)
    check_halvings(interface, len(channels) + 1)
    inner = len(channels) - 1
    return diffusers.UNet1DModel(
        sample_size=length,
        in_channels=in_channels,
        out_channels=interface.out_channels,
        extra_in_channels=channels[0],  # the sinusoids of the time
        time_embedding_type="positional",
        block_out_channels=channels,
        down_block_types=("DownBlock1DNoSkip", *["DownBlock1D"] * inner),
        up_block_types=(*["UpBlock1D"] * inner, "UpBlock1DNoSkip"),
    )


def mlp(interface: Interface, width: int, depth: int) -> nn.Module:
    """dkdm's ResidualMLP, which flattens its samples. Raises UsageError for images and videos."""
    interface.shape_of("vectors", "audio")  # it knows no neighbours
    return _network(interface, "ResidualMLP", width=width, depth=depth)


def _network(interface: Interface, name: str, **sizes: Any) -> nn.Module:
    network: nn.Module = network_class(name)(
        sample_size=interface.sample_shape[1:],
        in_channels=interface.sample_shape[0],
        out_channels=interface.out_channels,
        num_class_embeds=interface.num_class_embeds,
        cross_attention_dim=interface.text_width("encoder_hidden_states"),
        pooled_projection_dim=interface.text_width("pooled_projections"),
        **sizes,
    )
    return network


def _deep_enough(sides: tuple[int, ...], channels: tuple[int, ...]) -> tuple[int, ...]:
    """Add levels of the last width while the lowest has many places and can be halved."""
    sides = tuple(side >> (len(channels) - 1) for side in sides)
    while math.prod(sides) > ATTENDED_PLACES and not any(side % 2 for side in sides):
        channels, sides = (*channels, channels[-1]), tuple(side // 2 for side in sides)
    return channels


UVIT = partial(transformer, name="UVit")
LINEAR = partial(transformer, name="LinearTransformer")
CPU = "for minutes on a CPU"
VECTORS = "a residual MLP for vectors and short signals"
PRESETS = [
    preset("uvit-tiny", f"a small U-ViT, {CPU}", UVIT, width=96, depth=5, heads=3),
    preset("uvit-s", "U-ViT-S (arXiv 2209.12152)", UVIT, width=512, depth=13, heads=8),
    preset("uvit-m", "U-ViT-M (arXiv 2209.12152)", UVIT, width=768, depth=17, heads=12),
    preset("linear-tiny", f"a small transformer of linear attention, {CPU}",
           LINEAR, width=96, depth=4, heads=3),
    preset("linear-s", "linear attention in the size of DiT-S, for many tokens",
           LINEAR, width=384, depth=12, heads=12),
    preset("mobile-tiny", f"depthwise convolutions, {CPU}",
           mobile, channels=(32, 64, 96), blocks=1),
    preset("mobile-s", "depthwise convolutions",
           mobile, channels=(64, 128, 256), blocks=2),
    preset("unet-1d-tiny", "a small UNet for audio, unconditional", unet_1d, channels=(32, 32, 64)),
    preset("mlp-tiny", f"{VECTORS}, {CPU}", mlp, width=128, depth=4),
    preset("mlp-s", VECTORS, mlp, width=512, depth=6),
]  # fmt: skip
