"""The UNet of ADM (arXiv 2105.05233), in pixels and, with cross-attention, in latents.

Its weights have the names that they have in openai/guided-diffusion, openai/improved-diffusion,
forever208/DDPM-IP and CompVis/latent-diffusion.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from diffusers import Transformer2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn

from dkdm.networks.parts import GroupNorm, Network, attend, zeroed

GROUPS = 32


class AdmUNet(Network):
    """A UNet of residual blocks with self-attention, or with cross-attention to a class token.

    attention_resolutions: attention is where the image is this many times smaller. channel_mult:
    widths of the levels, in `model_channels`. num_head_channels: width of a head; None takes
    `num_heads` heads (`num_heads_upsample` on the way up, None is as many). use_scale_shift_norm:
    time scales and shifts the normalization, instead of being added. resblock_updown: residual
    blocks resample; otherwise a convolution does (`conv_resample`), or nothing learned.
    use_new_attention_order: q, k and v are split before the heads. num_class_embeds: class ids,
    added to the time; None is unconditional. context_dim: width of the token that the class is
    instead, attended to by `transformer_depth` transformer blocks.
    """

    @register_to_config
    def __init__(  # noqa: PLR0913
        self,
        sample_size: int | tuple[int, int] = 32,
        in_channels: int = 3,
        out_channels: int = 3,
        model_channels: int = 128,
        num_res_blocks: int = 2,
        channel_mult: tuple[float, ...] = (1, 2, 2, 2),
        attention_resolutions: tuple[int, ...] = (2, 4),
        num_heads: int = 4,
        num_head_channels: int | None = None,
        num_heads_upsample: int | None = None,
        use_scale_shift_norm: bool = True,
        resblock_updown: bool = False,
        conv_resample: bool = True,
        use_new_attention_order: bool = False,
        dropout: float = 0.0,
        num_class_embeds: int | None = None,
        context_dim: int | None = None,
        transformer_depth: int = 1,
    ) -> None:
        super().__init__()
        del sample_size  # said for others: the network takes any size it can halve
        width = 4 * model_channels
        self.time_embed = nn.Sequential(
            nn.Linear(model_channels, width), nn.SiLU(), nn.Linear(width, width)
        )
        self.label_emb = (
            None
            if num_class_embeds is None
            else nn.Embedding(num_class_embeds, context_dim or width)
        )
        widths = [int(mult * model_channels) for mult in channel_mult]
        attends = [2**level in attention_resolutions for level in range(len(widths))]
        block = partial(
            ResBlock, emb_channels=width, dropout=dropout, scale_shift=use_scale_shift_norm
        )
        resample = partial(_resampling, block if resblock_updown else None, conv_resample)

        def attention(channels: int, num_heads: int = num_heads) -> nn.Module:
            heads = _heads(channels, num_heads, num_head_channels)
            if context_dim is None:
                return AttentionBlock(channels, heads, use_new_attention_order)
            return _cross_attention(channels, heads, transformer_depth, context_dim)

        first = Stage(nn.Conv2d(in_channels, widths[0], 3, padding=1))
        down, skips = _way_down(widths, attends, num_res_blocks, block, attention, resample)
        self.input_blocks = nn.ModuleList([first, *down])
        inner = widths[-1]
        self.middle_block = Stage(block(inner, inner), attention(inner), block(inner, inner))
        attention = partial(attention, num_heads=num_heads_upsample or num_heads)
        up = _way_up(widths, attends, [widths[0], *skips], block, attention, resample)
        self.output_blocks = nn.ModuleList(up)
        self.out = nn.Sequential(
            GroupNorm(GROUPS, widths[0]),
            nn.SiLU(),
            zeroed(nn.Conv2d(widths[0], out_channels, 3, padding=1)),
        )

    def forward(self, x: Tensor, timesteps: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """The network's output [B, out_channels, H, W] for x [B, in_channels, H, W].

        timesteps: [B], may be fractions; class_labels: int64 [B]. Raises ValueError if class
        ids are missing, or given to an unconditional network.
        """
        if (class_labels is None) != (self.label_emb is None):
            raise ValueError(
                f"num_class_embeds is {self.config.num_class_embeds}: "
                f"{'remove' if self.label_emb is None else 'give'} class_labels"
            )
        sinusoids = get_timestep_embedding(timesteps, self.config.model_channels, True, 0)
        emb, context = self.time_embed(sinusoids.to(x.dtype)), None
        if self.label_emb is not None and self.config.context_dim is None:
            emb = emb + self.label_emb(class_labels)
        elif self.label_emb is not None:
            context = self.label_emb(class_labels)[:, None]
        h, skips = x, []
        for stage in self.input_blocks:
            h = self._run(stage, h, emb, context)
            skips.append(h)
        h = self._run(self.middle_block, h, emb, context)
        for stage in self.output_blocks:
            h = self._run(stage, torch.cat([h, skips.pop()], dim=1), emb, context)
        return self.out(h)


class Stage(nn.Sequential):
    """Layers one after the other, each fed what it asks for."""

    def forward(  # type: ignore[override]
        self, h: Tensor, emb: Tensor, context: Tensor | None
    ) -> Tensor:
        """h: [B, C, H, W]; emb: [B, D] of the time; context: [B, N, D] or None."""
        for layer in self:
            if isinstance(layer, ResBlock):
                h = layer(h, emb)
            elif isinstance(layer, Transformer2DModel):
                h = layer(h, context, return_dict=False)[0]
            else:
                h = layer(h)
        return h


class ResBlock(nn.Module):
    """Two convolutions with the time in between, and a skip connection around them."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        dropout: float,
        scale_shift: bool,
        resample: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.scale_shift = scale_shift
        self.in_layers = nn.Sequential(
            GroupNorm(GROUPS, in_channels),
            nn.SiLU(),
            nn.Conv2d(in_channels, out_channels, 3, padding=1),
        )
        self.resample = resample or nn.Identity()
        self.emb_layers = nn.Sequential(
            nn.SiLU(), nn.Linear(emb_channels, out_channels * (2 if scale_shift else 1))
        )
        self.out_layers = nn.Sequential(
            GroupNorm(GROUPS, out_channels),
            nn.SiLU(),
            nn.Dropout(dropout),
            zeroed(nn.Conv2d(out_channels, out_channels, 3, padding=1)),
        )
        self.skip_connection = (
            nn.Identity()
            if in_channels == out_channels
            else nn.Conv2d(in_channels, out_channels, 1)
        )

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x: [B, C, H, W]; emb: [B, D]."""
        norm, act, conv = self.in_layers
        h = conv(self.resample(act(norm(x))))
        norm, act, dropout, conv = self.out_layers
        shift = self.emb_layers(emb)[..., None, None]
        if self.scale_shift:
            scale, shift = shift.chunk(2, dim=1)
            h = norm(h) * (1 + scale) + shift
        else:
            h = norm(h + shift)
        return self.skip_connection(self.resample(x)) + conv(dropout(act(h)))


class AttentionBlock(nn.Module):
    """Self-attention between all pixels."""

    def __init__(self, channels: int, heads: int, split_before_heads: bool) -> None:
        super().__init__()
        self.heads = heads
        self.split_before_heads = split_before_heads
        self.norm = GroupNorm(GROUPS, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = zeroed(nn.Conv1d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, C, H, W]."""
        pixels = x.flatten(2)
        qkv = self.qkv(self.norm(pixels))
        if self.split_before_heads:
            parts = qkv.unflatten(1, (3, self.heads, -1)).unbind(1)
        else:
            parts = qkv.unflatten(1, (self.heads, 3, -1)).unbind(2)
        q, k, v = (part.transpose(2, 3) for part in parts)
        h = attend(q, k, v).transpose(2, 3).flatten(1, 2)
        return (pixels + self.proj_out(h)).reshape(x.shape)


