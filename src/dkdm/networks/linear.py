"""A diffusion transformer whose cost is proportional to the number of its tokens.

Blocks as in DiT (arXiv 2212.09748, adaLN-Zero) with linear attention (arXiv 2006.16236) and, as in
SANA (arXiv 2410.10629), a convolution in the MLP, from which tokens know their place. Samples may
be audio, images or videos of any size. This file needs torch and diffusers alone.
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

SINUSOIDS = 256


class LinearTransformer(ModelMixin, ConfigMixin):
    """A transformer over patches; time, class and pooled text modulate it, text is attended to.

    sample_size, patch_size: one number a side, (height, width) for images; other sizes that can be
    cut into patches work too. num_class_embeds: class ids; None is unconditional.
    cross_attention_dim, pooled_projection_dim: width of the text's tokens and of its pooled
    embedding; None is without.
    """

    _supports_gradient_checkpointing = True

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
        self.gradient_checkpointing = False
        token_grid(sample_size, patch_size)
        self.patch = tuple(patch_size)
        values, rank = math.prod(self.patch), len(self.patch)
        self.embed = nn.Linear(in_channels * values, width)
        self.time = nn.Sequential(nn.Linear(SINUSOIDS, width), nn.SiLU(), nn.Linear(width, width))
        self.classes = nn.Embedding(num_class_embeds, width) if num_class_embeds else None
        self.text = _projection(cross_attention_dim, width)
        self.pooled = _projection(pooled_projection_dim, width)
        hidden, reads = int(mlp_ratio * width), cross_attention_dim is not None
        self.blocks = nn.ModuleList(Block(width, heads, hidden, rank, reads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = zeroed(nn.Linear(width, 2 * width))
        self.project = nn.Linear(width, out_channels * values)
        nn.init.normal_(self.project.weight, std=0.02 / math.sqrt(width))
        nn.init.zeros_(self.project.bias)

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
        for sides that cannot be cut into patches, and for conditions that are missing or not
        known.
        """
        check_given(self.config, class_labels, encoder_hidden_states, pooled_projections)
        grid = token_grid(x.shape[2:], self.patch)
        sinusoids = get_timestep_embedding(timesteps, SINUSOIDS, True, 0)
        emb, text, visible = self.time(sinusoids.to(x.dtype)), None, None
        if self.classes is not None:
            emb = emb + self.classes(class_labels)
        if self.pooled is not None:
            emb = emb + self.pooled(pooled_projections)
        if self.text is not None:
            text = self.text(encoder_hidden_states)
        if encoder_attention_mask is not None:
            visible = encoder_attention_mask.to(torch.bool)[:, None, None]
        emb, tokens = F.silu(emb), self.embed(to_tokens(x, self.patch))
        for block in self.blocks:
            tokens = self._run(block, tokens, emb, grid, text, visible)
        shift, scale = self.modulation(emb)[:, None].chunk(2, dim=-1)
        return to_samples(self.project(self.norm(tokens) * (1 + scale) + shift), grid, self.patch)

    def _run(self, block: nn.Module, *inputs: Any) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(block, *inputs)
        output: Tensor = block(*inputs)
        return output


class Block(nn.Module):
    """Linear attention, attention to the text where there is one, and an MLP; nothing at first."""

    def __init__(self, width: int, heads: int, hidden: int, rank: int, reads: bool) -> None:
        super().__init__()
        self.modulation = zeroed(nn.Linear(width, 6 * width))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.attention = LinearAttention(width, heads)
        self.reading = CrossAttention(width, heads) if reads else None
        self.mlp = ConvMlp(width, hidden, rank)

    def forward(
        self,
        x: Tensor,
        emb: Tensor,
        grid: tuple[int, ...],
        text: Tensor | None,
        visible: Tensor | None,
    ) -> Tensor:
        """x: [B, N, width]; emb: [B, width]; text: [B, M, width]; visible: bool [B, 1, 1, M]."""
        parts = self.modulation(emb)[:, None].chunk(6, dim=-1)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = parts
        x = x + gate * self.attention(self.norm(x) * (1 + scale) + shift)
        if self.reading is not None:
            x = x + self.reading(x, text, visible)
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
        output: Tensor = self.proj(attended.transpose(1, 2).flatten(2))
        return output


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


class CrossAttention(nn.Module):
    """Attention of the tokens to a text; adds nothing at first."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.q, self.kv = (nn.Linear(width, i * width, bias=False) for i in (1, 2))
        self.proj = zeroed(nn.Linear(width, width))

    def forward(self, x: Tensor, text: Tensor, visible: Tensor | None) -> Tensor:
        """x: [B, N, width]; text: [B, M, width]; visible: bool [B, 1, 1, M]."""
        q = self.q(self.norm(x)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv(text).unflatten(-1, (2, self.heads, -1)).transpose(1, 3).unbind(2)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
        output: Tensor = self.proj(attended.transpose(1, 2).flatten(2))
        return output


class ConvMlp(nn.Module):
    """A gated MLP that sees each token's neighbours (mix-FFN, arXiv 2410.10629, sec. 2.2)."""

    def __init__(self, width: int, hidden: int, rank: int) -> None:
        super().__init__()
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1]
        self.expand = nn.Linear(width, 2 * hidden)
        self.neighbours = conv(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden)
        self.project = nn.Linear(hidden, width)

    def forward(self, x: Tensor, grid: tuple[int, ...]) -> Tensor:
        """x: [B, N, width], in rows of the grid."""
        places = F.silu(self.expand(x)).transpose(1, 2).unflatten(2, grid)
        h, gate = self.neighbours(places).flatten(2).transpose(1, 2).chunk(2, dim=-1)
        output: Tensor = self.project(h * F.silu(gate))
        return output


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


def _projection(features: int | None, width: int) -> nn.Module | None:
    """Of text, whatever its scale."""
    if features is None:
        return None
    return nn.Sequential(nn.LayerNorm(features), nn.Linear(features, width))


def zeroed(layer: nn.Linear) -> nn.Linear:
    """A layer that adds nothing at first."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
