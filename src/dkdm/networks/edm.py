"""The UNets of EDM (arXiv 2206.00364, table 7), DDPM++, NCSN++ and ADM, named as in NVlabs/edm."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn

from dkdm.networks.parts import (
    GroupNorm,
    Network,
    Resample,
    attend,
    encoder_and_decoder,
    levels_of,
    one_hot,
    zeroed,
)

MIN_GROUP = 4  # channels that are normalized together, at least
MAX_GROUPS = 32


class EdmUNet(Network):
    """A UNet whose decoder is fed what each layer of its encoder returned."""

    enc: nn.ModuleDict
    dec: nn.ModuleDict

    def _decode(self, x: Tensor, skips: list[Tensor], emb: Tensor) -> Tensor:
        for name, layer in self.dec.items():
            if "_block" in name:
                x = torch.cat([x, skips.pop()], dim=1)
            if isinstance(layer, Block):
                x = self._run(layer, x, emb)
        return x


class SongUNet(EdmUNet):
    """DDPM++ and NCSN++ (arXiv 2011.13456).

    block_out_channels: widths of the levels; model_channels: of the first convolution;
    noise_channels, emb_channels: of the time before and after its layers. attention_resolutions:
    in pixels. fourier: time as random Fourier features, otherwise as sinusoids. residual_input: the
    image enters the encoder at each resolution, as features. resample_filter: one dimension of it.
    """

    @register_to_config
    def __init__(  # noqa: PLR0913
        self,
        sample_size: int = 32,
        in_channels: int = 3,
        out_channels: int = 3,
        num_class_embeds: int | None = None,
        block_out_channels: tuple[int, ...] = (256, 256, 256),
        layers_per_block: int = 4,
        attention_resolutions: tuple[int, ...] = (16,),
        model_channels: int = 128,
        noise_channels: int = 128,
        emb_channels: int = 512,
        fourier: bool = False,
        residual_input: bool = False,
        resample_filter: tuple[int, ...] = (1, 1),
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.map_noise = Fourier(noise_channels) if fourier else None
        self.map_label = nn.Linear(num_class_embeds, noise_channels) if num_class_embeds else None
        self.map_layer0 = nn.Linear(noise_channels, emb_channels)
        self.map_layer1 = nn.Linear(emb_channels, emb_channels)
        style = Style(
            emb_channels,
            scales=False,
            output_scale=math.sqrt(0.5),
            eps=1e-6,
            filter=tuple(resample_filter),
            projects=True,
            dropout=dropout,
        )
        levels = levels_of(sample_size, block_out_channels)
        first, block = Conv(in_channels, model_channels, 3), partial(Block, style=style)
        self.enc, self.dec = encoder_and_decoder(
            first, levels, layers_per_block, attention_resolutions, block, block, all_attend=False
        )
        channels = in_channels
        for (_, above), (size, _) in pairwise(levels if residual_input else ()):
            name = f"{size}x{size}_aux_residual"
            self.enc[name] = ConvThenDown(channels, above, resample_filter)
            channels = above
        last, prefix = block_out_channels[0], f"{sample_size}x{sample_size}_aux"
        self.dec[f"{prefix}_norm"] = group_norm(last, style.eps)
        self.dec[f"{prefix}_conv"] = zeroed(Conv(last, out_channels, 3))

    def forward(self, x: Tensor, timesteps: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """F of EDM's preconditioning.

        x: [B, C, H, W], scaled by c_in; timesteps: c_noise [B]; class_labels: int64 [B].
        """
        emb = self._embedded(timesteps, class_labels)
        picture, skips = x, []
        for name, layer in self.enc.items():
            if "_aux_" in name:
                continue
            x = self._run(layer, x, emb) if isinstance(layer, Block) else layer(x)
            residual = name.replace("_down", "_aux_residual")
            if name.endswith("_down") and residual in self.enc:
                x = picture = (x + self.enc[residual](picture)) * math.sqrt(0.5)
            skips.append(x)
        x = self._decode(x, skips, emb)
        norm, conv = (layer for name, layer in self.dec.items() if "_aux_" in name)
        return conv(F.silu(norm(x)))

    def _embedded(self, timesteps: Tensor, class_labels: Tensor | None) -> Tensor:
        """Noise level and class as one vector [B, emb_channels]."""
        if self.map_noise is not None:
            emb = self.map_noise(timesteps)
        else:
            emb = get_timestep_embedding(timesteps, self.config.noise_channels)
        emb = emb.to(self.dtype)
        if self.map_label is not None:
            classes = self.config.num_class_embeds
            emb = emb + self.map_label(math.sqrt(classes) * one_hot(class_labels, classes, emb))
        return F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))


class DhariwalUNet(EdmUNet):
    """ADM (arXiv 2105.05233).

    model_channels, emb_channels: of the time before and after its layers; the rest as in SongUNet.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int = 64,
        in_channels: int = 3,
        out_channels: int = 3,
        num_class_embeds: int | None = None,
        block_out_channels: tuple[int, ...] = (192, 384, 576, 768),
        layers_per_block: int = 3,
        attention_resolutions: tuple[int, ...] = (32, 16, 8),
        model_channels: int = 192,
        emb_channels: int = 768,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.map_label = (
            nn.Linear(num_class_embeds, emb_channels, bias=False) if num_class_embeds else None
        )
        self.map_layer0 = nn.Linear(model_channels, emb_channels)
        self.map_layer1 = nn.Linear(emb_channels, emb_channels)
        style = Style(emb_channels, head_channels=64, dropout=dropout)
        levels = levels_of(sample_size, block_out_channels)
        first, block = Conv(in_channels, block_out_channels[0], 3), partial(Block, style=style)
        self.enc, self.dec = encoder_and_decoder(
            first, levels, layers_per_block, attention_resolutions, block, block
        )
        self.out_norm = group_norm(block_out_channels[0])
        self.out_conv = zeroed(Conv(block_out_channels[0], out_channels, 3))

    def forward(self, x: Tensor, timesteps: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """F of EDM's preconditioning; arguments as in SongUNet."""
        width = self.config.model_channels
        emb = get_timestep_embedding(timesteps, width, True, 0).to(self.dtype)
        emb = self.map_layer1(F.silu(self.map_layer0(emb)))
        if self.map_label is not None:
            emb = emb + self.map_label(one_hot(class_labels, self.config.num_class_embeds, emb))
        emb, skips = F.silu(emb), []
        for layer in self.enc.values():
            x = self._run(layer, x, emb) if isinstance(layer, Block) else layer(x)
            skips.append(x)
        x = self._decode(x, skips, emb)
        return self.out_conv(F.silu(self.out_norm(x)))


@dataclass(frozen=True)
class Style:
    """What the blocks of a UNet have in common.

    emb_channels: width of the embedded time and class. head_channels: width of an attention head;
    None is one head. scales: the noise level scales and shifts the normalization, instead of being
    added. output_scale: of both sums. filter: of resampling, one dimension of it. projects: the
    skip connection has weights wherever it resamples.
    """

    emb_channels: int
    head_channels: int | None = None
    scales: bool = True
    output_scale: float = 1.0
    eps: float = 1e-5
    filter: tuple[int, ...] = (1, 1)
    projects: bool = False
    dropout: float = 0.0


class Block(nn.Module):
    """A residual block that is fed the noise level and may resample and attend."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        style: Style,
        resample: Resample | None = None,
        attends: bool = False,
    ) -> None:
        super().__init__()
        self.style, eps = style, style.eps
        self.heads = out_channels // (style.head_channels or out_channels) if attends else 0
        self.norm0 = group_norm(in_channels, eps)
        self.conv0 = Conv(in_channels, out_channels, 3, resample, style.filter)
        self.affine = nn.Linear(style.emb_channels, out_channels * (2 if style.scales else 1))
        self.norm1 = group_norm(out_channels, eps)
        self.conv1 = zeroed(Conv(out_channels, out_channels, 3))
        self.skip = None
        if resample or in_channels != out_channels:
            kernel = 1 if style.projects or in_channels != out_channels else 0
            self.skip = Conv(in_channels, out_channels, kernel, resample, style.filter)
        if self.heads:
            self.norm2 = group_norm(out_channels, eps)
            self.qkv = Conv(out_channels, 3 * out_channels, 1)
            self.proj = zeroed(Conv(out_channels, out_channels, 1))

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x: [B, C, H, W]; emb: [B, emb_channels]."""
        h = self.conv0(F.silu(self.norm0(x)))
        shift = self.affine(emb)[:, :, None, None]
        if self.style.scales:
            scale, shift = shift.chunk(2, dim=1)
            h = self.norm1(h) * (1 + scale) + shift
        else:
            h = self.norm1(h + shift)
        h = self.conv1(F.dropout(F.silu(h), self.style.dropout, self.training))
        x = (h + (x if self.skip is None else self.skip(x))) * self.style.output_scale
        if self.heads:
            x = (x + self._attended(x)) * self.style.output_scale
        return x

    def _attended(self, x: Tensor) -> Tensor:
        parts = self.qkv(self.norm2(x)).unflatten(1, (self.heads, -1, 3)).flatten(4)
        q, k, v = parts.permute(3, 0, 1, 4, 2)
        return self.proj(attend(q, k, v).transpose(2, 3).reshape(x.shape))


class Conv(nn.Module):
    """A convolution, after resampling by a fixed filter; a kernel of 0 only resamples."""

    resample_filter: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        resample: Resample | None = None,
        filter: Sequence[int] = (1, 1),
    ) -> None:
        super().__init__()
        self.out_channels, self.resample = out_channels, resample
        self.register_buffer("resample_filter", outer(filter) if resample else None)
        own = nn.Conv2d(in_channels, out_channels, kernel) if kernel else None
        self.weight = own.weight if own else None
        self.bias = own.bias if own else None

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, C, H, W]."""
        if self.resample is not None:
            x = filtered(x, self.resample_filter, self.resample)
        if self.weight is None:
            return x
        return F.conv2d(x, self.weight, self.bias, padding=self.weight.shape[-1] // 2)


class ConvThenDown(nn.Conv2d):
    """A 3x3 convolution, and only then the filter that halves the resolution.

    The border is padded once, for both.
    """

    resample_filter: Tensor

    def __init__(self, in_channels: int, out_channels: int, filter: Sequence[int]) -> None:
        super().__init__(in_channels, out_channels, 3)
        self.register_buffer("resample_filter", outer(filter))

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, C, H, W]."""
        margin = (self.resample_filter.shape[-1] - 1) // 2
        x = F.conv2d(x, self.weight, padding=1 + margin)
        kernel = self.resample_filter.expand(x.shape[1], -1, -1, -1)
        return F.conv2d(x, kernel, self.bias, stride=2, groups=x.shape[1])


