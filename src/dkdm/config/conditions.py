"""What models are conditioned on, and how they are guided."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from dkdm.config.values import ClassId, Count, Share, parse_interval, parse_scale
from dkdm.reading.options import Options
from dkdm.reading.values import Range


class ConditionOptions(Options, title="Condition"):
    """What the model is conditioned on."""

    condition_dropout: Share = 0.0
    """Probability of replacing a condition by the null condition. A model trained with 0 cannot be
    guided when it samples."""
    negative_prompt: str = ""
    """Prompt that guidance leads away from, for text models."""


class LearntConditions(Options):
    """The classes or prompts that the student learns."""

    classes: tuple[ClassId, ...] | None = None
    """Class ids the student learns. Default: all of the teacher's."""
    class_weights: tuple[Annotated[float, Range(0)], ...] | None = None
    """Relative frequency of each class in --classes. Default: all equally often."""
    prompts: str | None = None
    """Text file with one prompt a line, or a pattern such as 'prompts/*.txt'. Text models need
    it."""
    max_prompts: Count = 50_000
    """Use at most this many prompts, drawn at random from longer files."""


class TeacherConditions(ConditionOptions, LearntConditions):
    """The classes or prompts that the student learns."""

    random_conditioning: Share = 0.0
    """Largest probability, at the highest noise level, of showing a noisy state under another
    condition than its own; it falls to e^-5 of that at the lowest (arXiv 2504.02011)."""


class GivenConditions(Options, title="Condition"):
    """What the model is given beside noise."""

    prompts: str | None = None
    """For text models: a text file with one prompt a line, a pattern such as 'prompts/*.txt', or
    the prompt itself."""
    negative_prompt: str = ""
    """Prompt that guidance leads away from, for text models."""
    cond: Path | None = None
    """For models with a custom conditioning: .safetensors or .npz with a tensor [N, ...] for each
    name, and null.NAME [1, ...] for guidance."""


class GuidanceOptions(Options, title="Guidance"):
    """How the teacher is guided."""

    guidance_scale: str = "1"
    """Guidance scale of the teacher: a number, or LOW:HIGH to draw a scale for each chain. 1 turns
    guidance off. Guidance doubles the teacher's cost, unless the teacher takes the scale as an
    input."""
    guidance_interval: str | None = None
    """LOW:HIGH, the shares of noise sigma / (alpha + sigma) between which guidance acts (arXiv
    2404.07724), such as 0.3:0.7. Default: everywhere."""
    guidance_on: Literal["target", "chain"] = "target"
    """target: guide the pool and the target, which bakes guidance into the student. chain: guide
    only how states move; the student learns the unguided model."""

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_scale(self.guidance_scale)
        parse_interval(self.guidance_interval)

    @property
    def scales(self) -> tuple[float, float]:
        """Lowest and highest guidance scale."""
        return parse_scale(self.guidance_scale)

    @property
    def interval(self) -> tuple[float, float] | None:
        """The shares of noise between which guidance acts; None is everywhere."""
        return parse_interval(self.guidance_interval)

    @property
    def chain_only(self) -> bool:
        """Whether the target stays unguided."""
        return self.guidance_on == "chain"

    @property
    def is_off(self) -> bool:
        """Whether nothing is guided."""
        return self.scales == (1, 1)
