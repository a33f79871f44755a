"""Named networks that fit themselves to a sample shape and a conditioning.

UNet sizes named by parameters are the paper's (DKDM, supplement), the ADM network of arXiv
2105.05233: `adm-*` as it is, `unet-*` built from UNet2DModel, which stock pipelines can sample: the
same layers and number of parameters, other initial weights.
DiT sizes follow arXiv 2212.09748, table 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import Literal

from torch import nn

from dkdm.conditioning import ClassLabels, Conditioning
from dkdm.errors import UsageError
from dkdm.prompts import Prompts


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
    attention: Container[int],
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
    _check_halvings(height, width, len(channels))
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


def adm(
    shape: tuple[int, ...],
    out_channels: int,
    conditioning: Conditioning,
    channels: tuple[int, ...],
    blocks: int,
    attention: Container[int],
    dropout: float = 0.0,
) -> nn.Module:
    """dkdm's AdmUNet: the paper's own network, weight for weight (arXiv 2105.05233).

    attention: heights as in `unet`. Raises UsageError where the sample shape cannot be halved as
    often as there are levels.
    """
    from dkdm.networks.adm import AdmUNet

    in_channels, height, width = _image_shape(shape)
    _check_halvings(height, width, len(channels))
    factors = tuple(2**level for level in range(len(channels)))
    return AdmUNet(
        sample_size=height if height == width else (height, width),
        in_channels=in_channels,
        out_channels=out_channels,
        model_channels=channels[0],
        num_res_blocks=blocks,
        channel_mult=tuple(width // channels[0] for width in channels),
        attention_resolutions=tuple(f for f in factors if height // f in attention),
        num_head_channels=32,
        resblock_updown=True,
        dropout=dropout,
        num_class_embeds=_num_embeddings(conditioning),
    )


def _check_halvings(height: int, width: int, levels: int) -> None:
    halvings = 2 ** (levels - 1)
    if height % halvings or width % halvings:
        raise UsageError(
            f"a UNet of {levels} levels needs height and width divisible by {halvings}; "
            f"the samples are {height}x{width}"
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
    side = patch or _patch(height)
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


def _patch(height: int) -> int:
    return next(p for p in (8, 4, 2, 1) if height >= 8 * p or p == 1)


def mmdit(
    shape: tuple[int, ...],
    out_channels: int,
    conditioning: Conditioning,
    width: int,
    depth: int,
    patch: int | None = None,
) -> nn.Module:
    """diffusers' SD3Transformer2DModel: image and text tokens attend to each other (MM-DiT).

    patch: as in `dit`. Raises UsageError for a teacher without text.
    """
    from diffusers import SD3Transformer2DModel

    in_channels, height, columns = _image_shape(shape)
    side = patch or _patch(height)
    if height != columns or height % side:
        raise UsageError(
            f"an MM-DiT with patches of {side} needs square samples divisible by {side}; "
            f"the samples are {height}x{columns}"
        )
    text, pooled = _text_widths(conditioning, "an MM-DiT")
    if pooled is None:
        raise UsageError("an MM-DiT needs a pooled text embedding, and the teacher has none")
    return SD3Transformer2DModel(
        sample_size=height,
        patch_size=side,
        in_channels=in_channels,
        out_channels=out_channels,
        num_layers=depth,
        attention_head_dim=32,
        num_attention_heads=width // 32,
        joint_attention_dim=text,
        caption_projection_dim=width,
        pooled_projection_dim=pooled,
        pos_embed_max_size=height // side,
    )


def text_unet(
    shape: tuple[int, ...],
    out_channels: int,
    conditioning: Conditioning,
    channels: tuple[int, ...],
    blocks: int,
) -> nn.Module:
    """diffusers' UNet2DConditionModel: text by cross-attention at all resolutions but the first.

    Raises UsageError for a teacher without text. Samples whose sides cannot be halved often enough
    are upsampled to the size that they had.
    """
    from diffusers import UNet2DConditionModel

    in_channels, height, width = _image_shape(shape)
    text, _ = _text_widths(conditioning, "this UNet")
    attends = [level > 0 or len(channels) == 1 for level in range(len(channels))]
    down, up = ("DownBlock2D", "CrossAttnDownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
    return UNet2DConditionModel(
        sample_size=height if height == width else (height, width),
        in_channels=in_channels,
        out_channels=out_channels,
        layers_per_block=blocks,
        block_out_channels=channels,
        down_block_types=tuple(down[a] for a in attends),
        up_block_types=tuple(up[a] for a in reversed(attends)),
        cross_attention_dim=text,
        attention_head_dim=tuple(max(1, c // 32) for c in channels),
        norm_num_groups=math.gcd(32, *channels),
    )


def _text_widths(conditioning: Conditioning, what: str) -> tuple[int, int | None]:
    """Widths of a token's and of the pooled text embedding."""
    if not isinstance(conditioning, Prompts):
        raise UsageError(f"{what} needs a text-conditional teacher")
    tokens = conditioning.shape_of("encoder_hidden_states")
    pooled = conditioning.shape_of("pooled_projections")
    if tokens is None:
        raise UsageError(f"{what} needs text embeddings, and the teacher has none")
    return tokens[-1], None if pooled is None else pooled[-1]


