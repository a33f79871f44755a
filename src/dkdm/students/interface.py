"""What a student has to fit: samples, channels and conditions of its teacher."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from dkdm.core.denoisers.bundle import Coder
from dkdm.core.denoisers.conditioning import Conditioning, Unconditional
from dkdm.core.denoisers.kinds import kind_of
from dkdm.errors import UsageError

KINDS = {
    "vectors": ("channels",),
    "audio": ("channels", "length"),
    "images": ("channels", "height", "width"),
    "videos": ("channels", "frames", "height", "width"),
}
TEXTS = {
    "encoder_hidden_states": "text embedding",
    "pooled_projections": "pooled text embedding",
}


@dataclass(frozen=True)
class Interface:
    """What a student takes and returns.

    sample_shape: (C, ...) of one sample; out_channels: C, or 2C with a learned variance.
    conditioning: what it is fed beside (x_t, t). teacher: the teacher's network, for students that
    are cut from it; None, or a function, if it has no network. autoencoder: the one whose
    latents the samples are; None in pixel space.
    """

    sample_shape: tuple[int, ...]
    out_channels: int
    conditioning: Conditioning = Unconditional()
    teacher: nn.Module | Callable[..., Any] | None = None
    autoencoder: Coder | None = None

    def shape_of(self, *kinds: str) -> tuple[int, ...]:
        """The shape of a sample. Raises UsageError unless it is one of these `KINDS`."""
        shape = self.sample_shape
        if len(shape) not in (len(KINDS[kind]) for kind in kinds):
            known = " and ".join(f"{kind} ({', '.join(KINDS[kind])})" for kind in kinds)
            hint = ": use mlp-tiny for vectors" if len(shape) == 1 else ""
            raise UsageError(f"this preset is for {known}; the samples have shape {shape}{hint}")
        return shape

    @property
    def sample_size(self) -> int | tuple[int, int]:
        """Height and width, as in diffusers' configs: one number if they are the same."""
        _, height, width = self.shape_of("images")
        return height if height == width else (height, width)

    @property
    def num_class_embeds(self) -> int | None:
        """Rows of a table of class embeddings, the null class included; None without classes."""
        return kind_of(self.conditioning).table_rows

    def text_width(self, name: str) -> int | None:
        """Width of a text embedding, one of `TEXTS`; None if the teacher has none."""
        kind = kind_of(self.conditioning)
        row = kind.fed().get(name) if kind.asks == "prompt" else None
        return None if row is None else row.shape[-1]

    def needed_text_width(self, name: str) -> int:
        """`text_width`. Raises UsageError if the teacher has none."""
        width = self.text_width(name)
        if width is None:
            raise UsageError(f"this preset needs a {TEXTS[name]}, and the teacher has none")
        return width


@dataclass(frozen=True)
class Preset:
    """A named student network: what it is, and how to build it."""

    name: str
    summary: str
    build: Callable[[Interface], nn.Module]


def preset(name: str, summary: str, build: Callable[..., nn.Module], /, **sizes: Any) -> Preset:
    """A named student that `build(interface, **sizes)` makes."""
    return Preset(name, summary, partial(build, **sizes))


def check_halvings(interface: Interface, levels: int) -> None:
    """Raise UsageError if a side of the samples cannot be halved between `levels` levels."""
    halvings = 2 ** (levels - 1)
    sides = interface.sample_shape[1:]
    if any(side % halvings for side in sides):
        what = "height and width" if len(sides) == 2 else "every side"
        last = len(sides) == 2 and sides[1] in (1, 3)
        hint = "; sample_shape is (channels, height, width), channels first" if last else ""
        raise UsageError(
            f"a UNet of {levels} levels needs {what} divisible by {halvings}; "
            f"the samples are {'x'.join(map(str, sides))}{hint}"
        )


def patch_sides(interface: Interface) -> tuple[int, ...]:
    """Sides of a transformer's patch, for samples of any rank: 64 values a channel at most.

    For an image or a frame: 8, 4, 2 or 1, the largest that divides both sides and leaves 8 tokens
    along each. For audio: the largest power of 2 up to 64 that leaves 64 tokens. Two frames share a
    patch if that leaves 8 or more. Raises UsageError for vectors.
    """
    sides = interface.shape_of("audio", "images", "videos")[1:]
    if len(sides) == 1:
        return (_largest((64, 32, 16, 8, 4, 2), sides, 64),)
    plane = _largest((8, 4, 2), sides[-2:], 8)
    return *(_largest((2,), (frames,), 8) for frames in sides[:-2]), plane, plane


def _largest(patches: tuple[int, ...], sides: tuple[int, ...], tokens: int) -> int:
    """The first patch that divides the sides into at least this many tokens; otherwise 1."""
    fits = (p for p in patches if all(s % p == 0 and s // p >= tokens for s in sides))
    return next(fits, 1)


def group_size(*channels: int) -> int:
    """Groups of a group normalization: 32, or the largest number that divides all of these."""
    return math.gcd(32, *channels)
