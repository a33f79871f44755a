"""How a teacher is to be loaded: what its name alone does not say."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dkdm.models.custom_network import Factory
from dkdm.models.lora import LoraChoice


@dataclass(frozen=True)
class LoadOptions:
    """What a loader may need beside the path.

    variant: of the weight files, such as fp16. dtype: of the weights. sample_size: (height, width)
        or (length,) or (frames, height, width) of a sample as the network sees it; None is what its
        config says. config: a config file of the original repository. flags: its command-line
        flags, as one string. ema: whether averaged weights are taken if a file has both.
    scheduler: of a network that lies alone: a name such as ddpm-linear, a scheduler_config.json or
        a folder with one.
    lora: files of low-rank updates merged into the network, each as FILE, "FILE:WEIGHT" or
        (FILE, WEIGHT). factory: that makes a custom network again, `module:name` or a callable;
        None if this machine made the run itself.
    null_class: the class id that means "no class"; "none" if there is no such id; None is what
        the model says.
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
