"""U-ViT (arXiv 2209.12152): time, class, text and patches are tokens, with skips across the depth.

Samples may be audio, images or videos.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from dkdm.networks.parts import (
    CONVOLUTIONS,
    ConditionedNetwork,
    LayerNorm,
    attend,
    projection,
    to_samples,
    to_tokens,
    token_grid,
)


class UVit(ConditionedNetwork):
    """A transformer whose later half is also shown what the earlier half had found.

    sample_size, patch_size: one number a side, (height, width) for images. depth: blocks, odd: one
    stands in the middle. smooth_channels: that the last convolution takes together; None is all,
    a part of them lets several outputs share it. The rest as in ConditionedNetwork.
    """

    of_one_output = ("smooth_channels",)

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
        smooth_channels: int | None = None,
    ) -> None:
        super().__init__()
        if depth % 2 == 0:
            raise ValueError(f"depth is {depth}: give an odd number of blocks")
        self.patch, self.grid = tuple(patch_size), token_grid(sample_size, patch_size)
        values, hidden = math.prod(self.patch), int(mlp_ratio * width)
        self.embed = nn.Linear(in_channels * values, width)
        self.positions = nn.Parameter(torch.zeros(math.prod(self.grid), width))
        self.time, self.time_channels = nn.Identity(), width
        self.classes = nn.Embedding(num_class_embeds, width) if num_class_embeds else None
        self.text = projection(cross_attention_dim, width)
        self.pooled = projection(pooled_projection_dim, width)
        half = depth // 2
        self.earlier = nn.ModuleList(Block(width, heads, hidden) for _ in range(half))
        self.middle = Block(width, heads, hidden)
        self.later = nn.ModuleList(Block(width, heads, hidden, skip=True) for _ in range(half))
        self.norm = LayerNorm(width)
        self.project = nn.Linear(width, out_channels * values)
        smooth = smooth_channels or out_channels
        self.smooth = CONVOLUTIONS[len(self.grid) - 1](smooth, smooth, 3, padding=1)
        self.apply(_initialize)
        nn.init.trunc_normal_(self.positions, std=0.02)

    def _output(
        self, x: Tensor, vectors: list[Tensor], text: Tensor | None, mask: Tensor | None
    ) -> Tensor:
        if tuple(x.shape[2:]) != tuple(self.config.sample_size):
            sizes = f"{tuple(self.config.sample_size)}, not {tuple(x.shape[2:])}"
            raise ValueError(f"this U-ViT knows the positions of one sample size: {sizes}")
        patches = self.embed(to_tokens(x, self.patch)) + self.positions
        extra = [vector[:, None] for vector in vectors] + ([] if text is None else [text])
        tokens = torch.cat([*extra, patches], dim=1)
        tokens = self._blocks(tokens, _visible(tokens, patches.shape[1], mask))
        patches = self.project(self.norm(tokens[:, -patches.shape[1] :]))
        return self._smoothed(to_samples(patches, self.grid, self.patch))

    def _smoothed(self, x: Tensor) -> Tensor:
        """x: [B, out_channels, ...], as many outputs as smooth_channels go into these."""
        taken = self.smooth.in_channels
        if taken == x.shape[1]:
            return self.smooth(x)
        outputs = x.unflatten(1, (-1, taken))
        return self.smooth(outputs.flatten(0, 1)).unflatten(0, outputs.shape[:2]).flatten(1, 2)

    def _blocks(self, tokens: Tensor, visible: Tensor | None) -> Tensor:
        skips = []
        for block in self.earlier:
            tokens = self._run(block, tokens, visible)
            skips.append(tokens)
        tokens = self._run(self.middle, tokens, visible)
        for block in self.later:
            tokens = self._run(block, torch.cat([tokens, skips.pop()], dim=-1), visible)
        return tokens


class Block(nn.Module):
    """Self-attention and an MLP; with `skip`, an earlier block's tokens are beside the others."""

    def __init__(self, width: int, heads: int, hidden: int, skip: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.skip = nn.Linear(2 * width, width) if skip else None
        self.norm1, self.norm2 = LayerNorm(width), LayerNorm(width)
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
        x = x + self.proj(attend(q, k, v, visible).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


def _visible(tokens: Tensor, patches: int, mask: Tensor | None) -> Tensor | None:
    """Which of [others, text, patches] are attended to; None is all."""
    if mask is None:
        return None
    others = tokens.shape[1] - mask.shape[1] - patches
    mask = F.pad(mask.to(torch.int32), (others, patches), value=1)
    return mask.to(torch.bool)[:, None, None]


def _initialize(module: nn.Module) -> None:
    """As in the paper's code: normal of 0.02, biases of 0."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.trunc_normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