def _image_shape(shape: tuple[int, ...]) -> tuple[int, int, int]:
    if len(shape) != 3:
        raise UsageError(
            f"this preset is for images (channels, height, width); the samples have shape {shape}"
        )
    return shape[0], shape[1], shape[2]


def _unet(name: str, summary: str, **sizes: object) -> Preset:
    return Preset(name, summary, lambda s, o, c: unet(s, o, c, **sizes))  # type: ignore[arg-type]


def _like_adm(name: str, summary: str, width: int, blocks: int, dropout: float = 0.0) -> Preset:
    """The paper's networks as UNet2DModel."""
    return _unet(name, summary, **_paper_sizes(width, blocks, dropout), resample="resnet")


def _adm(name: str, summary: str, width: int, blocks: int, dropout: float = 0.0) -> Preset:
    """The paper's networks as AdmUNet."""
    sizes = _paper_sizes(width, blocks, dropout)
    return Preset(name, summary, lambda s, o, c: adm(s, o, c, **sizes))  # type: ignore[arg-type]


def _paper_sizes(width: int, blocks: int, dropout: float) -> dict[str, object]:
    """Widths 1, 2, 2, 2, attention at 16 and 8 pixels."""
    channels = (width, 2 * width, 2 * width, 2 * width)
    return {"channels": channels, "blocks": blocks, "attention": (16, 8), "dropout": dropout}


def _dit(name: str, summary: str, **sizes: object) -> Preset:
    return Preset(name, summary, lambda s, o, c: dit(s, o, c, **sizes))  # type: ignore[arg-type]


def _mmdit(name: str, summary: str, **sizes: object) -> Preset:
    return Preset(name, summary, lambda s, o, c: mmdit(s, o, c, **sizes))  # type: ignore[arg-type]


def _text_unet(name: str, summary: str, **sizes: object) -> Preset:
    return Preset(name, summary, lambda s, o, c: text_unet(s, o, c, **sizes))  # type: ignore[arg-type]


PRESETS = {
    preset.name: preset
    for preset in (
        _unet("unet-mini", "three narrow levels, for minutes on a CPU",
              channels=(24, 48, 72), blocks=1, attention=(4,)),
        _unet("unet-tiny", "three levels, for 16x16 to 32x32 on a CPU",
              channels=(32, 64, 96), blocks=1, attention=(4,)),
        _like_adm("unet-14m", "the paper's 14 M student: 64 channels, 3 blocks", 64, 3),
        _like_adm("unet-24m", "the paper's 24 M student: 96 channels, 2 blocks", 96, 2),
        _like_adm("unet-32m", "the paper's 32 M student: 96 channels, 3 blocks", 96, 3),
        _like_adm("unet-44m", "the paper's 44 M student: 128 channels, 2 blocks", 128, 2),
        _like_adm("unet-57m", "the paper's teacher's size: 128 channels, 3 blocks", 128, 3, 0.3),
        _adm("adm-14m", "unet-14m as AdmUNet: 64 channels, 3 blocks", 64, 3),
        _adm("adm-24m", "unet-24m as AdmUNet: 96 channels, 2 blocks", 96, 2),
        _adm("adm-32m", "unet-32m as AdmUNet: 96 channels, 3 blocks", 96, 3),
        _adm("adm-44m", "unet-44m as AdmUNet: 128 channels, 2 blocks", 128, 2),
        _adm("adm-57m", "unet-57m as AdmUNet: 128 channels, 3 blocks", 128, 3, 0.3),
        _dit("dit-tiny", "a small transformer, for minutes on a CPU", width=64, depth=4, heads=2),
        _dit("dit-xs", "a small transformer, for an hour on a CPU", width=96, depth=4, heads=3),
        _dit("dit-s", "DiT-S", width=384, depth=12, heads=6),
        _dit("dit-b", "DiT-B", width=768, depth=12, heads=12),
        _dit("dit-l", "DiT-L", width=1024, depth=24, heads=16),
        _unet("unet-latent", "one level, all attention, for latents of 4 to 16 pixels a side",
              channels=(64,), blocks=2, attention=range(4, 17)),
        _mmdit("mmdit-tiny", "a small SD3 transformer, for an hour on a CPU", width=96, depth=5),
        _text_unet("text-unet-tiny", "a small text UNet, for an hour on a CPU",
                   channels=(64,), blocks=2),
    )
}  # fmt: skip
