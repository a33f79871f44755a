"""Named networks that fit themselves to a sample shape and a conditioning.

UNet sizes named by parameters are the paper's (DKDM, supplement), the ADM network of arXiv
2105.05233 built from UNet2DModel: the same layers and number of parameters, other initial weights.
DiT sizes follow arXiv 2212.09748, table 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import nn

from dkdm.conditioning import ClassLabels, Conditioning
from dkdm.errors import UsageError


@dataclass(frozen=True)
class Preset:
    """A named student network: what it is, and how to build it.

    build: (sample_shape, out_channels, conditioning) -> module.
    """

    name: str
    summary: str
    build: Callable[[tuple[int, ...], int, Conditioning], nn.Module]


def unet(
    shape: tuple[int, ...],
    out_channels: int,
    conditioning: Conditioning,
    channels: tuple[int, ...],
    blocks: int,
    attention: tuple[int, ...],
    dropout: float = 0.0,
    resample: Literal["conv", "resnet"] = "conv",
) -> nn.Module:
    """diffusers' UNet2DModel with attention, 32 channels a head, at the given heights (in pixels).

    resample: how the resolution changes, and time enters: by a convolution, and added; or as in ADM
    (arXiv 2105.05233, sec. 3) by a residual block, and as scale and shift of the normalization.
    Raises UsageError where the sample shape cannot be halved as often as there are levels.
    """
    from diffusers import UNet2DModel

    in_channels, height, width = _image_shape(shape)
    halvings = 2 ** (len(channels) - 1)
    if height % halvings or width % halvings:
        raise UsageError(
            f"a UNet of {len(channels)} levels needs height and width divisible by {halvings}; "
            f"the samples are {height}x{width}"
        )
    attends = [height // 2**level in attention for level in range(len(channels))]
    down, up = _PLAIN_BLOCKS[resample]
    groups = math.gcd(32, *channels)
    return UNet2DModel(
        sample_size=height if height == width else (height, width),
        in_channels=in_channels,
        out_channels=out_channels,
        layers_per_block=blocks,
        block_out_channels=channels,
        down_block_types=tuple("AttnDownBlock2D" if a else down for a in attends),
        up_block_types=tuple("AttnUpBlock2D" if a else up for a in reversed(attends)),
        downsample_type=resample,
        upsample_type=resample,
        resnet_time_scale_shift="default" if resample == "conv" else "scale_shift",
        attention_head_dim=32,
        norm_num_groups=groups,
        attn_norm_num_groups=groups,  # None would leave it out beside scale and shift
        dropout=dropout,
        num_class_embeds=_num_embeddings(conditioning),
    )


_PLAIN_BLOCKS = {
    "conv": ("DownBlock2D", "UpBlock2D"),
    "resnet": ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D"),
}


def _num_embeddings(conditioning: Conditioning) -> int | None:
    if not isinstance(conditioning, ClassLabels):
        return None
    return max(conditioning.num_classes, (conditioning.null_class or 0) + 1)


def dit(
    shape: tuple[int, ...],
    out_channels: int,
    conditioning: Conditioning,
    width: int,
    depth: int,
    heads: int,
    patch: int | None = None,
) -> nn.Module:
    """diffusers' DiTTransformer2DModel.

    patch: side of a patch in pixels; None takes the largest of 8, 4, 2, 1 that leaves 8x8 tokens.
    Raises UsageError for samples that are not square or not divisible by the patch.
    """
    from diffusers import DiTTransformer2DModel

    in_channels, height, columns = _image_shape(shape)
    side = patch or next(p for p in (8, 4, 2, 1) if height >= 8 * p or p == 1)
    if height != columns or height % side:
        raise UsageError(
            f"a DiT with patches of {side} needs square samples divisible by {side}; "
            f"the samples are {height}x{columns}"
        )
    classes = _num_embeddings(conditioning) or 1
    has_null = isinstance(conditioning, ClassLabels) and conditioning.null_class is not None
    return DiTTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=width // heads,
        in_channels=in_channels,
        out_channels=out_channels,
        num_layers=depth,
        sample_size=height,
        patch_size=side,
        num_embeds_ada_norm=classes - 1 if has_null else classes,
    )


def _image_shape(shape: tuple[int, ...]) -> tuple[int, int, int]:
    if len(shape) != 3:
        raise UsageError(
            f"this preset is for images (channels, height, width); the samples have shape {shape}"
        )
    return shape[0], shape[1], shape[2]


def _unet(name: str, summary: str, **sizes: object) -> Preset:
    return Preset(name, summary, lambda s, o, c: unet(s, o, c, **sizes))  # type: ignore[arg-type]


def _adm(name: str, summary: str, width: int, blocks: int, dropout: float = 0.0) -> Preset:
    """The paper's networks: widths 1, 2, 2, 2, attention at 16 and 8 pixels."""
    channels = (width, 2 * width, 2 * width, 2 * width)
    sizes = {"channels": channels, "blocks": blocks, "attention": (16, 8), "dropout": dropout}
    return _unet(name, summary, **sizes, resample="resnet")


def _dit(name: str, summary: str, **sizes: object) -> Preset:
    return Preset(name, summary, lambda s, o, c: dit(s, o, c, **sizes))  # type: ignore[arg-type]


PRESETS = {
    preset.name: preset
    for preset in (
        _unet("unet-mini", "three narrow levels, for minutes on a CPU",
              channels=(24, 48, 72), blocks=1, attention=(4,)),
        _unet("unet-tiny", "three levels, for 16x16 to 32x32 on a CPU",
              channels=(32, 64, 96), blocks=1, attention=(4,)),
        _adm("unet-14m", "the paper's 14 M student: 64 channels, 3 blocks", 64, 3),
        _adm("unet-24m", "the paper's 24 M student: 96 channels, 2 blocks", 96, 2),
        _adm("unet-32m", "the paper's 32 M student: 96 channels, 3 blocks", 96, 3),
        _adm("unet-44m", "the paper's 44 M student: 128 channels, 2 blocks", 128, 2),
        _adm("unet-57m", "as large as the paper's teacher: 128 channels, 3 blocks", 128, 3, 0.3),
        _dit("dit-tiny", "a small transformer, for minutes on a CPU", width=64, depth=4, heads=2),
        _dit("dit-xs", "a small transformer, for an hour on a CPU", width=96, depth=4, heads=3),
        _dit("dit-s", "DiT-S", width=384, depth=12, heads=6),
        _dit("dit-b", "DiT-B", width=768, depth=12, heads=12),
        _dit("dit-l", "DiT-L", width=1024, depth=24, heads=16),
    )
}  # fmt: skip
