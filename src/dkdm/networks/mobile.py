"""A UNet of depthwise-separable convolutions: inverted residuals (MobileNetV2, arXiv 1801.04381).

Samples may be audio, images or videos of any size that can be halved. This file needs torch and
diffusers alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn

GROUPS = 8
HEAD_CHANNELS = 32


class MobileUNet(ModelMixin, ConfigMixin):
    """Attention is at the lowest resolution only; time, class and pooled text scale and shift.

    sample_size: one number a side, (height, width) for images. block_out_channels: widths of the
    levels, the highest resolution first. layers_per_block: blocks of a level, each way. expansion:
    how much wider a block is inside. num_class_embeds: class ids; None is unconditional.
    cross_attention_dim, pooled_projection_dim: width of the text's tokens and of its pooled
    embedding; None is without.
    """

    _supports_gradient_checkpointing = True

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
        self.gradient_checkpointing = False
        widths, rank = list(block_out_channels), len(sample_size)
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1]
        width = 4 * widths[0]
        self.time = nn.Sequential(nn.Linear(widths[0], width), nn.SiLU(), nn.Linear(width, width))
        self.classes = nn.Embedding(num_class_embeds, width) if num_class_embeds else None
        self.pooled = _projection(pooled_projection_dim, width)
        self.text = _projection(cross_attention_dim, widths[-1])
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
        self.attention = Attention(lowest)
        self.reading = Attention(lowest) if cross_attention_dim else None
        for above, inner in zip(widths[-2::-1], widths[:0:-1], strict=True):
            rest = [block(above, above) for _ in range(more)]
            self.up.append(nn.ModuleList([block(inner + above, above), *rest]))
        self.norm = nn.GroupNorm(GROUPS, widths[0])
        self.last = conv(widths[0], out_channels, 3, padding=1)
        for parameter in self.last.parameters():
            nn.init.zeros_(parameter)

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        class_labels: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        pooled_projections: Tensor | None = None,
    ) -> Tensor:
        """The network's output [B, out_channels, ...] for x [B, in_channels, ...].

        timesteps: [B], may be fractions; class_labels: int64 [B]; encoder_hidden_states: [B, N, D];
        encoder_attention_mask: [B, N], 0 for padding; pooled_projections: [B, D]. Raises ValueError
        for sides that cannot be halved, and for conditions that are missing or not known.
        """
        check_given(self.config, class_labels, encoder_hidden_states, pooled_projections)
        factor = 2 ** (len(self.down) - 1)
        if any(side % factor for side in x.shape[2:]):
            sides = tuple(x.shape[2:])
            raise ValueError(f"samples of {sides}: every side must be divisible by {factor}")
        emb = self._embedded(timesteps, class_labels, pooled_projections, x.dtype)
        x, skips = self.first(x), []
        for level in self.down:
            x = self._run(level, x, emb)
            skips.append(x)
        x = self._run(self.middle[:1], x, emb)
        x = self._attended(x, encoder_hidden_states, encoder_attention_mask)
        x = self._run(self.middle[1:], x, emb)
        for level, skip in zip(self.up, skips[-2::-1], strict=True):
            x = torch.cat([F.interpolate(x, scale_factor=2.0, mode="nearest"), skip], dim=1)
            x = self._run(level, x, emb)
        output: Tensor = self.last(F.silu(self.norm(x)))
        return output

    def _embedded(
        self,
        timesteps: Tensor,
        class_labels: Tensor | None,
        pooled: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        """Time, class and pooled text as one vector [B, D]."""
        sinusoids = get_timestep_embedding(timesteps, self.config.block_out_channels[0], True, 0)
        emb = self.time(sinusoids.to(dtype))
        if self.classes is not None:
            emb = emb + self.classes(class_labels)
        if self.pooled is not None:
            emb = emb + self.pooled(pooled)
        return F.silu(emb)

    def _attended(self, x: Tensor, text: Tensor | None, mask: Tensor | None) -> Tensor:
        places = x.flatten(2).transpose(1, 2)
        places = places + self.attention(places)
        if self.reading is not None and self.text is not None:
            visible = None if mask is None else mask.to(torch.bool)[:, None, None]
            places = places + self.reading(places, self.text(text), visible)
        return places.transpose(1, 2).unflatten(2, tuple(x.shape[2:]))

    def _run(self, blocks: Any, x: Tensor, emb: Tensor) -> Tensor:
        """x through one block after the other."""
        recompute = self.gradient_checkpointing and torch.is_grad_enabled()
        for block in blocks:
            x = self._gradient_checkpointing_func(block, x, emb) if recompute else block(x, emb)
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
        self.norm = nn.GroupNorm(GROUPS, in_channels)
        self.expand = conv(in_channels, inner, 1)
        self.depthwise = conv(inner, inner, 3, stride, 1, groups=inner, bias=False)
        self.inner_norm = nn.GroupNorm(GROUPS, inner)
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
        output: Tensor = self.shortcut(x) + h
        return output


class Attention(nn.Module):
    """Attention of places to each other, or to a text."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = max(1, width // HEAD_CHANNELS)
        self.norm = nn.LayerNorm(width)
        self.q, self.kv = (nn.Linear(width, i * width, bias=False) for i in (1, 2))
        self.proj = nn.Linear(width, width)

    def forward(
        self, x: Tensor, text: Tensor | None = None, visible: Tensor | None = None
    ) -> Tensor:
        """x: [B, N, width]; text: [B, M, width], None is x itself; visible: bool [B, 1, 1, M]."""
        h = self.norm(x)
        q = self.q(h).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        pairs = self.kv(h if text is None else text).unflatten(-1, (2, self.heads, -1))
        k, v = pairs.transpose(1, 3).unbind(2)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
        output: Tensor = self.proj(attended.transpose(1, 2).flatten(2))
        return output


def check_given(config: Mapping[str, Any], *conditions: Tensor | None) -> None:
    """Raise ValueError if the conditions are not those that the network was made for."""
    names = ("class_labels", "encoder_hidden_states", "pooled_projections")
    options = ("num_class_embeds", "cross_attention_dim", "pooled_projection_dim")
    for name, option, given in zip(names, options, conditions, strict=True):
        if (config[option] is None) != (given is None):
            wanted = "remove" if given is not None else "give"
            raise ValueError(f"{option} is {config[option]}: {wanted} {name}")


def _projection(features: int | None, width: int) -> nn.Module | None:
    """Of text, whatever its scale."""
    if features is None:
        return None
    return nn.Sequential(nn.LayerNorm(features), nn.Linear(features, width))
