"""Components whose weights are quantized: which package reads them, and whether it is here."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch

from dkdm.errors import UsageError
from dkdm.reading.fields import is_name, shown

_PACKAGES = {  # of a quant_method: (module, package)
    "bitsandbytes": ("bitsandbytes", "bitsandbytes"),
    "bitsandbytes_4bit": ("bitsandbytes", "bitsandbytes"),
    "bitsandbytes_8bit": ("bitsandbytes", "bitsandbytes"),
    "torchao": ("torchao", "torchao"),
    "gguf": ("gguf", "gguf"),
    "quanto": ("optimum", "optimum-quanto"),
    "modelopt": ("modelopt", "nvidia-modelopt"),
}
_ON_GPU = ("bitsandbytes",)


def check_quantized(config: Mapping[str, Any], where: str) -> None:
    """Raise UsageError if a component is quantized by a package that cannot be used here.

    config: the component's config.json; where: the file, for the message.
    """
    asked = config.get("quantization_config")
    if not isinstance(asked, Mapping):
        return
    method = asked.get("quant_method") or ("bitsandbytes" if "load_in_4bit" in asked else None)
    remedy = "take the repository with the plain weights"
    if not isinstance(method, str) or not is_name(method):
        raise UsageError(f"{where}: quantized by {shown(method)}, which is unknown; {remedy}")
    module, package = _PACKAGES.get(method, (method, method))
    if find_spec(module) is None:
        raise UsageError(
            f"{where}: quantized with {package}, which is not installed; install it "
            f"(pip install {package}), or {remedy}"
        )
    if module in _ON_GPU and not torch.cuda.is_available():
        raise UsageError(
            f"{where}: quantized with {package}, which needs a GPU; this machine has none; {remedy}"
        )
