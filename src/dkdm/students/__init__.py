"""Student networks: presets, a diffusers config.json, or any user code as module:factory."""

from __future__ import annotations

import inspect
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dkdm.config import ProcessName
from dkdm.core.denoisers.conditioning import Unconditional, for_student
from dkdm.core.denoisers.denoiser import Denoiser
from dkdm.core.denoisers.kinds import Custom, kind_of
from dkdm.core.diffusion.prediction import PredictionType
from dkdm.errors import DkdmError, UsageError
from dkdm.models.custom_network import (
    OWN_CLASS,
    Factory,
    is_own,
    make,
    read_origin,
    remember_factory,
    remember_object,
)
from dkdm.models.student_process import check_is_sampled, with_process
from dkdm.networks import network_class
from dkdm.reading.fields import read_json
from dkdm.reading.plugins import distrust, import_object
from dkdm.reading.sizes import make_network
from dkdm.students import any_rank, cut, transformers, unets
from dkdm.students.interface import TEXTS, Interface, Preset
from dkdm.students.loading import load_student
from dkdm.students.space import check_config, config_in

__all__ = [
    "PRESETS",
    "Interface",
    "Preset",
    "as_denoiser",
    "given_student",
    "load_student",
    "sketched_student_of",
    "student_of",
    "untried_student_of",
]

PRESETS: dict[str, Preset] = {
    each.name: each for family in (unets, transformers, any_rank, cut) for each in family.PRESETS
}


def student_of(
    spec: str,
    teacher: Denoiser,
    prediction: PredictionType | None = None,
    process: ProcessName = "teacher",
    factory: Factory | None = None,
) -> Denoiser:
    """A student with random weights, and with all that the teacher has beside its network.

    spec: a preset's name, the path of a diffusers `config.json` or of a folder with one (its
    architecture, not its weights), or `module:factory`, called as
    `factory(sample_shape, out_channels, conditioning)`. prediction, process: the student's, if they
    are not the teacher's; see `with_process`. factory: the code that makes a folder's custom
    network, see `load_student`. Raises UsageError if it does not fit the teacher.
    """
    student = untried_student_of(spec, with_process(teacher, prediction, process), factory)
    student.check()
    return student


def sketched_student_of(spec: str, teacher: Denoiser, factory: Factory | None = None) -> Denoiser:
    """A student on torch's meta device, which holds no numbers; it was not evaluated yet."""
    with torch.device("meta"):
        student = untried_student_of(spec, teacher, factory)
    student.network.to("meta")  # type: ignore[union-attr]  # tables made from numpy were not
    return student


def untried_student_of(spec: str, teacher: Denoiser, factory: Factory | None = None) -> Denoiser:
    """A student that was not evaluated yet."""
    interface = Interface(
        teacher.sample_shape,
        teacher.out_channels,
        for_student(teacher.conditioning),
        teacher.network,
        teacher.bundle.autoencoder,
    )
    network = build_network(spec, interface, factory)
    if kind_of(teacher.conditioning).asks == "prompt" and not _takes_text(network):
        raise UsageError(
            f"{spec}: the student reads no text, and the teacher is conditioned on text: use one "
            "that does, such as text-unet-tiny (`dkdm students` lists those that fit)"
        )
    return as_denoiser(spec, network, teacher)


def _takes_text(network: nn.Module) -> bool:
    """Whether a network has an input for text; True for custom networks, which may have one."""
    taken = inspect.signature(network.forward).parameters
    return is_own(network) or "encoder_hidden_states" in taken


def given_student(student: Denoiser | nn.Module, like: Denoiser) -> Denoiser:
    """A student that was given as an object; a network is read like another model.

    Raises UsageError if it does not fit.
    """
    if isinstance(student, nn.Module):
        student = as_denoiser(type(student).__name__, student, like)
    check_is_sampled(student)
    student.check()
    remember_object(student)
    return student


def as_denoiser(name: str, network: nn.Module, like: Denoiser) -> Denoiser:
    """A network read like another model; it is fed the time of the process's scheduler."""
    constants = like.constants if type(network) is type(like.network) else {}
    norm = getattr(getattr(network, "config", None), "norm_type", None)
    if norm == "ada_norm_zero" and kind_of(like.conditioning).asks != "class_labels":
        constants = {**constants, "class_labels": torch.tensor(0)}  # a DiT always takes a class
    conditioning = for_student(like.conditioning)
    like = like if conditioning is like.conditioning else replace(like, conditioning=conditioning)
    return replace(like, network=network, constants=constants, name=name, time=None, call=None)


