"""The magnitude-preserving UNet of EDM2 (arXiv 2312.02696, figure 21).

Its weights have the names that they have in NVlabs/edm2. Equations are of the paper.
"""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from dkdm.networks.parts import Network, Resample, attend, encoder_and_decoder, levels_of, one_hot

EPS = 1e-4
SILU_MAGNITUDE = 0.596
HEAD_CHANNELS = 64
RESIDUAL_SHARE = 0.3  # of a block's residual branch, and of its attention
LARGEST = 256.0  # activations are clipped there


class EDM2UNet(Network):
    """A UNet whose layers neither grow nor shrink their activations.

    sample_size: height and width. block_out_channels: widths of the levels. layers_per_block:
    blocks of a level of the encoder; the decoder has one more. attention_resolutions: in pixels.
    noise_channels, emb_channels: of the noise level before and after its layer.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int = 64,
        in_channels: int = 4,
        out_channels: int = 4,
        num_class_embeds: int | None = None,
        block_out_channels: tuple[int, ...] = (192, 384, 576, 768),
        layers_per_block: int = 3,
        attention_resolutions: tuple[int, ...] = (16, 8),
        noise_channels: int = 192,
        emb_channels: int = 768,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.emb_fourier = Fourier(noise_channels)
        self.emb_noise = UnitConv(noise_channels, emb_channels)
        self.emb_label = UnitConv(num_class_embeds, emb_channels) if num_class_embeds else None
        self.out_gain = nn.Parameter(torch.zeros(()))
        self.enc, self.dec = encoder_and_decoder(
            UnitConv(in_channels + 1, block_out_channels[0], 3),
            levels_of(sample_size, block_out_channels),
            layers_per_block,
            attention_resolutions,
            partial(EncoderBlock, emb_channels=emb_channels, dropout=dropout),
            partial(DecoderBlock, emb_channels=emb_channels, dropout=dropout),
        )
        self.out_conv = UnitConv(block_out_channels[0], out_channels, 3)

    def forward(self, x: Tensor, timesteps: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """F of EDM's preconditioning.

        x: [B, C, H, W], scaled by c_in; timesteps: c_noise [B]; class_labels: int64 [B] or None.
        """
        emb = self._embedded(timesteps, class_labels)
        x, skips = torch.cat([x, torch.ones_like(x[:, :1])], dim=1), []
        for layer in self.enc.values():
            x = self._run(layer, x, emb) if isinstance(layer, Block) else layer(x)
            skips.append(x)
        for name, layer in self.dec.items():
            if "_block" in name:
                x = joined(x, skips.pop())
            x = self._run(layer, x, emb)
        return self.out_conv(x, self.out_gain)

    def _embedded(self, timesteps: Tensor, class_labels: Tensor | None) -> Tensor:
        """Noise level and class as one vector [B, emb_channels]."""
        emb = self.emb_noise(self.emb_fourier(timesteps).to(self.dtype))
        if self.emb_label is not None:
            classes = self.config.num_class_embeds
            label = math.sqrt(classes) * one_hot(class_labels, classes, emb)
            emb = balanced(emb, self.emb_label(label), 0.5)
        return silu(emb)


class Block(nn.Module):
    """A residual block that is fed the noise level and may resample and attend.

    projects_first: its input is brought to its width before it branches.
    """

    projects_first = False

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        dropout: float = 0.0,
        resample: Resample | None = None,
        attends: bool = False,
    ) -> None:
        super().__init__()
        self.dropout, self.resample = dropout, resample
        self.heads = out_channels // HEAD_CHANNELS if attends else 0
        self.emb_gain = nn.Parameter(torch.zeros(()))
        self.emb_linear = UnitConv(emb_channels, out_channels)
        inner = out_channels if self.projects_first else in_channels
        self.conv_res0 = UnitConv(inner, out_channels, 3)
        self.conv_res1 = UnitConv(out_channels, out_channels, 3)
        differs = in_channels != out_channels
        self.conv_skip = UnitConv(in_channels, out_channels, 1) if differs else None
        if self.heads:
            self.attn_qkv = UnitConv(out_channels, 3 * out_channels, 1)
            self.attn_proj = UnitConv(out_channels, out_channels, 1)

    def _residual(self, x: Tensor, emb: Tensor) -> Tensor:
        scale = 1 + self.emb_linear(emb, self.emb_gain)
        y = silu(self.conv_res0(silu(x)) * scale[:, :, None, None])
        return self.conv_res1(F.dropout(y, self.dropout, self.training))

    def _finished(self, x: Tensor) -> Tensor:
        """Attention, if the block has any, and clipping."""
        if self.heads:
            parts = self.attn_qkv(x).unflatten(1, (self.heads, -1, 3)).flatten(4)
            q, k, v = normalized(parts, (2,)).permute(3, 0, 1, 4, 2)
            attended = attend(q, k, v).transpose(2, 3).reshape(x.shape)
            x = balanced(x, self.attn_proj(attended), RESIDUAL_SHARE)
        return x.clamp(-LARGEST, LARGEST)


class EncoderBlock(Block):
    """Brings its input to unit magnitude, per pixel, before both branches."""

    projects_first = True

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x: [B, C, H, W]; emb: [B, emb_channels]."""
        x = resampled(x, self.resample)
        x = normalized(x if self.conv_skip is None else self.conv_skip(x), (1,))
        return self._finished(balanced(x, self._residual(x, emb), RESIDUAL_SHARE))


