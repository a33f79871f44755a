"""Where a teacher's weights are, and how small: int8 linear layers, layers moved in one by one."""

from __future__ import annotations

from typing import Literal

import torch
from accelerate import cpu_offload
from accelerate.state import PartialState, is_initialized
from torch import nn

from dkdm.core.denoisers.denoiser import Denoiser
from dkdm.core.denoisers.graphs import replayed
from dkdm.core.denoisers.teachers import parts_of
from dkdm.errors import DkdmError

Offload = Literal["none", "layers"]


def device_of_run() -> torch.device:
    """The device that this process computes on: its run's or, without a run, the accelerator."""
    if is_initialized():
        found: torch.device = PartialState().device
        return found
    return torch.accelerator.current_accelerator() or torch.device("cpu")


def quantize_int8(network: nn.Module) -> None:
    """Keep the weights of linear layers in int8, one scale a row; the arithmetic stays as it is.

    Raises DkdmError if torchao is not installed.
    """
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise DkdmError("--teacher-dtype int8 needs torchao: pip install 'dkdm[quant]'") from error
    quantize_(network, Int8WeightOnlyConfig())


def place(denoiser: Denoiser, device: torch.device, offload: Offload = "none") -> None:
    """Bring a model to the device, whole or a layer at a time, when its turn comes."""
    network = denoiser.network
    if not isinstance(network, nn.Module):
        return
    if offload == "none":
        network.to(device)
    else:
        cpu_offload(network, execution_device=device, offload_buffers=True)


def ready_to_draw(denoiser: Denoiser, cuda_graphs: bool) -> Denoiser:
    """The model on the CUDA device of this process, if there is one and the model is on the CPU.

    cuda_graphs: whether its calls are replayed there.
    """
    device = device_of_run()
    for one in parts_of(denoiser):
        if device.type == "cuda" and one.device.type == "cpu":
            place(one, device)
    return replayed(denoiser) if cuda_graphs else denoiser