def build_network(spec: str, interface: Interface, factory: Factory | None = None) -> nn.Module:
    """The network that a spec names. Raises UsageError if it names nothing."""
    if spec in PRESETS:
        try:
            _refuse_custom_conditions(interface)
            return PRESETS[spec].build(interface)
        except UsageError as error:
            raise UsageError(f"{spec}: {error}") from error
    if spec.endswith(".json"):
        return _from_diffusers_config(Path(spec), interface, factory)
    if Path(spec).is_dir():
        distrust(Path(spec))
        return _from_diffusers_config(config_in(Path(spec), interface), interface, factory)
    if ":" in spec:
        return _from_factory(spec, interface)
    near = get_close_matches(spec, PRESETS) or list(PRESETS)
    raise UsageError(
        f"unknown student '{spec}': give a preset ({', '.join(near)}; `dkdm students` lists those "
        "that fit), the path of a diffusers config.json or folder, or module:factory"
    )


def _refuse_custom_conditions(interface: Interface) -> None:
    kind = kind_of(interface.conditioning)
    others = kind.fed().keys() - {"class_labels", *TEXTS} if kind.asks == "cond" else ()
    if others:
        names = ", ".join(f"'{name}'" for name in sorted(others))
        raise UsageError(
            f"presets take class ids or text, and {kind.label} gives {names}: use a custom network "
            "as the student, a module in Python or module:factory"
        )


def _from_diffusers_config(path: Path, interface: Interface, factory: Factory | None) -> nn.Module:
    config, where = read_json(path, "a student's config"), f"student config {path}"
    if config.get("_class_name") == OWN_CLASS:
        return make(read_origin(config, path.parent), path.parent, factory)
    cls = network_class(str(config.get("_class_name")))
    if not hasattr(cls, "from_config"):
        raise UsageError(f"{where}: '_class_name' must name a diffusers model")
    check_config(config, interface, where)
    network: nn.Module = make_network(cls, config, where)
    return network


def _from_factory(spec: str, interface: Interface) -> nn.Module:
    factory = import_object(spec)
    given = (interface.sample_shape, interface.out_channels, interface.conditioning)
    _check_signature(spec, factory, given)
    try:
        network = factory(*given)
    except Exception as error:
        raise DkdmError(f"student factory {spec} raised {type(error).__name__}: {error}") from error
    if not isinstance(network, nn.Module):
        raise UsageError(
            f"student factory {spec} returned {type(network).__name__}: return an nn.Module"
        )
    lazy = [n for n, p in network.named_parameters() if nn.parameter.is_lazy(p)]
    if lazy:
        raise UsageError(
            f"student factory {spec} returned lazy layers ({lazy[0]}), which have no shape until "
            "they are used and could not be loaded again: give the layers their sizes"
        )
    if is_own(network):
        remember_factory(network, spec, *given)
        if isinstance(kind_of(interface.conditioning), Custom):
            _check_made_again(spec, factory, interface, network)
    return network


def _check_made_again(spec: str, factory: Any, interface: Interface, network: nn.Module) -> None:
    name = type(interface.conditioning).__name__
    with torch.random.fork_rng():
        try:
            twin = factory(interface.sample_shape, interface.out_channels, Unconditional())
            pair = [{k: v.shape for k, v in each.state_dict().items()} for each in (network, twin)]
            why = "" if pair[0] == pair[1] else "it made other weights"
        except Exception as error:
            why = f"it raised {type(error).__name__}: {error}"
    if why:
        raise UsageError(
            f"student factory {spec}: a folder does not hold {name}, so a finished run is loaded "
            f"with dkdm.Unconditional() in its place, and then {why}. Make the network without "
            "reading the conditioning"
        )


def _check_signature(spec: str, factory: Any, given: tuple[Any, ...]) -> None:
    try:
        inspect.signature(factory).bind(*given)
    except TypeError as error:
        shape, channels, conditioning = given
        name = spec.partition(":")[2]
        raise UsageError(
            f"student factory {spec} cannot be called as {name}({shape}, {channels}, "
            f"{type(conditioning).__name__}): {error}. Write a function of three positional "
            "arguments, sample_shape, out_channels, conditioning, that returns an nn.Module"
        ) from error
    except ValueError:  # a callable written in C does not say what it takes
        return
