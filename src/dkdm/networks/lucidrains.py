"""The UNet of lucidrains/denoising-diffusion-pytorch; its weights are named as there."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import Timesteps
from torch import Tensor, nn

from dkdm.networks.parts import GroupNorm, Network, attend, autocast_type

MEMORIES = 4  # keys and values that every attention layer learns


class LucidrainsUNet(Network):
    """A UNet of two residual blocks and one attention layer a level.

    first_channels: width of the first convolution. block_out_channels: widths that the levels
    lead to; each but the last halves the resolution. full_attention, heads, head_channels: of each
    level's attention, full or linear in the number of pixels. time_channels: sines
    and cosines of the time. fourier: their frequencies are weights, learned or random, and the time
    itself goes with them. emb_channels: of the time after its layers. norm_groups: of the
    normalization in blocks, until version 1.11.1; None normalizes each pixel.
    """

    @register_to_config
    def __init__(  # noqa: PLR0913
        self,
        sample_size: int | tuple[int, int] = 64,
        in_channels: int = 3,
        out_channels: int = 3,
        first_channels: int = 64,
        block_out_channels: tuple[int, ...] = (64, 128, 256, 512),
        full_attention: tuple[bool, ...] = (False, False, False, True),
        heads: tuple[int, ...] = (4, 4, 4, 4),
        head_channels: tuple[int, ...] = (32, 32, 32, 32),
        time_channels: int = 64,
        fourier: bool = False,
        emb_channels: int = 256,
        norm_groups: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        del sample_size  # said for others: the network takes any size it can halve
        self.time_mlp = nn.Sequential(
            Fourier(time_channels) if fourier else Timesteps(time_channels, False, 1),
            nn.Linear(time_channels + 1 if fourier else time_channels, emb_channels),
            nn.GELU(),
            nn.Linear(emb_channels, emb_channels),
        )
        self.init_conv = nn.Conv2d(in_channels, first_channels, 7, padding=3)
        widths = [first_channels, *block_out_channels]
        kinds = [FullAttention if full else LinearAttention for full in full_attention]
        levels = list(zip(widths, widths[1:], kinds, heads, head_channels, strict=False))

        def block(wide: int, wanted: int) -> ResBlock:
            return ResBlock(wide, wanted, emb_channels, norm_groups, dropout)

        self.downs: Any = nn.ModuleList()
        for i, (here, below, attention, count, size) in enumerate(levels):
            last = i == len(levels) - 1
            layers = [block(here, here), block(here, here), attention(here, count, size)]
            leave = conv3(here, below) if last else halved(here, below)
            self.downs.append(nn.ModuleList([*layers, leave]))
        inner = widths[-1]
        self.mid_block1 = block(inner, inner)
        self.mid_attn = FullAttention(inner, heads[-1], head_channels[-1])
        self.mid_block2 = block(inner, inner)
        self.ups: Any = nn.ModuleList()
        for i, (above, here, attention, count, size) in reversed([*enumerate(levels)]):
            wide = here + above
            layers = [block(wide, here), block(wide, here), attention(here, count, size)]
            enter = doubled(here, above) if i > 0 else conv3(here, above)
            self.ups.append(nn.ModuleList([*layers, enter]))
        self.final_res_block = block(2 * first_channels, first_channels)
        self.final_conv = nn.Conv2d(first_channels, out_channels, 1)

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        """The network's output for x [B, C, H, W] at timesteps [B], counted from 0."""
        emb = self.time_mlp[1:](self.time_mlp[0](timesteps.float()).to(x.dtype))
        x = first = self.init_conv(x)
        skips = []
        for block1, block2, attention, leave in self.downs:
            x = self._run(block1, x, emb)
            skips.append(x)
            x = self._run(block2, x, emb)
            x = x + attention(x)
            skips.append(x)
            x = leave(x)
        x = self._run(self.mid_block1, x, emb)
        x = self._run(self.mid_block2, x + self.mid_attn(x), emb)
        for block1, block2, attention, leave in self.ups:
            x = self._run(block1, torch.cat([x, skips.pop()], dim=1), emb)
            x = self._run(block2, torch.cat([x, skips.pop()], dim=1), emb)
            x = leave(x + attention(x))
        x = self._run(self.final_res_block, torch.cat([x, first], dim=1), emb)
        return self.final_conv(x)