class Downsample(nn.Module):
    """Half the size, by a convolution or by the mean of four pixels."""

    def __init__(self, channels: int, learned: bool) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, 2, 1) if learned else nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, C, H, W]."""
        return self.op(x)


class Upsample(nn.Module):
    """Twice the size, each pixel repeated, with or without a convolution after it."""

    def __init__(self, channels: int, learned: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if learned else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, C, H, W]."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


Build = Callable[..., nn.Module]


def _way_down(
    widths: list[int],
    attends: list[bool],
    num_res_blocks: int,
    block: Build,
    attention: Build,
    resample: Build,
) -> tuple[list[Stage], list[int]]:
    """The stages after the first convolution, and the channels of each."""
    stages, skips, channels = [], [], widths[0]
    for level, width in enumerate(widths):
        for _ in range(num_res_blocks):
            layers = [block(channels, width)]
            stages.append(Stage(*layers, *([attention(width)] if attends[level] else [])))
            skips.append(width)
            channels = width
        if level < len(widths) - 1:
            stages.append(Stage(resample(Downsample, width)))
            skips.append(width)
    return stages, skips


def _way_up(
    widths: list[int],
    attends: list[bool],
    skips: list[int],
    block: Build,
    attention: Build,
    resample: Build,
) -> list[Stage]:
    """The stages from the smallest size to the full one; each takes the last skip left."""
    stages, channels, each = [], widths[-1], len(skips) // len(widths)
    for level in reversed(range(len(widths))):
        width = widths[level]
        for i in reversed(range(each)):
            layers = [block(channels + skips.pop(), width)]
            channels = width
            if attends[level]:
                layers.append(attention(width))
            if level and i == 0:
                layers.append(resample(Upsample, width))
            stages.append(Stage(*layers))
    return stages


def _resampling(block: Build | None, learned: bool, kind: Build, channels: int) -> nn.Module:
    """A residual block that resamples; without a block, the resampling alone."""
    if block is None:
        return kind(channels, learned)
    return block(channels, channels, resample=kind(channels, False))


def _heads(channels: int, num_heads: int, num_head_channels: int | None) -> int:
    width = num_head_channels or channels // num_heads
    if channels % width or (num_head_channels is None and channels % num_heads):
        raise ValueError(
            f"attention over {channels} channels cannot have "
            f"{f'{num_heads} heads' if num_head_channels is None else f'heads of {width}'}"
        )
    return channels // width


def _cross_attention(channels: int, heads: int, depth: int, context_dim: int) -> nn.Module:
    transformer = Transformer2DModel(
        heads, channels // heads, channels, num_layers=depth, cross_attention_dim=context_dim
    )
    zeroed(transformer.proj_out)
    return transformer