class DecoderBlock(Block):
    """Feeds its input as it is to both branches."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x: [B, C, H, W]; emb: [B, emb_channels]."""
        x = resampled(x, self.resample)
        y = self._residual(x, emb)
        x = x if self.conv_skip is None else self.conv_skip(x)
        return self._finished(balanced(x, y, RESIDUAL_SHARE))


class UnitConv(nn.Module):
    """A linear layer (kernel 0) or convolution whose outputs each have weights of norm 1 (Eq. 47).

    The paper also resets the weights to that norm in training (Eq. 66), which is left to others.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 0) -> None:
        super().__init__()
        sides = (kernel, kernel) if kernel else ()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, *sides))

    def forward(self, x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        """x: [B, C] or [B, C, H, W]; gain: of the output's magnitude."""
        weight = self.weight.float()
        fan_in = weight[0].numel()
        scaled = normalized(weight, tuple(range(1, weight.ndim))) * (gain / math.sqrt(fan_in))
        scaled = scaled.to(x.dtype)
        if weight.ndim == 2:
            return F.linear(x, scaled)
        return F.conv2d(x, scaled, padding=weight.shape[-1] // 2)


class Fourier(nn.Module):
    """Cosines of the noise level at random frequencies and phases that are kept (Eq. 75)."""

    freqs: Tensor
    phases: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("freqs", 2 * math.pi * torch.randn(channels))
        self.register_buffer("phases", 2 * math.pi * torch.rand(channels))

    def forward(self, values: Tensor) -> Tensor:
        """values: [B]. Returns float32 [B, channels]."""
        angles = values.float()[:, None] * self.freqs.float() + self.phases.float()
        return math.sqrt(2) * angles.cos()


def normalized(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Scale to a root mean square of 1 over these dimensions (Eq. 53)."""
    count = math.prod(x.shape[dim] for dim in dims)
    norm = torch.linalg.vector_norm(x, dim=dims, keepdim=True, dtype=torch.float32)
    return x / (EPS + norm / math.sqrt(count)).to(x.dtype)


def silu(x: Tensor) -> Tensor:
    """SiLU that keeps the magnitude of normal numbers (Eq. 81)."""
    return F.silu(x) / SILU_MAGNITUDE


def balanced(a: Tensor, b: Tensor, share: float) -> Tensor:
    """A sum with this share of b that keeps the magnitude of unrelated numbers (Eq. 88)."""
    return ((1 - share) * a + share * b) / math.hypot(1 - share, share)


def joined(a: Tensor, b: Tensor) -> Tensor:
    """Channels side by side, such that both weigh as much and the magnitude is kept (Eq. 103)."""
    half = math.sqrt((a.shape[1] + b.shape[1]) / 2)
    weights = (half / math.sqrt(a.shape[1]), half / math.sqrt(b.shape[1]))
    return torch.cat([weights[0] * a, weights[1] * b], dim=1)


def resampled(x: Tensor, direction: Resample | None) -> Tensor:
    """Half the resolution by means of 2x2 pixels, or double it by repetition."""
    if direction == "down":
        return F.avg_pool2d(x, 2)
    if direction == "up":
        return F.interpolate(x, scale_factor=2, mode="nearest")
    return x
