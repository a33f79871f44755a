"""A UNet of depthwise-separable convolutions: inverted residuals (MobileNetV2, arXiv 1801.04381).

Samples may be audio, images or videos of any size that can be halved.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from dkdm.networks.parts import (
    CONVOLUTIONS,
    Attention,
    ConditionedNetwork,
    GroupNorm,
    projection,
    summed,
    zeroed,
)

GROUPS = 8
HEAD_CHANNELS = 32


class MobileUNet(ConditionedNetwork):
    """Attention is at the lowest resolution only; time, class and pooled text scale and shift.

    sample_size: one number a side, (height, width) for images. block_out_channels: widths of the
    levels, the highest resolution first. layers_per_block: blocks of a level, each way. expansion:
    how much wider a block is inside. The rest as in ConditionedNetwork.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: tuple[int, ...] = (32, 32),
        in_channels: int = 3,
        out_channels: int = 3,
        block_out_channels: tuple[int, ...] = (32, 64, 96),
        layers_per_block: int = 1,
        expansion: int = 4,
        num_class_embeds: int | None = None,
        cross_attention_dim: int | None = None,
        pooled_projection_dim: int | None = None,
    ) -> None:
        super().__init__()
        widths, rank = list(block_out_channels), len(sample_size)
        conv, width = CONVOLUTIONS[rank - 1], 4 * widths[0]
        self.time_channels = widths[0]
        self.time = nn.Sequential(nn.Linear(widths[0], width), nn.SiLU(), nn.Linear(width, width))
        self.classes = nn.Embedding(num_class_embeds, width) if num_class_embeds else None
        self.pooled = projection(pooled_projection_dim, width)
        self.text = projection(cross_attention_dim, widths[-1])
        block = partial(Block, conv=conv, expansion=expansion, emb_width=width)
        more = layers_per_block - 1
        self.first = conv(in_channels, widths[0], 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for level, inner in enumerate(widths):
            before, stride = (widths[level - 1], 2) if level else (inner, 1)
            rest = [block(inner, inner) for _ in range(more)]
            self.down.append(nn.ModuleList([block(before, inner, stride=stride), *rest]))
        lowest = widths[-1]
        self.middle = nn.ModuleList([block(lowest, lowest), block(lowest, lowest)])
        heads = max(1, lowest // HEAD_CHANNELS)
        self.attention = Attention(lowest, heads)
        self.reading = Attention(lowest, heads) if cross_attention_dim else None
        for above, inner in zip(widths[-2::-1], widths[:0:-1], strict=True):
            rest = [block(above, above) for _ in range(more)]
            self.up.append(nn.ModuleList([block(inner + above, above), *rest]))
        self.norm = GroupNorm(GROUPS, widths[0])
        self.last = zeroed(conv(widths[0], out_channels, 3, padding=1))

    def _output(
        self, x: Tensor, vectors: list[Tensor], text: Tensor | None, mask: Tensor | None
    ) -> Tensor:
        factor = 2 ** (len(self.down) - 1)
        if any(side % factor for side in x.shape[2:]):
            sides = tuple(x.shape[2:])
            raise ValueError(f"samples of {sides}: every side must be divisible by {factor}")
        emb, x, skips = F.silu(summed(vectors)), self.first(x), []
        for level in self.down:
            x = self._through(level, x, emb)
            skips.append(x)
        x = self._through(self.middle[:1], x, emb)
        x = self._attended(x, text, mask)
        x = self._through(self.middle[1:], x, emb)
        for level, skip in zip(self.up, skips[-2::-1], strict=True):
            x = torch.cat([F.interpolate(x, scale_factor=2.0, mode="nearest"), skip], dim=1)
            x = self._through(level, x, emb)
        return self.last(F.silu(self.norm(x)))

    def _attended(self, x: Tensor, text: Tensor | None, mask: Tensor | None) -> Tensor:
        places = x.flatten(2).transpose(1, 2)
        places = places + self.attention(places)
        if self.reading is not None:
            places = places + self.reading(places, text, mask)
        return places.transpose(1, 2).unflatten(2, tuple(x.shape[2:]))

    def _through(self, blocks: Any, x: Tensor, emb: Tensor) -> Tensor:
        for block in blocks:
            x = self._run(block, x, emb)
        return x


class Block(nn.Module):
    """An inverted residual: wide inside, where each channel is convolved by itself."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        conv: type[nn.Module],
        expansion: int,
        emb_width: int,
        stride: int = 1,
    ) -> None:
        super().__init__()
        inner, self.stride = expansion * in_channels, stride
        self.told = nn.Linear(emb_width, 2 * in_channels)
        self.norm = GroupNorm(GROUPS, in_channels)
        self.expand = conv(in_channels, inner, 1)
        self.depthwise = conv(inner, inner, 3, stride, 1, groups=inner, bias=False)
        self.inner_norm = GroupNorm(GROUPS, inner)
        self.project = conv(inner, out_channels, 1)
        same = in_channels == out_channels
        self.shortcut = nn.Identity() if same else conv(in_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x: [B, in_channels, ...]; emb: [B, emb_width]. Returns [B, out_channels, ...]."""
        told = self.told(emb)
        scale, shift = told.reshape(*told.shape, *[1] * (x.ndim - 2)).chunk(2, dim=1)
        h = F.silu(self.expand(self.norm(x) * (1 + scale) + shift))
        h = self.project(F.silu(self.inner_norm(self.depthwise(h))))
        if self.stride > 1:
            pool = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[x.ndim - 3]
            x = pool(x, self.stride)
        return self.shortcut(x) + h
