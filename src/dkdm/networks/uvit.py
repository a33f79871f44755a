"""U-ViT (arXiv 2209.12152): time, class, text and patches are tokens, with skips across the depth.

Samples may be audio, images or videos. This file needs torch and diffusers alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn


class UVit(ModelMixin, ConfigMixin):
    """A transformer whose later half is also shown what the earlier half had found.

    sample_size, patch_size: one number a side, (height, width) for images. depth: blocks, odd: one
    stands in the middle. num_class_embeds: class ids; None is unconditional. cross_attention_dim,
    pooled_projection_dim: width of the text's tokens and of its pooled embedding; None is without.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(  # noqa: PLR0913
        self,
        sample_size: tuple[int, ...] = (32, 32),
        patch_size: tuple[int, ...] = (2, 2),
        in_channels: int = 3,
        out_channels: int = 3,
        width: int = 512,
        depth: int = 13,
        heads: int = 8,
        mlp_ratio: float = 4.0,
        num_class_embeds: int | None = None,
        cross_attention_dim: int | None = None,
        pooled_projection_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.gradient_checkpointing = False
        if depth % 2 == 0:
            raise ValueError(f"depth is {depth}: give an odd number of blocks")
        self.patch, self.grid = tuple(patch_size), token_grid(sample_size, patch_size)
        values, hidden = math.prod(self.patch), int(mlp_ratio * width)
        self.embed = nn.Linear(in_channels * values, width)
        self.positions = nn.Parameter(torch.zeros(math.prod(self.grid), width))
        self.classes = nn.Embedding(num_class_embeds, width) if num_class_embeds else None
        self.text = _projection(cross_attention_dim, width)
        self.pooled = _projection(pooled_projection_dim, width)
        half = depth // 2
        self.earlier = nn.ModuleList(Block(width, heads, hidden) for _ in range(half))
        self.middle = Block(width, heads, hidden)
        self.later = nn.ModuleList(Block(width, heads, hidden, skip=True) for _ in range(half))
        self.norm = nn.LayerNorm(width)
        self.project = nn.Linear(width, out_channels * values)
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(self.grid) - 1]
        self.smooth = conv(out_channels, out_channels, 3, padding=1)
        self.apply(_initialize)
        nn.init.trunc_normal_(self.positions, std=0.02)

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
        for another size than sample_size, and for conditions that are missing or not known.
        """
        check_given(self.config, class_labels, encoder_hidden_states, pooled_projections)
        if tuple(x.shape[2:]) != tuple(self.config.sample_size):
            sizes = f"{tuple(self.config.sample_size)}, not {tuple(x.shape[2:])}"
            raise ValueError(f"this U-ViT knows the positions of one sample size: {sizes}")
        time = get_timestep_embedding(timesteps, self.config.width, True, 0).to(x.dtype)
        extra = [time[:, None]]
        if self.classes is not None:
            extra.append(self.classes(class_labels)[:, None])
        if self.pooled is not None:
            extra.append(self.pooled(pooled_projections)[:, None])
        if self.text is not None:
            extra.append(self.text(encoder_hidden_states))
        patches = self.embed(to_tokens(x, self.patch)) + self.positions
        tokens = torch.cat([*extra, patches], dim=1)
        tokens = self._blocks(tokens, _visible(tokens, patches.shape[1], encoder_attention_mask))
        patches = self.project(self.norm(tokens[:, -patches.shape[1] :]))
        output: Tensor = self.smooth(to_samples(patches, self.grid, self.patch))
        return output

    def _blocks(self, tokens: Tensor, visible: Tensor | None) -> Tensor:
        skips = []
        for block in self.earlier:
            tokens = self._run(block, tokens, visible)
            skips.append(tokens)
        tokens = self._run(self.middle, tokens, visible)
        for block in self.later:
            tokens = self._run(block, torch.cat([tokens, skips.pop()], dim=-1), visible)
        return tokens

    def _run(self, block: nn.Module, tokens: Tensor, visible: Tensor | None) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(block, tokens, visible)
        output: Tensor = block(tokens, visible)
        return output


class Block(nn.Module):
    """Self-attention and an MLP; with `skip`, an earlier block's tokens are beside the others."""

    def __init__(self, width: int, heads: int, hidden: int, skip: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.skip = nn.Linear(2 * width, width) if skip else None
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor, visible: Tensor | None) -> Tensor:
        """x: [B, N, width], with `skip` [B, N, 2 width]; visible: bool [B, 1, 1, N]."""
        if self.skip is not None:
            x = self.skip(x)
        q, k, v = (
            self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).transpose(1, 3).unbind(2)
        )
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
        x = x + self.proj(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


def token_grid(sample_size: Sequence[int], patch_size: Sequence[int]) -> tuple[int, ...]:
    """How many patches there are along each side.

    Raises ValueError if the sides cannot be cut into patches.
    """
    fits = len(sample_size) == len(patch_size) and 1 <= len(sample_size) <= 3
    if not fits or any(s % p for s, p in zip(sample_size, patch_size, strict=True)):
        raise ValueError(
            f"sample_size {tuple(sample_size)} cannot be cut into patches of {tuple(patch_size)}: "
            "give one to three sides, each divisible by its patch"
        )
    return tuple(s // p for s, p in zip(sample_size, patch_size, strict=True))


def to_tokens(x: Tensor, patch: tuple[int, ...]) -> Tensor:
    """[B, C, *sides] -> [B, number of patches, C * values of a patch]."""
    for i, side in enumerate(patch):
        x = x.unflatten(2 + 2 * i, (-1, side))
    rank = len(patch)
    order = [0, *range(2, 2 + 2 * rank, 2), 1, *range(3, 3 + 2 * rank, 2)]
    return x.permute(order).flatten(1 + rank).flatten(1, rank)


def to_samples(tokens: Tensor, grid: tuple[int, ...], patch: tuple[int, ...]) -> Tensor:
    """The inverse of `to_tokens`."""
    rank = len(grid)
    x = tokens.unflatten(1, grid).unflatten(-1, (-1, *patch))
    order = [axis for i in range(rank) for axis in (1 + i, 2 + rank + i)]
    x = x.permute(0, 1 + rank, *order)
    for i in range(rank):
        x = x.flatten(2 + i, 3 + i)
    return x


def check_given(config: Mapping[str, Any], *conditions: Tensor | None) -> None:
    """Raise ValueError if the conditions are not those that the network was made for."""
    names = ("class_labels", "encoder_hidden_states", "pooled_projections")
    options = ("num_class_embeds", "cross_attention_dim", "pooled_projection_dim")
    for name, option, given in zip(names, options, conditions, strict=True):
        if (config[option] is None) != (given is None):
            wanted = "remove" if given is not None else "give"
            raise ValueError(f"{option} is {config[option]}: {wanted} {name}")


def _visible(tokens: Tensor, patches: int, mask: Tensor | None) -> Tensor | None:
    """Which of [others, text, patches] are attended to; None is all."""
    if mask is None:
        return None
    others = tokens.shape[1] - mask.shape[1] - patches
    mask = F.pad(mask.to(torch.int32), (others, patches), value=1)
    return mask.to(torch.bool)[:, None, None]


def _projection(features: int | None, width: int) -> nn.Module | None:
    """Of text, whatever its scale."""
    if features is None:
        return None
    return nn.Sequential(nn.LayerNorm(features), nn.Linear(features, width))


def _initialize(module: nn.Module) -> None:
    """As in the paper's code: normal of 0.02, biases of 0."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.trunc_normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
