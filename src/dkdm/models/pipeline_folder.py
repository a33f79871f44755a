"""A diffusers pipeline folder: its denoiser, its noise process, and all that comes with them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from dkdm.core.denoisers.bundle import Bundle
from dkdm.core.denoisers.conditioning import ClassLabels, Conditioning, Unconditional
from dkdm.core.denoisers.decoding import no_decoder
from dkdm.core.denoisers.denoiser import Denoiser
from dkdm.core.denoisers.inputs import from_index
from dkdm.core.diffusion.prediction import Parameterization, VarianceType
from dkdm.core.few_steps.grid import GRID, Grid
from dkdm.core.few_steps.kinds import kind_saved
from dkdm.core.few_steps.model import FewStep
from dkdm.core.saving.checkpoint import load_network_weights
from dkdm.errors import DkdmError, UsageError
from dkdm.models.architectures import ARCHITECTURES, Architecture, check_embeddings
from dkdm.models.components import Autoencoder, Component, weight_variant
from dkdm.models.custom_network import OWN_CLASS, make, read_origin
from dkdm.models.effective import (
    config_file,
    effective_config,
    listed,
    network_name,
    pipeline_entries,
    place_of,
    stock_class,
)
from dkdm.models.locate import INDEX
from dkdm.models.lora import merge_loras, read_choices
from dkdm.models.options import LoadOptions
from dkdm.models.pipelines import (
    AUTOENCODERS,
    DENOISERS,
    LEFT_OUT,
    check_parts,
    check_times,
    family_of,
)
from dkdm.models.prompts import Prompts
from dkdm.models.schedulers import from_scheduler_config, prediction_type
from dkdm.models.text import text_conditioning
from dkdm.networks import HOMES, network_class
from dkdm.reading.fields import as_named, is_name, read_json, shown
from dkdm.reading.places import check_folder, check_place
from dkdm.reading.plugins import distrust
from dkdm.reading.sizes import building, check_numbers, check_sample
from dkdm.reading.weights import refuse_other_contents


def load_pipeline_folder(folder: Path, options: LoadOptions) -> Denoiser:
    """Load the denoiser of a pipeline folder.

    Raises UsageError if the folder is no pipeline or one of another kind, DkdmError if its
    weights are missing or do not match.
    """
    loras = read_choices(options.lora)
    distrust(folder)
    denoiser, component, known, _ = describe_pipeline_folder(folder, options)
    place = place_of(folder, component)
    for part in {place, *(one.folder for one in denoiser.bundle.components.values())}:
        refuse_other_contents(part)
    network = load_network(place, known.name, options, folder)
    merge_loras(network, denoiser.bundle.pipeline, component, loras)
    return replace(denoiser, network=network, call=None)


class Described(NamedTuple):
    """Everything of a pipeline folder but its network's weights.

    denoiser: its network is a placeholder. component: the network's name in model_index.json.
    """

    denoiser: Denoiser
    component: str
    architecture: Architecture
    config: dict[str, Any]


def describe_pipeline_folder(folder: Path, options: LoadOptions) -> Described:
    """What the JSON files of a pipeline folder say."""
    index = read_index(folder)
    component, known = network_of(index, folder)
    config = effective_config(folder, index, component)
    check_numbers(config, str(config_file(folder, component)))
    if known.name == OWN_CLASS:
        read_origin(config, place_of(folder, component))
    scheduler = effective_config(folder, index, "scheduler")
    bundle = _bundle(folder, index, options.variant)
    denoiser = denoiser_of(folder, known, config, scheduler, index, bundle, options)
    return Described(denoiser, component, known, config)


def read_index(folder: Path) -> dict[str, Any]:
    """model_index.json, with the class of its family in place of one that diffusers lacks.

    Raises UsageError if the file is missing.
    """
    index = read_json(folder / INDEX, "a diffusers pipeline folder")
    check_places(folder, index)
    if "_came_from" in index or stock_class(index.get("_class_name"), "DiffusionPipeline"):
        return index
    return {**index, "_class_name": _family(index, folder)}


def _family(index: Mapping[str, Any], folder: Path) -> str | None:
    component = next((name for name in DENOISERS if name in listed(index)), "")
    return family_of(index, _class_of(index, component, folder), folder)


def _class_of(index: Mapping[str, Any], component: str, folder: Path) -> str:
    """The class of a network as diffusers makes it; empty for a component that is not listed."""
    kind, file = listed(index).get(component, ""), config_file(folder, component)
    return network_name(kind, read_json(file, "its config") if kind and file.is_file() else {})


def denoiser_of(
    folder: Path,
    known: Architecture,
    config: dict[str, Any],
    scheduler: dict[str, Any],
    index: dict[str, Any],
    bundle: Bundle,
    options: LoadOptions,
) -> Denoiser:
    """What configs, index and the other components say; its network is a placeholder."""
    check_embeddings(known.name, config, _reads_text(bundle), str(folder))
    few, produced = _saved_few_steps(index, folder), config.get("out_channels")
    if few is not None and produced:  # of all heads
        config = {**config, "out_channels": produced // few[0].outputs_on(few[1])}
    shape = known.shape(config, options.sample_size or _saved_size(index))
    patch = known.patch(config)
    check_sample(shape, f"{folder}: by its config.json", patch if patch > 1 else None)
    tokens = math.prod(shape[1:]) // patch**2
    process = from_scheduler_config(scheduler, tokens)
    _check_channels(folder, config, shape, bundle)
    conditioning, constants = _conditioning(folder, known, config, index, bundle)
    constants |= known.constants(config, shape, bundle) if known.constants else {}
    denoiser = Denoiser(
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
        decode=no_decoder if index.get("_latents") else None,
        bundle=bundle,
    )
    if few is None:
        return denoiser
    found = few[0].of(denoiser, few[1])
    needed = found.out_channels * (4 if known.packed else 1)  # of the 2x2 values of a token
    if produced and produced != needed:
        raise UsageError(
            f"{folder / INDEX}: {GRID} needs a network that gives {needed} channels, "
            f"and this one gives {produced}: they do not belong together"
        )
    return found


def _saved_few_steps(index: Mapping[str, Any], folder: Path) -> tuple[type[FewStep], Grid] | None:
    """The kind of a few-step model, and its grid; None for any other."""
    if GRID not in index:
        return None
    where = f"{folder / INDEX}: {GRID}"
    grid = Grid.of_dict(index[GRID], where)
    return kind_saved(index[GRID], where), grid


def check_places(folder: Path, index: dict[str, Any]) -> None:
    """Raise UsageError unless the components have plain names and lie in the folder, as files."""
    for name in (INDEX, "config.json", "scheduler_config.json", "scheduler/scheduler_config.json"):
        check_place(folder / name, folder)
    for name in listed(index):
        if not is_name(name):
            raise UsageError(
                f"{folder / INDEX}: {shown(name)} cannot name a component: rename it to letters, "
                "digits and underscores"
            )
        if (folder / name).exists() or (folder / name).is_symlink():
            check_folder(folder / name, folder)


def _saved_size(index: dict[str, Any]) -> tuple[int, ...] | None:
    size = index.get("_sample_size")
    return None if size is None else tuple(map(int, size.split("x")))


def _saved_range(index: dict[str, Any]) -> tuple[float, float]:
    low, high = map(float, index.get("_value_range", "-1..1").split(".."))
    return low, high


def read_base(folder: Path) -> tuple[dict[str, Any] | None, Bundle, Prompts | None]:
    """Scheduler config, other components and prompts of a pipeline folder without a denoiser."""
    index = read_index(folder)
    bundle = _bundle(folder, index)
    text = text_conditioning(folder, bundle) if _reads_text(bundle) else None
    scheduler = config_file(folder, "scheduler").is_file()
    return effective_config(folder, index, "scheduler") if scheduler else None, bundle, text


def _reads_text(bundle: Bundle) -> bool:
    return any(name.startswith("text_encoder") for name in bundle.components)


def _placeholder(*_: Any, **__: Any) -> Any:
    raise DkdmError("this model was described, not loaded")


def network_of(index: Mapping[str, Any], folder: Path) -> tuple[str, Architecture]:
    """Name and class of the denoiser. Raises UsageError if dkdm does not know it."""
    kind = as_named(index.get("_class_name"))
    if "Consistency" in kind:
        raise UsageError(
            f"{folder}: a consistency model ({kind}) maps noise to data in one jump and has no "
            "reverse transition to learn from; distil the diffusion model it came from"
        )
    check_parts(index, folder)
    check_times(index, folder)
    found = {name: _class_of(index, name, folder) for name in DENOISERS}
    for component, name in found.items():
        if name in ARCHITECTURES:
            _check_library(folder, component, index[component])
            return component, ARCHITECTURES[name]
    named = ", ".join(as_named(name) for name in found.values() if name) or "no network"
    raise UsageError(
        f"{folder}: a {kind} with {named}, which dkdm does not know. It knows "
        f"{', '.join(ARCHITECTURES)}. A network that dkdm was given as an object is loaded by "
        "dkdm.load_student(folder, network=...)"
    )


def _check_library(folder: Path, component: str, named: list[Any]) -> None:
    library, kind = named
    own = [HOMES[kind], f"dkdm.networks.{HOMES[kind]}"] if kind in HOMES else ["diffusers"]
    if library not in own and not (kind == OWN_CLASS and is_name(library)):
        raise UsageError(
            f"{folder / INDEX}: {component} is {shown(named)}: write [{own[0]}, {kind}]. No "
            "class of another library is made because a file names it"
        )


def _bundle(folder: Path, index: dict[str, Any], variant: str | None = None) -> Bundle:
    """The other components that lie in the folder, and what else its index says."""
    components = {
        name: Component(place_of(folder, name), index[name][0], kind, variant)
        for name, kind in listed(index).items()
        if name not in (*DENOISERS, "scheduler", *LEFT_OUT) and not name.startswith("_")
    }
    missing = [name for name, part in components.items() if not _lies_there(part, folder)]
    if missing:
        raise DkdmError(
            f"{folder}: {INDEX} lists {', '.join(missing)}, but there is no such folder, or it is "
            "empty"
        )
    coder = next((components[name] for name in AUTOENCODERS if name in components), None)
    if coder is None and any(name in index for name in _needed_autoencoders(index)):
        raise DkdmError(f"{folder}: {INDEX} has no autoencoder for its latents")
    if coder is not None and not (coder.folder / "config.json").is_file():
        raise DkdmError(f"{coder.folder}: the autoencoder's config.json is missing")
    pipeline, entries = _pipeline_of(folder, index)
    autoencoder = Autoencoder(coder, pipeline=pipeline) if coder else None
    return Bundle(pipeline, components, autoencoder, entries)


def _lies_there(part: Component, root: Path) -> bool:
    """Whether a component has a folder of its own, or its config lies in the root folder."""
    if part.folder != root:
        return any(part.folder.iterdir())
    file = root / "config.json"
    return file.is_file() and read_json(file, "a config").get("_class_name") == part.class_name


def _needed_autoencoders(index: Mapping[str, Any]) -> tuple[str, ...]:
    """The autoencoders that a pipeline cannot be without; a UNet2DModel may be one of pixels."""
    kind = stock_class(index.get("_class_name"), "DiffusionPipeline")
    if kind is None and listed(index).get("unet") == "UNet2DModel":
        return ()
    optional = getattr(kind, "_optional_components", ())
    return tuple(name for name in AUTOENCODERS if name not in optional)


def _pipeline_of(folder: Path, index: Mapping[str, Any]) -> tuple[str | None, dict[str, Any]]:
    if "_came_from" not in index:
        family = _family(index, folder)
        return family, pipeline_entries({**index, "_class_name": family})
    came_from = index["_came_from"] or {}
    return came_from.get("pipeline"), {**pipeline_entries(index), **came_from.get("entries", {})}


def _check_channels(
    folder: Path, config: dict[str, Any], shape: tuple[int, ...], bundle: Bundle
) -> None:
    taken = config.get("in_channels", shape[0])
    produced = config.get("out_channels") or taken
    if produced != taken and (taken != shape[0] or produced != 2 * taken):
        raise UsageError(
            f"{folder}: the network takes {taken} channels and gives {produced}: a "
            "model for inpainting, depth or super-resolution is fed an image too, and cannot "
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
    said = scheduler["_class_name"] == "DDPMScheduler" and scheduler.get("variance_type")
    variance: VarianceType = said or "fixed_small"
    learns = config.get("out_channels") == 2 * shape[0]
    return "learned_range" if learns and not variance.startswith("learned") else variance


def load_network(
    folder: Path, name: str, options: LoadOptions, root: Path | None = None
) -> nn.Module:
    """Load a network strictly. Raises DkdmError if its weights are not its own.

    name: its class, of diffusers, dkdm or, `OwnNetwork`, whatever the folder's config names. root:
    the folder of the whole model; None is `folder`.
    """
    if name == OWN_CLASS:
        config = read_json(folder / "config.json", "its config")
        made = make(read_origin(config, folder), folder, options.factory)
        load_network_weights(made, folder)
        return made.eval().to(getattr(torch, options.dtype)).requires_grad_(False)
    cls = network_class(name)
    config = read_json(check_folder(folder, root) / "config.json", "its config")
    with building(config, str(folder / "config.json"), name, folder):
        network, info = cls.from_pretrained(
            folder,
            variant=weight_variant(folder, options.variant),
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
    folder: Path,
    known: Architecture,
    config: dict[str, Any],
    index: dict[str, Any],
    bundle: Bundle,
) -> tuple[Conditioning, dict[str, torch.Tensor]]:
    """Text if there is an encoder for it, otherwise classes as the network embeds them."""
    if _reads_text(bundle):
        return text_conditioning(folder, bundle), {}
    if "_conditions" in index:
        return from_index(index["_conditions"], str(folder / INDEX)), {}
    classes, null = config.get(known.classes), config.get("null_class")
    if not classes:
        return Unconditional(), {}
    if known.name != OWN_CLASS:
        if classes == 1:
            return Unconditional(), {"class_labels": torch.tensor(0)}
        null = index.get("null_class", classes if known.extra_row else None)
        classes -= null == classes - 1
    learnt = index.get("classes")
    learnt = None if learnt is None else tuple(map(int, learnt))
    return ClassLabels(classes, null, learnt, _class_names(index, classes)), {}


def _class_names(index: dict[str, Any], classes: int) -> tuple[str, ...] | None:
    """Names by dkdm's list, or by the `id2label` of diffusers' DiTPipeline."""
    names = index.get("class_names")
    if names:
        return tuple(names.values() if isinstance(names, dict) else names)
    labels = index.get("id2label") or {}
    if any(str(i) not in labels for i in range(classes)):
        return None
    return tuple(labels[str(i)] for i in range(classes))
