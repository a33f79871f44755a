"""How a teacher is to be loaded: what its name alone does not say."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dkdm.models.custom_network import Factory
from dkdm.models.lora import LoraChoice


@dataclass(frozen=True)
class LoadOptions:
    """What a loader may need beside the path: options as `config.ModelChoice` explains them.

    sample_size: its `size`, (height, width), (length,) or (frames, height, width). ema: whether
    averaged weights are taken if a file has both. lora: each as FILE, "FILE:WEIGHT" or
    (FILE, WEIGHT). factory: a callable too; None if this machine made the run itself.
    """

    variant: str | None = None
    dtype: str = "float32"
    sample_size: tuple[int, ...] | None = None
    config: Path | None = None
    flags: str = ""
    ema: bool = True
    scheduler: str | Path | None = None
    lora: tuple[LoraChoice, ...] = ()
    factory: Factory | None = None
    null_class: int | Literal["none"] | None = None
