"""Convolutional students: diffusers' UNets and the ADM network, sized by names.

Sizes named by parameters are the paper's (DKDM, supplement), the network of arXiv 2105.05233:
`adm-*` as it is, `unet-*` built from UNet2DModel, which stock pipelines can sample: the same layers
and number of parameters, other initial weights.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Any, Literal

import diffusers
from torch import nn

from dkdm.networks import network_class
from dkdm.students.interface import Interface, Preset, check_halvings, group_size, preset


def unet(
    interface: Interface,
    channels: tuple[int, ...],
    blocks: int,
    attention: Container[int],
    dropout: float = 0.0,
    resample: Literal["conv", "resnet"] = "conv",
) -> nn.Module:
    """diffusers' UNet2DModel with attention, 32 channels a head, at the given heights (in pixels).

    resample: how the resolution changes, and time enters: by a convolution, and added; or as in ADM
    (arXiv 2105.05233, sec. 3) by a residual block, and as scale and shift of the normalization.
    Raises UsageError if the sample shape cannot be halved as often as there are levels.
    """
    in_channels, height, _ = interface.shape_of("images")
    check_halvings(interface, len(channels))
    attends = [height // 2**level in attention for level in range(len(channels))]
    down, up = _PLAIN_BLOCKS[resample]
    groups = group_size(*channels)
    return diffusers.UNet2DModel(
        sample_size=interface.sample_size,
        in_channels=in_channels,
        out_channels=interface.out_channels,
        layers_per_block=blocks,
        block_out_channels=channels,
        down_block_types=tuple("AttnDownBlock2D" if a else down for a in attends),
        up_block_types=tuple("AttnUpBlock2D" if a else up for a in reversed(attends)),
        downsample_type=resample,
        upsample_type=resample,
        resnet_time_scale_shift="default" if resample == "conv" else "scale_shift",
        attention_head_dim=min(32, channels[-1]),
        norm_num_groups=groups,
        attn_norm_num_groups=groups,  # None would leave it out beside scale and shift
        dropout=dropout,
        num_class_embeds=interface.num_class_embeds,
    )


_PLAIN_BLOCKS = {
    "conv": ("DownBlock2D", "UpBlock2D"),
    "resnet": ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D"),
}


def adm(
    interface: Interface,
    channels: tuple[int, ...],
    blocks: int,
    attention: Container[int],
    dropout: float = 0.0,
    resample: Literal["conv", "resnet"] = "resnet",
) -> nn.Module:
    """dkdm's AdmUNet: the paper's network, weight for weight (arXiv 2105.05233).

    attention, resample: as in `unet`; latent diffusion has conv (arXiv 2112.10752). Raises
    UsageError as `unet` does.
    """
    in_channels, height, _ = interface.shape_of("images")
    check_halvings(interface, len(channels))
    factors = tuple(2**level for level in range(len(channels)))
    network: nn.Module = network_class("AdmUNet")(
        sample_size=interface.sample_size,
        in_channels=in_channels,
        out_channels=interface.out_channels,
        model_channels=channels[0],
        num_res_blocks=blocks,
        channel_mult=tuple(width // channels[0] for width in channels),
        attention_resolutions=tuple(f for f in factors if height // f in attention),
        num_head_channels=32,
        resblock_updown=resample == "resnet",
        use_scale_shift_norm=resample == "resnet",
        dropout=dropout,
        num_class_embeds=interface.num_class_embeds,
    )
    return network


def text_unet(interface: Interface, channels: tuple[int, ...], blocks: int) -> nn.Module:
    """diffusers' UNet2DConditionModel: text by cross-attention at all resolutions but the first.

    Raises UsageError for a teacher without text. Samples whose sides cannot be halved often enough
    are upsampled to the size that they had.
    """
    attends = [level > 0 or len(channels) == 1 for level in range(len(channels))]
    down, up = ("DownBlock2D", "CrossAttnDownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
    return diffusers.UNet2DConditionModel(
        sample_size=interface.sample_size,
        in_channels=interface.shape_of("images")[0],
        out_channels=interface.out_channels,
        layers_per_block=blocks,
        block_out_channels=channels,
        down_block_types=tuple(down[a] for a in attends),
        up_block_types=tuple(up[a] for a in reversed(attends)),
        cross_attention_dim=interface.needed_text_width("encoder_hidden_states"),
        attention_head_dim=tuple(max(1, c // 32) for c in channels),
        norm_num_groups=group_size(*channels),
    )


def _paper(name: str, summary: str, width: int, blocks: int, dropout: float = 0.0) -> list[Preset]:
    """The paper's network, widths 1, 2, 2, 2 and attention at 16 and 8 pixels, both ways."""
    sizes: dict[str, Any] = {
        "channels": (width, 2 * width, 2 * width, 2 * width),
        "blocks": blocks,
        "attention": (16, 8),
        "dropout": dropout,
    }
    how = f"{width} channels, {blocks} blocks"
    return [
        preset(f"unet-{name}", f"{summary}: {how}", unet, **sizes, resample="resnet"),
        preset(f"adm-{name}", f"unet-{name} as AdmUNet: {how}", adm, **sizes),
    ]


PRESETS = [
    preset("unet-mini", "three narrow levels, for minutes on a CPU",
           unet, channels=(24, 48, 72), blocks=1, attention=(4,)),
    preset("unet-tiny", "three levels, for 16x16 to 32x32 on a CPU",
           unet, channels=(32, 64, 96), blocks=1, attention=(4,)),
    *_paper("14m", "the paper's 14 M student", 64, 3),
    *_paper("24m", "the paper's 24 M student", 96, 2),
    *_paper("32m", "the paper's 32 M student", 96, 3),
    *_paper("44m", "the paper's 44 M student", 128, 2),
    *_paper("57m", "the size of the paper's teacher", 128, 3, 0.3),
    preset("ldm-128", "the paper's student of latent diffusion: 128 channels, 2 blocks",
           adm, channels=(128, 256, 384, 512), blocks=2, attention=(32, 16, 8), resample="conv"),
    preset("unet-latent", "one level, all attention, for latents of 4 to 16 pixels a side",
           unet, channels=(64,), blocks=2, attention=range(4, 17)),
    preset("text-unet-tiny", "a small text UNet, for an hour on a CPU",
           text_unet, channels=(64,), blocks=2),
    preset("text-unet-s", "a text UNet of three levels",
           text_unet, channels=(96, 192, 288), blocks=2),
]  # fmt: skip
