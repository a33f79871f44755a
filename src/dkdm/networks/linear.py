"""A diffusion transformer whose cost is proportional to the number of its tokens.

Blocks as in DiT (arXiv 2212.09748, adaLN-Zero) with linear attention (arXiv 2006.16236) and, as in
SANA (arXiv 2410.10629), a convolution in the MLP, from which tokens know their place. Samples may
be audio, images or videos of any size.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from dkdm.networks.parts import (
    CONVOLUTIONS,
    Attention,
    ConditionedNetwork,
    LayerNorm,
    projection,
    summed,
    to_samples,
    to_tokens,
    token_grid,
    zeroed,
)

SINUSOIDS = 256


class LinearTransformer(ConditionedNetwork):
    """A transformer over patches; time, class and pooled text modulate it, text is attended to.

    sample_size, patch_size: one number a side, (height, width) for images; other sizes that can be
    cut into patches work too. The rest as in ConditionedNetwork.
    """

    @register_to_config
    def __init__(  # noqa: PLR0913
        self,
        sample_size: tuple[int, ...] = (32, 32),
        patch_size: tuple[int, ...] = (2, 2),
        in_channels: int = 3,
        out_channels: int = 3,
        width: int = 384,
        depth: int = 12,
        heads: int = 12,
        mlp_ratio: float = 2.5,
        num_class_embeds: int | None = None,
        cross_attention_dim: int | None = None,
        pooled_projection_dim: int | None = None,
    ) -> None:
        super().__init__()
        token_grid(sample_size, patch_size)
        self.patch = tuple(patch_size)
        values, rank = math.prod(self.patch), len(self.patch)
        self.embed = nn.Linear(in_channels * values, width)
        self.time_channels = SINUSOIDS
        self.time = nn.Sequential(nn.Linear(SINUSOIDS, width), nn.SiLU(), nn.Linear(width, width))
        self.classes = nn.Embedding(num_class_embeds, width) if num_class_embeds else None
        self.text = projection(cross_attention_dim, width)
        self.pooled = projection(pooled_projection_dim, width)
        hidden, reads = int(mlp_ratio * width), cross_attention_dim is not None
        self.blocks = nn.ModuleList(Block(width, heads, hidden, rank, reads) for _ in range(depth))
        self.norm = LayerNorm(width, elementwise_affine=False)
        self.modulation = zeroed(nn.Linear(width, 2 * width))
        self.project = nn.Linear(width, out_channels * values)
        nn.init.normal_(self.project.weight, std=0.02 / math.sqrt(width))
        nn.init.zeros_(self.project.bias)

    def _output(
        self, x: Tensor, vectors: list[Tensor], text: Tensor | None, mask: Tensor | None
    ) -> Tensor:
        grid = token_grid(x.shape[2:], self.patch)
        emb, tokens = F.silu(summed(vectors)), self.embed(to_tokens(x, self.patch))
        for block in self.blocks:
            tokens = self._run(block, tokens, emb, grid, text, mask)
        shift, scale = self.modulation(emb)[:, None].chunk(2, dim=-1)
        return to_samples(self.project(self.norm(tokens) * (1 + scale) + shift), grid, self.patch)


class Block(nn.Module):
    """Linear attention, attention to the text, if there is one, and an MLP; nothing at first."""

    def __init__(self, width: int, heads: int, hidden: int, rank: int, reads: bool) -> None:
        super().__init__()
        self.modulation = zeroed(nn.Linear(width, 6 * width))
        self.norm = LayerNorm(width, elementwise_affine=False)
        self.attention = LinearAttention(width, heads)
        self.reading = Attention(width, heads) if reads else None
        if self.reading is not None:
            zeroed(self.reading.proj)
        self.mlp = ConvMlp(width, hidden, rank)

    def forward(
        self,
        x: Tensor,
        emb: Tensor,
        grid: tuple[int, ...],
        text: Tensor | None,
        mask: Tensor | None,
    ) -> Tensor:
        """x: [B, N, width]; emb: [B, width]; text: [B, M, width]; mask: bool [B, M]."""
        parts = self.modulation(emb)[:, None].chunk(6, dim=-1)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = parts
        x = x + gate * self.attention(self.norm(x) * (1 + scale) + shift)
        if self.reading is not None:
            x = x + self.reading(x, text, mask)
        return x + mlp_gate * self.mlp(self.norm(x) * (1 + mlp_scale) + mlp_shift, grid)


class LinearAttention(nn.Module):
    """Self-attention by `linear_attention`, of queries and keys of fixed size."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_scale = nn.Parameter(torch.ones(width // heads))
        self.k_scale = nn.Parameter(torch.ones(width // heads))
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, N, width]."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).transpose(1, 3).unbind(2)
        attended = linear_attention(unit(q) * self.q_scale, unit(k) * self.k_scale, v)
        return self.proj(attended.transpose(1, 2).flatten(2))


def unit(x: Tensor) -> Tensor:
    """x with a mean square of 1 in its last dimension, in float32."""
    return F.rms_norm(x.float(), x.shape[-1:], eps=1e-6)


def linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention by the kernel phi(q) . phi(k), phi(x) = elu(x) + 1: all tokens share one sum.

    q, k, v: [B, heads, N, d], whose products and normalization are in float32. Under autocast the
    products are in half precision, and stay in its range: each factor is divided by sqrt(N).
    Source: arXiv 2006.16236, Eqs. 5-7.
    """
    q, k = F.elu(q.float()) + 1, F.elu(k.float()) + 1
    share = 1 / math.sqrt(k.shape[2])
    with_sum = F.pad(v.float(), (0, 1), value=1.0)
    total = (k * share).transpose(2, 3) @ (with_sum * share)
    attended = (q @ total).float()
    return (attended[..., :-1] / attended[..., -1:].clamp(min=1e-6)).to(v.dtype)


class ConvMlp(nn.Module):
    """A gated MLP that sees each token's neighbours (mix-FFN, arXiv 2410.10629, sec. 2.2)."""

    def __init__(self, width: int, hidden: int, rank: int) -> None:
        super().__init__()
        conv = CONVOLUTIONS[rank - 1]
        self.expand = nn.Linear(width, 2 * hidden)
        self.neighbours = conv(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden)
        self.project = nn.Linear(hidden, width)

    def forward(self, x: Tensor, grid: tuple[int, ...]) -> Tensor:
        """x: [B, N, width], in rows of the grid."""
        places = F.silu(self.expand(x)).transpose(1, 2).unflatten(2, grid)
        h, gate = self.neighbours(places).flatten(2).transpose(1, 2).chunk(2, dim=-1)
        return self.project(h * F.silu(gate))
