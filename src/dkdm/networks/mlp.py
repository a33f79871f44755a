"""A residual MLP for vectors and short signals: every value of a sample is seen at once.

Blocks are those of a transformer without attention; time and conditions modulate them as in a DiT
(adaLN-Zero, arXiv 2212.09748, sec. 3.2).
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from dkdm.networks.parts import ConditionedNetwork, LayerNorm, projection, summed, zeroed


class ResidualMLP(ConditionedNetwork):
    """Samples are flattened, [C] and [C, L] alike, and every block sees all of their values.

    sample_size: the sides after the channels: () for vectors, (length,) for audio. width: of the
    blocks; depth: how many. Of a text's tokens the mean is read. What is noise in x is passed on,
    as much of it as the time asks for, so that `width` may be less than its values. The rest as in
    ConditionedNetwork.
    """

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
        places, hidden = math.prod(sample_size), int(mlp_ratio * width)
        self.time_channels = width
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.classes = nn.Embedding(num_class_embeds, width) if num_class_embeds else None
        self.text = projection(cross_attention_dim, width)
        self.pooled = projection(pooled_projection_dim, width)
        self.first = nn.Linear(in_channels * places, width)
        self.blocks = nn.ModuleList(Block(width, hidden) for _ in range(depth))
        self.norm = LayerNorm(width)
        self.last = zeroed(nn.Linear(width, out_channels * places))
        self.passed = zeroed(nn.Linear(width, out_channels))

    def _output(
        self, x: Tensor, vectors: list[Tensor], text: Tensor | None, mask: Tensor | None
    ) -> Tensor:
        shape = (self.config.in_channels, *self.config.sample_size)
        if tuple(x.shape[1:]) != shape:
            raise ValueError(f"this MLP is for samples of {shape}, not {tuple(x.shape[1:])}")
        if text is not None:
            vectors = [*vectors, _mean(text, mask)]
        emb, h = F.silu(summed(vectors)), self.first(x.flatten(1))
        for block in self.blocks:
            h = self._run(block, h, emb)
        output = self.last(self.norm(h)).reshape(x.shape[0], -1, *x.shape[2:])
        return output + self._passed_on(x, emb)

    def _passed_on(self, x: Tensor, emb: Tensor) -> Tensor:
        """x times a factor a channel, for as many output channels as there are."""
        share = self.passed(emb).reshape(x.shape[0], -1, *[1] * (x.ndim - 2))
        return share * x.repeat(1, share.shape[1] // x.shape[1], *[1] * (x.ndim - 2))


class Block(nn.Module):
    """Two layers around which time and conditions scale, shift and gate."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = LayerNorm(width, elementwise_affine=False)
        self.told = zeroed(nn.Linear(width, 3 * width))
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, width))

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        """h, emb: [B, width]."""
        scale, shift, gate = self.told(emb).chunk(3, dim=-1)
        return h + (1 + gate) * self.mlp(self.norm(h) * (1 + scale) + shift)


def _mean(tokens: Tensor, mask: Tensor | None) -> Tensor:
    """The mean [B, D] of tokens [B, N, D], of those that the mask [B, N] does not leave out."""
    if mask is None:
        return tokens.mean(1)
    seen = mask.to(tokens.dtype)[:, :, None]
    return (tokens * seen).sum(1) / seen.sum(1).clamp(min=1)
