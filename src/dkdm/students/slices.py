"""Which entries of a wide network's tensors a narrow network of the same kind takes.

An axis is a row of parts, one after the other: the inputs of a concatenation, the halves of a gated
layer, scale and shift. The first entries of each part are taken; from sinusoids of rising
wavelength, the nearest wavelengths.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

Tensors = Mapping[str, Tensor]
Parts = list[tuple[int, int]]  # lengths in the narrow and in the wide network


class Pair(NamedTuple):
    """A tensor of the narrow network and its counterpart, by name, with all the others of both."""

    name: str
    other: str
    narrow: Tensors
    wide: Tensors

    @property
    def is_whole(self) -> bool:
        """Whether the two have one shape."""
        return self.narrow[self.name].shape == self.wide[self.other].shape

    def lengths(self, dim: int) -> tuple[int, int]:
        """The two lengths of an axis."""
        return self.narrow[self.name].shape[dim], self.wide[self.other].shape[dim]


def taken(pair: Pair, layout: Layout | None) -> Tensor | None:
    """The counterpart's entries that belong to the narrow tensor, in its shape; None for none.

    layout: of the network's class; None if what its axes mean is not known.
    """
    narrow, found = pair.narrow[pair.name], pair.wide[pair.other]
    if layout is None or narrow.ndim != found.ndim:
        return None
    for dim in range(narrow.ndim):
        if pair.lengths(dim)[0] == pair.lengths(dim)[1]:
            continue
        index = layout(pair, dim)
        if index is None:
            return None
        found = found.index_select(dim, index.to(found.device))
    return found


Layout = Callable[[Pair, int], Tensor | None]


def first_entries(parts: Parts) -> Tensor | None:
    """The first entries of each part; None if a part would have to grow."""
    return _joined(parts, lambda n, _: torch.arange(n))


def nearest_wavelengths(parts: Parts) -> Tensor | None:
    """Entries evenly spaced over each part; None if a part would have to grow.

    Entry i of n sinusoids has a frequency near 10000^(-i/n): the nearest among m is i * m / n.
    """
    return _joined(
        parts, lambda n, m: (2 * torch.arange(n) * m + n).div(2 * n, rounding_mode="floor")
    )


def _joined(parts: Parts, choose: Callable[[int, int], Tensor]) -> Tensor | None:
    if any(narrow > wide for narrow, wide in parts):
        return None
    starts = [sum(wide for _, wide in parts[:i]) for i in range(len(parts))]
    return torch.cat([start + choose(*part) for start, part in zip(starts, parts, strict=True)])


def unet(pair: Pair, dim: int) -> Tensor | None:
    """UNet2DModel and UNet2DConditionModel."""
    if (found := _CONCATENATION.fullmatch(pair.name)) and dim == (found[3] != "norm1"):
        narrow, wide = pair.lengths(dim)
        hidden = _hidden_widths(pair.narrow)[found[1]]
        hidden_there = _hidden_widths(pair.wide)[pair.other.removesuffix(found[2])]
        return first_entries([(hidden, hidden_there), (narrow - hidden, wide - hidden_there)])
    if dim == 1 and _TIME.fullmatch(pair.name):
        return _sinusoids(pair)
    for ending, beside, beside_dim in _CHUNKED:
        if dim == 0 and ending in pair.name:
            return _chunked(pair, ending, beside, beside_dim)
    return first_entries([pair.lengths(dim)])


_CONCATENATION = re.compile(
    r"(up_blocks\.\d+\.resnets\.\d+)(\.(norm1|conv1|conv_shortcut)\.(weight|bias))"
)
_TIME = re.compile(r"(time|class)_embedding\.linear_1\.weight")
_CHUNKED = (  # layers whose output is several, and a tensor that says how long one of them is
    (".ff.net.0.proj.", ".ff.net.2.weight", 1),
    (".time_emb_proj.", ".conv1.weight", 0),
)


def _sinusoids(pair: Pair) -> Tensor | None:
    """The input of the time: sines and cosines of fixed or random frequencies, or one embedding."""
    frequencies = pair.narrow.get("time_proj.weight")
    if frequencies is None:
        return nearest_wavelengths(_equal(pair, 1, 2))
    return first_entries(_equal(pair, 1, 2 if frequencies.ndim == 1 else 1))


def _hidden_widths(tensors: Tensors) -> dict[str, int]:
    """Channels that come from below into each residual block on the way up, the skip aside."""
    outputs: dict[tuple[str, int, int], int] = {}
    for name, tensor in tensors.items():
        if found := re.fullmatch(r"(down|up)_blocks\.(\d+)\.resnets\.(\d+)\.conv2\.weight", name):
            outputs[found[1], int(found[2]), int(found[3])] = len(tensor)
    order = sorted(outputs)  # all of "down" before all of "up"
    return {
        f"up_blocks.{stage}.resnets.{block}": outputs[order[i - 1]]
        for i, (way, stage, block) in enumerate(order)
        if way == "up"
    }


def _chunked(pair: Pair, ending: str, beside: str, beside_dim: int) -> Tensor | None:
    counts = [
        tensors[name].shape[0] // tensors[name.split(ending)[0] + beside].shape[beside_dim]
        for tensors, name in ((pair.narrow, pair.name), (pair.wide, pair.other))
    ]
    return first_entries(_equal(pair, 0, counts[0])) if counts[0] == counts[1] else None


def _equal(pair: Pair, dim: int, count: int) -> Parts:
    """An axis as `count` equal parts, and one of what is left over, which pads sinusoids."""
    narrow, wide = pair.lengths(dim)
    rest = [(narrow % count, wide % count)] if narrow % count else []
    return [(narrow // count, wide // count)] * count + rest


def transformer(pair: Pair, dim: int) -> Tensor | None:
    """DiTTransformer2DModel and SD3Transformer2DModel.

    Tokens carry four rows of sinusoids, sine and cosine of each coordinate, so their features are
    chosen by wavelength, and so are those of all layers of a multiple of that width. Heads are
    taken whole, the first ones; of the output the first channels of each pixel of a patch.
    """
    if dim == 0 and _OUTPUT.match(pair.name):
        return first_entries(_equal(pair, dim, pair.narrow[_PATCHES].shape[-1] ** 2))
    if _HEADS[dim == 0].search(pair.name):
        return first_entries([pair.lengths(dim)])
    width, width_there = len(pair.narrow[_PATCHES]), len(pair.wide[_PATCHES])
    narrow, wide = pair.lengths(dim)
    chunks = narrow // width
    if (narrow, wide) != (chunks * width, chunks * width_there):
        return first_entries([(narrow, wide)])
    return nearest_wavelengths(_equal(pair, dim, 4 * chunks))


_PATCHES = "pos_embed.proj.weight"
_OUTPUT = re.compile(r"proj_out(_2)?\.")


_HEADS = {  # axes that are rows of heads: what goes into them, and what comes out
    True: re.compile(r"\.(to_[qkv]|add_[qkv]_proj)\.(weight|bias)$"),
    False: re.compile(r"\.(to_out\.0|to_add_out)\.weight$"),
}
LAYOUTS: dict[str | None, Layout] = {"unet": unet, "transformer": transformer}
