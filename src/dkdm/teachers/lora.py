"""LoRA weights, merged into the network they were made for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from dkdm.errors import DkdmError, UsageError


def merge_lora(network: nn.Module, pipeline: str | None, component: str, file: Path) -> None:
    """Add the low-rank updates of a LoRA file to a diffusers network, and leave no trace of it.

    pipeline: class name of the pipeline it belongs to, which knows the formats of the files.
    Raises UsageError for a file that changes nothing in this network or also changes a text
    encoder, DkdmError where it does not fit.
    """
    import diffusers

    cls: Any = getattr(diffusers, str(pipeline), None)
    adapted: Any = network
    if not hasattr(cls, "lora_state_dict") or not hasattr(network, "load_lora_adapter"):
        raise UsageError(f"--teacher-lora: {pipeline or type(network).__name__} takes no LoRA")
    if not file.is_file():
        raise UsageError(f"--teacher-lora {file}: no such file")
    try:
        read = cls.lora_state_dict(str(file.parent), weight_name=file.name)
        state = read[0] if isinstance(read, tuple) else read
        elsewhere = sorted({key.split(".")[0] for key in state} - {component})
        if not any(key.startswith(f"{component}.") for key in state):
            raise UsageError(f"--teacher-lora {file}: changes {elsewhere}, nothing of {component}")
        if elsewhere:
            raise UsageError(
                f"--teacher-lora {file}: also changes {', '.join(elsewhere)}. Merge it with "
                "diffusers first: pipeline.load_lora_weights(FILE); pipeline.fuse_lora(); "
                "pipeline.unload_lora_weights(); pipeline.save_pretrained(FOLDER)"
            )
        adapted.load_lora_adapter(state, prefix=component, adapter_name="dkdm")
        adapted.fuse_lora(adapter_names=["dkdm"])
        adapted.unload_lora()
    except ImportError as error:
        raise DkdmError("--teacher-lora needs peft: pip install 'dkdm[lora]'") from error
    except (ValueError, RuntimeError, OSError, KeyError) as error:
        first = " ".join(str(error).split("\n")[:2])
        raise DkdmError(f"--teacher-lora {file}: does not fit this network: {first}") from error
