"""A diffusers pipeline folder: its denoiser, its noise process, and all that comes with them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dkdm.bundle import Autoencoder, Bundle, Component
from dkdm.conditioning import ClassLabels, Conditioning, Unconditional
from dkdm.denoiser import Denoiser
from dkdm.errors import DkdmError, UsageError
from dkdm.networks import HOMES, network_class
from dkdm.own import OWN_CLASS, load_own, read_origin
from dkdm.places import check_folder, check_place
from dkdm.plugins import distrust
from dkdm.prediction import Parameterization, VarianceType
from dkdm.prompts import Prompts
from dkdm.reading import is_name, shown
from dkdm.schedulers import from_scheduler_config, prediction_type, saved_config
from dkdm.sizes import building, check_numbers, check_sample
from dkdm.teachers.locate import INDEX
from dkdm.teachers.lora import merge_loras, read_choices
from dkdm.teachers.networks import FACTS, Facts
from dkdm.teachers.options import LoadOptions
from dkdm.teachers.text import text_conditioning

DENOISERS = ("unet", "transformer")
AUTOENCODERS = ("vae", "vqvae")
UNUSED = ("safety_checker", "feature_extractor", "image_encoder", "movq")


def load_pipeline_folder(folder: Path, options: LoadOptions) -> Denoiser:
    """Load the denoiser of a pipeline folder.

    Raises UsageError where the folder is no pipeline or one of another kind, DkdmError where its
    weights are missing or do not match.
    """
    loras = read_choices(options.lora)
    distrust(folder)
    denoiser = describe_pipeline_folder(folder, options)
    component, facts = _network_of(read_json(folder / INDEX, "a diffusers pipeline"), folder)
    network = load_network(folder / component, facts.class_name, options, folder)
    merge_loras(network, denoiser.bundle.pipeline, component, loras)
    return replace(denoiser, network=network, call=None)


def describe_pipeline_folder(folder: Path, options: LoadOptions) -> Denoiser:
    """Everything of a pipeline folder but its network's weights: the network is a placeholder."""
    index = read_json(folder / INDEX, "a diffusers pipeline folder")
    check_places(folder, index)
    component, facts = _network_of(index, folder)
    config = read_json(folder / component / "config.json", f"the config of its {component}")
    check_numbers(config, str(folder / component / "config.json"))
    if facts.class_name == OWN_CLASS:
        read_origin(config, folder / component)
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json", "its scheduler's config")
    bundle = _bundle(folder, index, component, options.variant)
    shape = facts.shape(config, options.sample_size or _saved_size(index))
    patch = facts.patch(config)
    check_sample(shape, str(folder / component / "config.json"), patch if patch > 1 else None)
    tokens = math.prod(shape[1:]) // patch**2
    process = from_scheduler_config(scheduler, tokens)
    process = replace(process, scheduler=saved_config(scheduler, tokens))
    _check_channels(folder, config, shape, bundle)
    conditioning, constants = _conditioning(folder, config, index, bundle)
    constants |= facts.constants(config, shape, bundle)
    return Denoiser(
        _placeholder,
        process,
        Parameterization(
            prediction_type(scheduler),
            _variance(config, process.scheduler, shape),
            process.scheduler.get("sigma_data", 0.5),
        ),
        shape,
        conditioning,
        constants,
        value_range=_saved_range(index),
        bundle=bundle,
    )


def check_places(folder: Path, index: dict[str, Any]) -> None:
    """Raise UsageError unless the components have plain names and lie in the folder, as files."""
    for name in (INDEX, "scheduler/scheduler_config.json"):
        check_place(folder / name, folder)
    for name in (name for name, value in index.items() if _is_component(name, value)):
        if not is_name(name):
            raise UsageError(
                f"{folder / INDEX}: {shown(name)} cannot name a component: rename it to letters, "
                "digits and underscores"
            )
        if (folder / name).exists() or (folder / name).is_symlink():
            check_folder(folder / name, folder)


def _saved_size(index: dict[str, Any]) -> tuple[int, ...] | None:
    """The size of a sample that dkdm writes beside the components."""
    size = index.get("_sample_size")
    return None if size is None else tuple(map(int, size.split("x")))


def _saved_range(index: dict[str, Any]) -> tuple[float, float]:
    """The smallest and largest value of a sample, where dkdm wrote them."""
    low, high = map(float, index.get("_value_range", "-1..1").split(".."))
    return low, high


