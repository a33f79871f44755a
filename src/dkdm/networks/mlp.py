"""A residual MLP for vectors and short signals: every value of a sample is seen at once.

Blocks are those of a transformer without attention, told time and conditions as a DiT's are
(adaLN-Zero, arXiv 2212.09748, sec. 3.2). This file needs torch and diffusers alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn


class ResidualMLP(ModelMixin, ConfigMixin):
    """Samples are flattened, [C] and [C, L] alike, and every block sees all of their values.

    sample_size: the sides after the channels: () for vectors, (length,) for audio. width: of the
    blocks; depth: how many. num_class_embeds: class ids; None is unconditional.
    cross_attention_dim, pooled_projection_dim: width of the text's tokens, whose mean is read, and
    of its pooled embedding; None is without.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        sample_size: tuple[int, ...] = (),
        in_channels: int = 8,
        out_channels: int = 8,
        width: int = 256,
        depth: int = 4,
        mlp_ratio: float = 2.0,
        num_class_embeds: int | None = None,
        cross_attention_dim: int | None = None,
        pooled_projection_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.gradient_checkpointing = False
        places, hidden = math.prod(sample_size), int(mlp_ratio * width)
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.classes = nn.Embedding(num_class_embeds, width) if num_class_embeds else None
        self.text = _projection(cross_attention_dim, width)
        self.pooled = _projection(pooled_projection_dim, width)
        self.first = nn.Linear(in_channels * places, width)
        self.blocks = nn.ModuleList(Block(width, hidden) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.last = nn.Linear(width, out_channels * places)
        self.passed = nn.Linear(width, out_channels)
        for parameter in [*self.last.parameters(), *self.passed.parameters()]:
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
        encoder_attention_mask: [B, N], 0 for padding; pooled_projections: [B, D]. What is noise in
        x is passed on, as much of it as the time asks for, so that `width` may be less than its
        values. Raises ValueError for another size than sample_size, and for conditions that are
        missing or not known.
        """
        check_given(self.config, class_labels, encoder_hidden_states, pooled_projections)
        shape = (self.config.in_channels, *self.config.sample_size)
        if tuple(x.shape[1:]) != shape:
            raise ValueError(f"this MLP is for samples of {shape}, not {tuple(x.shape[1:])}")
        emb = self._embedded(timesteps, class_labels, pooled_projections, x.dtype)
        if self.text is not None:
            emb = emb + _mean(self.text(encoder_hidden_states), encoder_attention_mask)
        emb, h = F.silu(emb), self.first(x.flatten(1))
        for block in self.blocks:
            h = self._run(block, h, emb)
        output: Tensor = self.last(self.norm(h)).reshape(x.shape[0], -1, *x.shape[2:])
        return output + self._passed_on(x, emb)

    def _passed_on(self, x: Tensor, emb: Tensor) -> Tensor:
        """x times a factor a channel, for as many output channels as there are."""
        share = self.passed(emb).reshape(x.shape[0], -1, *[1] * (x.ndim - 2))
        return share * x.repeat(1, share.shape[1] // x.shape[1], *[1] * (x.ndim - 2))

    def _embedded(
        self,
        timesteps: Tensor,
        class_labels: Tensor | None,
        pooled: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        """Time, class and pooled text as one vector [B, width]."""
        sinusoids = get_timestep_embedding(timesteps, self.config.width, True, 0)
        emb: Tensor = self.time(sinusoids.to(dtype))
        if self.classes is not None:
            emb = emb + self.classes(class_labels)
        return emb if self.pooled is None else emb + self.pooled(pooled)

    def _run(self, block: nn.Module, h: Tensor, emb: Tensor) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(block, h, emb)
        output: Tensor = block(h, emb)
        return output


class Block(nn.Module):
    """Two layers around which time and conditions scale, shift and gate."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.told = nn.Linear(width, 3 * width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, width))
        nn.init.zeros_(self.told.weight)
        nn.init.zeros_(self.told.bias)

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        """h, emb: [B, width]."""
        scale, shift, gate = self.told(emb).chunk(3, dim=-1)
        return h + (1 + gate) * self.mlp(self.norm(h) * (1 + scale) + shift)


def check_given(config: Mapping[str, Any], *conditions: Tensor | None) -> None:
    """Raise ValueError if the conditions are not those that the network was made for."""
    names = ("class_labels", "encoder_hidden_states", "pooled_projections")
    options = ("num_class_embeds", "cross_attention_dim", "pooled_projection_dim")
    for name, option, given in zip(names, options, conditions, strict=True):
        if (config[option] is None) != (given is None):
            wanted = "remove" if given is not None else "give"
            raise ValueError(f"{option} is {config[option]}: {wanted} {name}")


def _mean(tokens: Tensor, mask: Tensor | None) -> Tensor:
    """The mean [B, D] of tokens [B, N, D], of those that the mask [B, N] does not leave out."""
    if mask is None:
        return tokens.mean(1)
    seen = mask.to(tokens.dtype)[:, :, None]
    return (tokens * seen).sum(1) / seen.sum(1).clamp(min=1)


def _projection(features: int | None, width: int) -> nn.Module | None:
    """Of text, whatever its scale."""
    if features is None:
        return None
    return nn.Sequential(nn.LayerNorm(features), nn.Linear(features, width))
