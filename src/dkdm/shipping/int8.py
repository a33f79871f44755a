"""A model to ship in int8: a diffusers folder whose network's linear layers are quantized."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import diffusers
import torch

from dkdm.core.denoisers.denoiser import Denoiser
from dkdm.errors import DkdmError, UsageError
from dkdm.models.architectures import component_of
from dkdm.reading.files import check_output
from dkdm.shipping.pipeline_folder import write_pipeline

NEEDED = "--format int8 needs torchao 0.16 or newer: pip install 'dkdm[quant]'"


def write_int8_folder(denoiser: Denoiser, folder: Path, overwrite: bool = False) -> None:
    """Write the pipeline folder with the weights of linear layers in int8, the rest in bfloat16.

    diffusers loads it if torchao is installed, by the config beside the weights. Raises UsageError
    for a folder that exists and for a network of another library, DkdmError without torchao.
    """
    check_output("--output", folder, folder=True, overwrite=overwrite)
    network: Any = denoiser.network
    if not hasattr(network, "save_pretrained"):
        raise UsageError(
            f"--format int8: {type(network).__name__} is not a diffusers ModelMixin, which reads "
            "and writes quantized weights"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchao's own, about its kernels
        config = _int8_config()
        write_pipeline(folder, denoiser)
        part = folder / component_of(type(network).__name__)
        quantized = type(network).from_pretrained(
            part, quantization_config=config, torch_dtype=torch.bfloat16
        )
        for file in part.glob("*.safetensors"):
            file.unlink()
        quantized.save_pretrained(part)


def _int8_config() -> Any:
    try:
        from torchao.prototype.safetensors import safetensors_support  # noqa: F401
        from torchao.quantization import Int8WeightOnlyConfig
    except ImportError as error:
        raise DkdmError(NEEDED) from error
    return diffusers.TorchAoConfig(Int8WeightOnlyConfig())
