"""LoRA weights, read as the pipeline's own `load_lora_weights` reads them, and merged for good."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from dkdm.errors import DkdmError, UsageError, in_a_line
from dkdm.models.formats.state_dict import read_header, read_weights
from dkdm.reading.fields import Fields, is_number, shown
from dkdm.reading.places import expanded

LoraChoice = Path | str | tuple[Path | str, float]
_DOWN = ".lora_A.weight"  # rows of these, in peft's names, are a layer's rank
METADATA = "lora_adapter_metadata"  # the entry of a safetensors header that diffusers writes
IN_FOLDER = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin")


@dataclass(frozen=True)
class Lora:
    """A file of low-rank updates, and how much of them is added."""

    file: Path
    weight: float = 1.0


def read_choices(choices: Iterable[LoraChoice] | LoraChoice) -> tuple[Lora, ...]:
    """LoRAs from a list of choices, or from one. Raises as `read_choice`."""
    if isinstance(choices, (str, Path)):
        return (read_choice(choices),)
    found: tuple[Any, ...] = tuple(choices)
    if len(found) == 2 and is_number(found[1]):
        found = (found,)
    return tuple(map(read_choice, found))


def read_choice(choice: LoraChoice) -> Lora:
    """A LoRA from FILE, "FILE:WEIGHT" or (FILE, WEIGHT).

    The name of a file that exists is never taken apart, whatever colons are in it. Raises
    UsageError for a missing file and for a weight that is not a number.
    """
    file, weight = choice if isinstance(choice, tuple) and len(choice) == 2 else (choice, 1.0)
    if not (isinstance(file, (str, Path)) and is_number(weight)):
        raise UsageError(
            f"--teacher-lora {shown(choice)}: give FILE, FILE:WEIGHT or (FILE, WEIGHT)"
        )
    weighted = re.fullmatch(r"(.+):([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)", str(file))
    if file is choice and weighted and not expanded(file).exists():
        file, weight = weighted[1], float(weighted[2])
    return Lora(_existing(Path(file)), float(weight))


def _existing(path: Path) -> Path:
    """The file, or the only one of a folder that diffusers would take."""
    path = expanded(path)
    inside = [path / name for name in IN_FOLDER if (path / name).is_file()]
    if not path.is_file() and not inside:
        raise UsageError(
            f"--teacher-lora {path}: no such file. Give FILE, or FILE:WEIGHT with a number"
        )
    return inside[0] if inside else path


def merge_loras(
    network: nn.Module, pipeline: str | None, component: str, loras: Sequence[Lora]
) -> None:
    """Add the low-rank updates of LoRA files to a diffusers network, and leave no trace of them.

    The same as `load_lora_weights` for each file, `set_adapters` with the weights and `fuse_lora`.
    pipeline: class name of the pipeline it belongs to, which knows the formats of the files.
    Raises UsageError for a file that changes nothing in this network or also changes a text
    encoder, DkdmError for one that is damaged or does not fit.
    """
    if not loras:
        return
    holder = _holder(network, pipeline, component)
    adapted: Any = network
    names = [f"dkdm{index}" for index in range(len(loras))]
    try:
        for name, lora in zip(names, loras, strict=True):
            _load(holder, component, name, lora.file)
        adapted.set_adapters(names, [lora.weight for lora in loras])
        adapted.fuse_lora(adapter_names=names)
        adapted.unload_lora()
    except ImportError as error:
        raise DkdmError("--teacher-lora needs peft: pip install 'dkdm[lora]'") from error
    for trace in ("lora_scale", "_safe_fusing", "_hf_peft_config_loaded"):
        vars(network).pop(trace, None)
    network.requires_grad_(False)


def _holder(network: nn.Module, pipeline: str | None, component: str) -> Any:
    """A pipeline of this class with nothing in it but the network."""
    cls: Any = getattr(diffusers, str(pipeline), None)
    if not hasattr(cls, "load_lora_weights") or not hasattr(network, "load_lora_adapter"):
        raise UsageError(
            f"--teacher-lora: {pipeline or type(network).__name__} takes no LoRA: diffusers has no "
            "loader for it. Merge the file with the tool that made it, and remove this option"
        )
    kind: Any = type(cls.__name__, (cls,), {"components": {component: network}})
    holder = object.__new__(kind)
    vars(holder).update({component: network, "text_encoder": None, "text_encoder_2": None})
    vars(holder)["load_lora_into_text_encoder"] = lambda *_, **__: None
    return holder


def _load(holder: Any, component: str, name: str, file: Path) -> None:
    """Read one file, as data, and let a pipeline convert its names and load it as an adapter."""
    where = f"--teacher-lora {file}"
    tensors = read_weights(file).tensors
    _check_tensors(tensors, where)
    metadata = _metadata(file, tensors, component, where)
    stock = type(holder).lora_state_dict

    def lora_state_dict(_: Any, **options: Any) -> Any:
        found = stock(dict(tensors), **options)
        _check_parts(found[0], component, where)
        _check_channels(found[0], holder, component, where)
        return (*found[:-1], metadata)

    vars(holder)["lora_state_dict"] = lora_state_dict
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")
            holder.load_lora_weights(str(file), adapter_name=name)
    except (ImportError, DkdmError):
        raise
    except Exception as error:  # the conversions of diffusers raise whatever a name leads to
        raise DkdmError(f"{where}: does not fit this network: {in_a_line(error)}") from error
    _check_all_used(vars(holder)[component], name, tensors, where)


def _check_tensors(tensors: Mapping[str, Tensor], where: str) -> None:
    if any("dora_scale" in key for key in tensors):
        raise UsageError(
            f"{where}: holds DoRA scales (dora_scale), which diffusers drops: the result would not "
            "be what was trained. Merge it with the tool that made it, and remove this option"
        )
    broken = [key for key, value in tensors.items() if not torch.isfinite(value).all()]
    if broken:
        raise DkdmError(f"{where}: {broken[0]} holds values that are not finite numbers")


def _check_parts(state: Mapping[str, Tensor], component: str, where: str) -> None:
    parts = {key.split(".")[0] for key in state}
    elsewhere = ", ".join(sorted(parts - {component})[:4])
    if component not in parts:
        raise UsageError(f"{where}: changes {elsewhere or 'nothing'}, nothing of {component}")
    if elsewhere:
        raise UsageError(
            f"{where}: also changes {elsewhere}. Merge it with diffusers first: "
            "pipeline.load_lora_weights(FILE); pipeline.fuse_lora(); "
            "pipeline.unload_lora_weights(); pipeline.save_pretrained(FOLDER)"
        )


def _check_channels(state: Mapping[str, Tensor], holder: Any, component: str, where: str) -> None:
    """Raise UsageError for a control LoRA, whose first layer takes an image's channels too."""
    first = getattr(vars(holder)[component], "x_embedder", None)
    down = state.get(f"{component}.x_embedder.lora_A.weight")
    if isinstance(first, nn.Linear) and down is not None and down.shape[1] != first.in_features:
        raise UsageError(
            f"{where}: a control LoRA, which is fed an image too ({down.shape[1]} channels, not "
            f"{first.in_features}), and cannot be distilled without one"
        )