class ResBlock(nn.Module):
    """Two convolutions; the time scales and shifts what is between them."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        groups: int | None,
        dropout: float,
    ) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, 2 * out_channels))
        self.block1 = ConvNorm(in_channels, out_channels, groups)
        self.block2 = ConvNorm(out_channels, out_channels, groups)
        differs = in_channels != out_channels
        self.res_conv = nn.Conv2d(in_channels, out_channels, 1) if differs else nn.Identity()
        self.dropout = dropout

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x: [B, C, H, W]; emb: [B, emb_channels]."""
        scale, shift = self.mlp(emb)[:, :, None, None].chunk(2, dim=1)
        h = F.silu(self.block1(x) * (1 + scale) + shift)
        h = F.silu(self.block2(F.dropout(h, self.dropout, self.training)))
        return h + self.res_conv(x)


class ConvNorm(nn.Module):
    """A 3x3 convolution and a normalization, of groups of channels or of each pixel."""

    def __init__(self, in_channels: int, out_channels: int, groups: int | None) -> None:
        super().__init__()
        self.proj = conv3(in_channels, out_channels)
        self.norm = GroupNorm(groups, out_channels) if groups else PixelNorm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, C, H, W]."""
        return self.norm(self.proj(x))


class PixelNorm(nn.Module):
    """Scales the channels of each pixel to a root mean square of 1, then each by its gain."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.ones(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, C, H, W]."""
        scaled = F.normalize(x, dim=1) * self.g * math.sqrt(x.shape[1])
        return scaled.to(autocast_type(x) or scaled.dtype)


class LinearAttention(nn.Module):
    """Attention by a C x C summary of all pixels (arXiv 1812.01243), with learned memories."""

    def __init__(self, channels: int, heads: int, size: int) -> None:
        super().__init__()
        self.norm = PixelNorm(channels)
        self.mem_kv = nn.Parameter(torch.randn(2, heads, size, MEMORIES))
        self.to_qkv = nn.Conv2d(channels, 3 * heads * size, 1, bias=False)
        self.to_out = nn.Sequential(nn.Conv2d(heads * size, channels, 1), PixelNorm(channels))

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, C, H, W]."""
        q, k, v = _heads(self.to_qkv(self.norm(x)), self.mem_kv.shape[1])
        k, v = _remembered(self.mem_kv, k, v, dim=3)
        summary = k.softmax(dim=3) @ v.transpose(2, 3)
        attended = summary.transpose(2, 3) @ (q.softmax(dim=2) / math.sqrt(q.shape[2]))
        return self.to_out(attended.flatten(1, 2).unflatten(2, x.shape[2:]))


class FullAttention(nn.Module):
    """Attention of every pixel to every other, and to learned memories."""

    def __init__(self, channels: int, heads: int, size: int) -> None:
        super().__init__()
        self.norm = PixelNorm(channels)
        self.mem_kv = nn.Parameter(torch.randn(2, heads, MEMORIES, size))
        self.to_qkv = nn.Conv2d(channels, 3 * heads * size, 1, bias=False)
        self.to_out = nn.Conv2d(heads * size, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, C, H, W]."""
        q, k, v = _heads(self.to_qkv(self.norm(x)), self.mem_kv.shape[1]).transpose(3, 4)
        k, v = _remembered(self.mem_kv, k, v, dim=2)
        attended = attend(q, k, v).transpose(2, 3)
        return self.to_out(attended.flatten(1, 2).unflatten(2, x.shape[2:]))


def _heads(qkv: Tensor, heads: int) -> Tensor:
    """[B, 3 * heads * size, H, W] -> [3, B, heads, size, H * W]."""
    return qkv.unflatten(1, (3, heads, -1)).flatten(4).transpose(0, 1)


def _remembered(memory: Tensor, k: Tensor, v: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Keys and values with the learned ones before them."""
    both = memory.to(k.dtype)[:, None].expand(-1, k.shape[0], -1, -1, -1)
    return torch.cat([both[0], k], dim), torch.cat([both[1], v], dim)


def halved(in_channels: int, out_channels: int) -> nn.Sequential:
    """Half the resolution: 2x2 pixels become channels, which a 1x1 convolution mixes."""
    return nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(4 * in_channels, out_channels, 1))


def doubled(in_channels: int, out_channels: int) -> nn.Sequential:
    """Twice the resolution by repetition, and a convolution."""
    return nn.Sequential(nn.Upsample(scale_factor=2), conv3(in_channels, out_channels))


def conv3(in_channels: int, out_channels: int) -> nn.Conv2d:
    """A 3x3 convolution that keeps the resolution."""
    return nn.Conv2d(in_channels, out_channels, 3, padding=1)


class Fourier(nn.Module):
    """The time, and its sines and cosines at frequencies that are learned or random."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.randn(channels // 2))

    def forward(self, times: Tensor) -> Tensor:
        """times: [B]. Returns [B, 1 + channels]."""
        angles = times[:, None] * self.weights * (2 * math.pi)
        return torch.cat([times[:, None], angles.sin(), angles.cos()], dim=1)