def read_base(folder: Path) -> tuple[dict[str, Any] | None, Bundle, Prompts | None]:
    """Scheduler config, other components and prompts of a pipeline folder without a denoiser."""
    index = read_json(folder / INDEX, "a diffusers pipeline folder")
    check_places(folder, index)
    bundle = _bundle(folder, index, "")
    bundle = replace(
        bundle, components={k: v for k, v in bundle.components.items() if k not in DENOISERS}
    )
    file = folder / "scheduler" / "scheduler_config.json"
    text = text_conditioning(folder, bundle) if _reads_text(bundle) else None
    return (read_json(file, "its scheduler's config") if file.is_file() else None), bundle, text


def _reads_text(bundle: Bundle) -> bool:
    return any(name.startswith("text_encoder") for name in bundle.components)


def _placeholder(*_: Any, **__: Any) -> Any:
    raise DkdmError("this model was described, not loaded")


def read_json(path: Path, what: str) -> dict[str, Any]:
    """Read a JSON object. Raises UsageError naming what was looked for."""
    try:
        return dict(json.loads(path.read_text()))
    except FileNotFoundError as error:
        raise UsageError(f"{path.parent}: expected {what}, but {path.name} is missing") from error
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read as JSON: {error}") from error


def _network_of(index: dict[str, Any], folder: Path) -> tuple[str, Facts]:
    kind = str(index.get("_class_name"))
    if "Consistency" in kind:
        raise UsageError(
            f"{folder}: a consistency model ({kind}) maps noise to data in one jump and has no "
            "reverse transition to learn from; distil the diffusion model it came from"
        )
    parts = {name: value[1] for name, value in index.items() if _is_component(name, value)}
    second = next((name for name in ("transformer_2", "unet_2") if name in parts), None)
    if second:
        raise UsageError(
            f"{folder}: a {kind} with two denoisers, one for each half of the noise levels; "
            f"expected one: take the other's out of {INDEX} ({second}: [null, null])"
        )
    for component in DENOISERS:
        if parts.get(component) in FACTS:
            _check_library(folder, component, index[component])
            return component, FACTS[parts[component]]
    found = parts.get("unet") or parts.get("transformer") or parts.get("prior") or "no network"
    raise UsageError(
        f"{folder}: a {kind} with {found}; expected one of {', '.join(FACTS)}. A network that dkdm "
        "was given as an object is loaded by dkdm.load_student(folder, network=...)"
    )


def _check_library(folder: Path, component: str, named: list[Any]) -> None:
    """Raise UsageError for a network of another library than its class is read from."""
    library, kind = named
    own = [HOMES[kind], f"dkdm.networks.{HOMES[kind]}"] if kind in HOMES else ["diffusers"]
    if library not in own and not (kind == OWN_CLASS and is_name(library)):
        raise UsageError(
            f"{folder / INDEX}: {component} is {shown(named)}: expected [{own[0]}, {kind}]. No "
            "class of another library is made because a file names it"
        )


def _is_component(name: str, value: Any) -> bool:
    """model_index.json lists a component as [library, class]."""
    pair = isinstance(value, list) and len(value) == 2 and value[0] is not None
    return pair and not name.startswith("_") and name != "class_names"


def _bundle(
    folder: Path, index: dict[str, Any], denoiser: str, variant: str | None = None
) -> Bundle:
    """The other components that lie in the folder, and what else its index says."""
    components = {
        name: Component(folder / name, value[0], value[1], variant)
        for name, value in index.items()
        if _is_component(name, value) and name not in (denoiser, "scheduler", *UNUSED)
    }
    missing = [name for name, part in components.items() if not part.folder.is_dir()]
    if missing:
        raise DkdmError(
            f"{folder}: {INDEX} lists {', '.join(missing)}, but there is no such folder"
        )
    coder = next((components[name] for name in AUTOENCODERS if name in components), None)
    if coder is None and any(name in index for name in AUTOENCODERS):
        raise DkdmError(f"{folder}: {INDEX} has no autoencoder for its latents")
    if coder is not None and not (coder.folder / "config.json").is_file():
        raise DkdmError(f"{coder.folder}: the autoencoder's config.json is missing")
    entries = {
        name: value
        for name, value in index.items()
        if not _is_component(name, value) and not name.startswith("_")
    }
    kind, came_from = index.get("_class_name"), index.get("_came_from") or {}
    pipeline = kind if isinstance(kind, str) else came_from.get("pipeline")
    entries |= came_from.get("entries", {})
    return Bundle(pipeline, components, Autoencoder(coder) if coder else None, entries)