def _check_all_used(
    network: nn.Module, name: str, tensors: Mapping[str, Tensor], where: str
) -> None:
    """Raise DkdmError for layers that the network does not have; diffusers drops these."""
    layers = sum(re.search(r"lora.*(_A|down)\.weight$", key) is not None for key in tensors)
    used = sum(name in getattr(module, "lora_A", ()) for module in network.modules())
    if used < layers:
        raise DkdmError(
            f"{where}: does not fit this network: {layers - used} of its {layers} layers are not "
            "in it"
        )


# --- the metadata that peft and diffusers' trainers write ----------------------------------------

# What does not change a finished LoRA; it is left out, whatever it says.
_INERT = frozenset(
    (
        "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
        "inference_mode", "lora_dropout", "runtime_config", "loftq_config", "eva_config",
        "corda_config", "lora_ga_config", "megatron_core", "qalora_group_size", "peft_type",
        "ensure_weight_tying", "exclude_modules", "layers_to_transform", "layers_pattern",
        "target_modules",
    )
)  # fmt: skip
_HARMLESS: dict[str, tuple[Any, ...]] = {"bias": ("none",), "init_lora_weights": (True, "gaussian")}


def _metadata(
    file: Path, tensors: Mapping[str, Tensor], component: str, where: str
) -> dict[str, Any] | None:
    """The arguments of peft's LoraConfig in the header: ranks and alphas, checked; None if absent.

    The layers are those that the file has weights for, whatever the header calls them.
    """
    raw = read_header(file).get(METADATA) if file.suffix == ".safetensors" else None
    if not raw:
        return None
    try:
        values = json.loads(raw)
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(f"{where}: its {METADATA} cannot be read as JSON: {error}") from error
    if not isinstance(values, dict):
        raise UsageError(f"{where}: its {METADATA} is {shown(values)}, not an object")
    prefix = f"{component}."
    own = {k.removeprefix(prefix): v for k, v in values.items() if k.startswith(prefix)}
    down = {k: v for k, v in tensors.items() if k.startswith(prefix) and k.endswith(_DOWN)}
    layers = {k.removeprefix(prefix).removesuffix(_DOWN): len(v) for k, v in down.items()}
    if not own or not layers:
        return None
    checked = _checked(Fields(own, f"{where}: {METADATA}"), max(layers.values()))
    return {prefix + k: v for k, v in (checked | {"target_modules": sorted(layers)}).items()}


def _checked(fields: Fields, largest: int) -> dict[str, Any]:
    """The entries that decide what a LoRA adds. largest: rank among the file's tensors."""
    checked: dict[str, Any] = {
        "r": fields.whole("r", 8, low=1, high=largest),
        "lora_alpha": fields.number("lora_alpha", 8.0, low=-1e6, high=1e6),
        "rank_pattern": _pattern(fields, "rank_pattern", 1, largest),
        "alpha_pattern": _pattern(fields, "alpha_pattern", -1e6, 1e6),
    }
    checked |= {name: fields.flag(name, False) for name in ("use_rslora", "use_dora", "lora_bias")}
    for name, value in fields.values.items():
        known = name in checked or name in _INERT or value in _HARMLESS.get(name, ())
        if value and not known:
            raise UsageError(
                f"{fields.where}: {name} is {shown(value)}, which cannot be merged: give a "
                "LoRA that changes weights alone, by rank and alpha"
            )
    return checked


def _pattern(fields: Fields, name: str, low: float, high: float) -> dict[str, float]:
    """A number for layers of a name, which peft reads as a regular expression."""
    found = fields.inner(name, None)
    if found is None:
        return {}
    for pattern in found.values:
        if not _is_simple(pattern):
            raise UsageError(f"{found.where}: {shown(pattern)} is not the name of a layer")
    if name == "rank_pattern":
        return {key: found.whole(key, low=int(low), high=int(high)) for key in found.values}
    return {key: found.number(key, low=low, high=high) for key in found.values}


def _is_simple(pattern: str) -> bool:
    """Whether this is a name, or a regular expression that is tried in no time."""
    if len(pattern) > 300 or re.search(r"\)[*+?{]", pattern):
        return False
    if re.fullmatch(r"[\w.^$\\*+|()-]+", pattern) is None or len(re.findall("[*+]", pattern)) > 2:
        return False
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True
