"""Low-rank adapters on the weights that a student inherited, which stay fixed.

Source: LoRA (arXiv 2106.09685), W + B A with B = 0 at first. The scale is 1, so that the weights
alone say what the network computes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Set

from torch import Tensor, nn

from dkdm.errors import DkdmError, UsageError

_ADAPTED = ".base_layer."
_A, _B = ".lora_A.default.weight", ".lora_B.default.weight"


def add_lora(network: nn.Module, inherited: Set[str], rank: int) -> frozenset[str]:
    """Put adapters on linear layers and convolutions of 1x1 and 3x3; returns the fixed parameters.

    inherited: names of the tensors that stay fixed; a layer whose weight is not among them gets no
    adapter. rank: of B A, at least 1. The network keeps its class. Raises UsageError if there is
    nothing to adapt, DkdmError if peft is not installed.
    """
    layers = [
        name
        for name, module in network.named_modules()
        if _takes_lora(module) and f"{name}.weight" in inherited
    ]
    if not layers:
        raise UsageError(
            f"--lora-rank {rank}: no linear layer and no convolution of this "
            f"{type(network).__name__} was inherited; leave this option out"
        )
    _inject(network, layers, rank)
    names = (name for name, _ in network.named_parameters())
    return frozenset(name for name in names if name.replace(_ADAPTED, ".") in inherited)


def _takes_lora(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv2d):
        plain = module.groups == 1 and module.dilation == (1, 1) and module.padding_mode == "zeros"
        return plain and module.kernel_size in ((1, 1), (3, 3))
    return isinstance(module, nn.Linear)


def _inject(network: nn.Module, layers: list[str], rank: int) -> None:
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise DkdmError("--lora-rank needs peft: pip install 'dkdm[lora]'") from error
    exactly = "|".join(map(re.escape, layers))  # a list of names would match their endings too
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=exactly), network)


def inherited_names(frozen: Set[str]) -> set[str]:
    """The names given to `add_lora` as inherited, from those that it returned."""
    return {name.replace(_ADAPTED, ".") for name in frozen}


def merged_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a plain network: every adapter added to its layer."""
    plain = {k.replace(_ADAPTED, "."): v for k, v in weights.items() if not _is_adapter(k)}
    for key in weights:
        if key.endswith(_A):
            layer = key.removesuffix(_A)
            weight, down, up = plain[f"{layer}.weight"], weights[key], weights[f"{layer}{_B}"]
            update = (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
            plain[f"{layer}.weight"] = weight + update
    return plain


def _is_adapter(key: str) -> bool:
    return key.endswith((_A, _B))


def merge_lora(network: nn.Module) -> nn.Module:
    """Merge the adapters of a network, in place; returns it, a plain one of its class."""
    weights = network.state_dict()
    if not any(map(_is_adapter, weights)):
        return network
    for name, module in list(network.named_modules()):
        if hasattr(module, "lora_A"):
            network.set_submodule(name, module.get_base_layer())
    network.load_state_dict(merged_weights(weights))
    del network.peft_config
    return network