def _check_channels(
    folder: Path, config: dict[str, Any], shape: tuple[int, ...], bundle: Bundle
) -> None:
    produced = config.get("out_channels") or config.get("in_channels")
    if produced not in (shape[0], 2 * shape[0], config.get("in_channels")):
        raise UsageError(
            f"{folder}: the network takes {config['in_channels']} channels and gives {produced}: a "
            "model for inpainting, depth or super-resolution is fed a picture too, and cannot "
            "be distilled without one"
        )
    channels = bundle.autoencoder.latent_channels if bundle.autoencoder else None
    if channels is not None and channels != shape[0]:
        raise UsageError(
            f"{folder}: the autoencoder's latents have {channels} channels, the network's samples "
            f"{shape[0]}: they do not belong together"
        )


def _variance(
    config: dict[str, Any], scheduler: Mapping[str, Any], shape: tuple[int, ...]
) -> VarianceType:
    """Twice the channels mean a learned range; only DDPM schedulers say what else it is."""
    known = scheduler["_class_name"] == "DDPMScheduler" and scheduler.get("variance_type")
    own: VarianceType = known or "fixed_small"
    learns = config.get("out_channels") == 2 * shape[0]
    return "learned_range" if learns and not own.startswith("learned") else own


def load_network(
    folder: Path, name: str, options: LoadOptions, root: Path | None = None
) -> nn.Module:
    """Load a network strictly. Raises DkdmError if its weights are not its own.

    name: its class, of diffusers, dkdm or, `OwnNetwork`, whatever the folder's config names. root:
    the folder of the whole model; None is `folder`.
    """
    if name == OWN_CLASS:
        config = read_json(folder / "config.json", "its config")
        network = load_own(folder, config, options.factory)
        return network.to(getattr(torch, options.dtype)).requires_grad_(False)
    cls = network_class(name)
    config = read_json(check_folder(folder, root) / "config.json", "its config")
    with building(config, str(folder / "config.json"), name, folder):
        network, info = cls.from_pretrained(
            folder,
            variant=options.variant,
            torch_dtype=getattr(torch, options.dtype),
            output_loading_info=True,
        )
    wrong = [
        f"{len(info[key])} {key.replace('_', ' ')} ({', '.join(map(str, info[key][:3]))})"
        for key in ("missing_keys", "unexpected_keys", "mismatched_keys")
        if info[key]
    ]
    if wrong:
        raise DkdmError(f"{folder}: the weights do not belong to this {name}: {'; '.join(wrong)}")
    return network.eval().requires_grad_(False)


def _conditioning(
    folder: Path, config: dict[str, Any], index: dict[str, Any], bundle: Bundle
) -> tuple[Conditioning, dict[str, torch.Tensor]]:
    """Text where there is an encoder for it; else classes as the network embeds them."""
    if _reads_text(bundle):
        return text_conditioning(folder, bundle), {}
    if config.get("_class_name") == OWN_CLASS:
        return _own_conditioning(config, index), {}
    embedded = config.get("num_class_embeds") or config.get("num_embeds_ada_norm")
    if not embedded:
        return Unconditional(), {}
    if embedded == 1:
        return Unconditional(), {"class_labels": torch.tensor(0)}
    null = index.get("null_class")
    if "null_class" not in index and config.get("norm_type") == "ada_norm_zero":
        null = embedded  # a DiT's table of labels has one row more, for no label
    classes = embedded - 1 if null == embedded - 1 else embedded
    return ClassLabels(classes, null, _taught(index), _class_names(index, classes)), {}


def _own_conditioning(config: dict[str, Any], index: dict[str, Any]) -> Conditioning:
    classes = config.get("num_classes")
    if classes is None:
        return Unconditional()
    names = _class_names(index, classes)
    return ClassLabels(classes, config.get("null_class"), _taught(index), names)


def _taught(index: dict[str, Any]) -> tuple[int, ...] | None:
    """The classes that a student learnt, where these are not all."""
    taught = index.get("classes")
    return None if taught is None else tuple(map(int, taught))


def _class_names(index: dict[str, Any], classes: int) -> tuple[str, ...] | None:
    """Names by dkdm's list, or by the `id2label` of diffusers' DiTPipeline."""
    names = index.get("class_names")
    if names:
        return tuple(names.values() if isinstance(names, dict) else names)
    labels = index.get("id2label") or {}
    if any(str(i) not in labels for i in range(classes)):
        return None
    return tuple(labels[str(i)] for i in range(classes))
