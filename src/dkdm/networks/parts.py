"""What several networks are made of; a student ships it in one file with its network."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from functools import reduce
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn

Resample = Literal["up", "down"]
Layer = TypeVar("Layer", bound=nn.Module)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Network(ModelMixin, ConfigMixin):
    """A network of diffusers that can compute its blocks again in the backward pass."""

    _supports_gradient_checkpointing = True
    gradient_checkpointing = False

    def _run(self, block: nn.Module, *inputs: Any) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(block, *inputs)
        return block(*inputs)


class ConditionedNetwork(Network):
    """A network that is fed time and, by its config, a class, a text and its pooled embedding.

    time_channels: sines and cosines of the time. Its config has num_class_embeds, class ids, and
    cross_attention_dim and pooled_projection_dim, widths of the text's tokens and of its pooled
    embedding; each is None for a network without.
    """

    time_channels: int
    time: nn.Module
    classes: nn.Module | None
    text: nn.Module | None
    pooled: nn.Module | None

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
        for a size of x that the network cannot take, and for conditions missing or not known.
        """
        self._check_given(class_labels, encoder_hidden_states, pooled_projections)
        sinusoids = get_timestep_embedding(timesteps, self.time_channels, True, 0)
        vectors = [self.time(sinusoids.to(x.dtype))]
        if self.classes is not None:
            vectors.append(self.classes(class_labels))
        if self.pooled is not None:
            vectors.append(self.pooled(pooled_projections))
        text = None if self.text is None else self.text(encoder_hidden_states)
        mask = encoder_attention_mask
        return self._output(x, vectors, text, None if mask is None else mask.to(torch.bool))

    def _output(
        self, x: Tensor, vectors: list[Tensor], text: Tensor | None, mask: Tensor | None
    ) -> Tensor:
        """The output of `forward`.

        vectors: time, class and pooled text, [B, width] each; text: [B, N, width]; mask: bool
        [B, N], False for padding.
        """
        raise NotImplementedError

    def _check_given(self, *conditions: Tensor | None) -> None:
        names = ("class_labels", "encoder_hidden_states", "pooled_projections")
        options = ("num_class_embeds", "cross_attention_dim", "pooled_projection_dim")
        for name, option, given in zip(names, options, conditions, strict=True):
            if (self.config[option] is None) != (given is None):
                wanted = "remove" if given is not None else "give"
                raise ValueError(f"{option} is {self.config[option]}: {wanted} {name}")


def summed(vectors: Sequence[Tensor]) -> Tensor:
    """The sum of one tensor or more."""
    return reduce(torch.add, vectors)


def projection(features: int | None, width: int) -> nn.Module | None:
    """A layer for text of any scale; None for no text."""
    if features is None:
        return None
    return nn.Sequential(LayerNorm(features), nn.Linear(features, width))


def zeroed(layer: Layer) -> Layer:
    """A layer that adds nothing at first."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def autocast_type(x: Tensor) -> torch.dtype | None:
    """The type that autocast computes in on the device of x; None where it is off."""
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return None


class GroupNorm(nn.GroupNorm):
    """torch's, whose result under autocast is of autocast's type.

    torch's own is float32 on a CUDA device then, and so would be all up to the next convolution.
    Mean and variance are computed in float32 in either.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, C, ...]."""
        wanted = autocast_type(x)
        if wanted is None:
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
            return F.group_norm(x, self.num_groups, weight, bias, self.eps).to(wanted)


class LayerNorm(nn.LayerNorm):
    """torch's, whose result under autocast is of autocast's type, as that of `GroupNorm`."""

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., width]."""
        wanted = autocast_type(x)
        if wanted is None:
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            weight, bias = (None if p is None else p.to(x.dtype) for p in (self.weight, self.bias))
            return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps).to(wanted)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Scaled dot-product attention of q [B, heads, N, D] to k and v [B, heads, M, D].

    mask: bool, broadcast to [B, heads, N, M]. The fast kernels of a device ask for channels that
    lie side by side, which those of a convolution do not; on a CPU a copy costs more than it saves
    in the backward pass.
    """
    if q.device.type != "cpu":
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class Attention(nn.Module):
    """Attention of tokens to each other, or to a text."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = LayerNorm(width)
        self.q, self.kv = (nn.Linear(width, i * width, bias=False) for i in (1, 2))
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, text: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """x: [B, N, width]; text: [B, M, width], None is x itself; mask: bool [B, M]."""
        h = self.norm(x)
        q = self.q(h).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        pairs = self.kv(h if text is None else text).unflatten(-1, (2, self.heads, -1))
        k, v = pairs.transpose(1, 3).unbind(2)
        visible = None if mask is None else mask[:, None, None]
        return self.proj(attend(q, k, v, visible).transpose(1, 2).flatten(2))


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


def one_hot(class_labels: Tensor | None, classes: int, like: Tensor) -> Tensor:
    """[B, classes] in the precision of `like`; without labels, zeros."""
    if class_labels is None:
        return like.new_zeros(like.shape[0], classes)
    return F.one_hot(class_labels, classes).to(like)


def levels_of(size: int, widths: Sequence[int]) -> list[tuple[int, int]]:
    """(resolution, width) of each level, each of half the resolution of the one before."""
    return [(size >> level, width) for level, width in enumerate(widths)]


def encoder_and_decoder(
    first: Any,
    levels: Sequence[tuple[int, int]],
    blocks: int,
    attends: Container[int],
    block: Callable[..., nn.Module],
    up_block: Callable[..., nn.Module],
    all_attend: bool = True,
) -> tuple[nn.ModuleDict, nn.ModuleDict]:
    """The layers of EDM's UNets, named by their resolution.

    first: convolution of the image. blocks: of a level of the encoder; the decoder has one more.
    attends: resolutions with attention; all_attend: in all blocks of the decoder, not only in the
    last one. block, up_block: (in_channels, out_channels, resample=..., attends=...) -> a block of
    the encoder and of the decoder.
    """
    top, lowest, width = levels[0][0], levels[-1][0], len(first.weight)
    encoder, decoder = nn.ModuleDict({f"{top}x{top}_conv": first}), nn.ModuleDict()
    skips = [width]
    for size, wanted in levels:
        if size != top:
            encoder[f"{size}x{size}_down"] = block(width, width, resample="down")
            skips.append(width)
        for i in range(blocks):
            encoder[f"{size}x{size}_block{i}"] = block(width, wanted, attends=size in attends)
            width = wanted
            skips.append(width)
    decoder[f"{lowest}x{lowest}_in0"] = up_block(width, width, attends=True)
    decoder[f"{lowest}x{lowest}_in1"] = up_block(width, width)
    for size, wanted in reversed(levels):
        if size != lowest:
            decoder[f"{size}x{size}_up"] = up_block(width, width, resample="up")
        for i in range(blocks + 1):
            here = size in attends and (all_attend or i == blocks)
            joined = width + skips.pop()
            decoder[f"{size}x{size}_block{i}"] = up_block(joined, wanted, attends=here)
            width = wanted
    return encoder, decoder