class Fourier(nn.Module):
    """Sines and cosines of the noise level at random frequencies that are kept."""

    freqs: Tensor

    def __init__(self, channels: int, scale: float = 16.0) -> None:
        super().__init__()
        self.register_buffer("freqs", scale * torch.randn(channels // 2))

    def forward(self, values: Tensor) -> Tensor:
        """values: [B]. Returns [B, channels]."""
        angles = 2 * math.pi * values[:, None] * self.freqs.to(values.dtype)
        return torch.cat([angles.sin(), angles.cos()], dim=1)


def outer(filter: Sequence[int]) -> Tensor:
    """A separable filter [1, 1, K, K] whose numbers sum to 1."""
    line = torch.tensor(filter, dtype=torch.float32) / sum(filter)
    return torch.outer(line, line)[None, None]


def filtered(x: Tensor, kernel: Tensor, direction: Resample) -> Tensor:
    """Half or double the resolution by a filter [1, 1, K, K] on every channel."""
    margin, channels = (kernel.shape[-1] - 1) // 2, x.shape[1]
    kernel = kernel.expand(channels, -1, -1, -1)
    if direction == "down":
        return F.conv2d(x, kernel, stride=2, padding=margin, groups=channels)
    return F.conv_transpose2d(x, 4 * kernel, stride=2, padding=margin, groups=channels)


def group_norm(channels: int, eps: float = 1e-5) -> GroupNorm:
    """Normalization of groups of at least four channels, 32 groups at most."""
    return GroupNorm(min(MAX_GROUPS, channels // MIN_GROUP), channels, eps)
