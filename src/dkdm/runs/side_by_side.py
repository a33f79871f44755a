"""Teachers put side by side: whether they fit together, and which conditions are whose."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dkdm.core.denoisers.conditioning import ABSENT, ClassLabels, Conditioning, Unconditional
from dkdm.core.denoisers.denoiser import Denoiser
from dkdm.core.denoisers.kinds import kind_of
from dkdm.core.denoisers.matching import gauge_of
from dkdm.core.denoisers.teachers import Place, Teachers
from dkdm.core.diffusion.prediction import Parameterization
from dkdm.errors import UsageError
from dkdm.models.prompts import Prompts, files_fingerprint, with_prompts

WEIGHTS = (".safetensors", ".bin")
LABELS, PROMPT = "class_labels", "prompt"
CONDITIONS = "conditions:"
PROBE = "a photograph of a house"


def side_by_side(teachers: Sequence[Denoiser], offsets: Sequence[int] | None = None) -> Denoiser:
    """Several teachers as one, `core.denoisers.teachers.Teachers`, for the conditions of all.

    offsets: first class id of each; None puts one teacher's classes after the other's. Raises
    UsageError for teachers that cannot teach one student, with all that differs.
    """
    check_alike(teachers)
    first, kind = teachers[0], teachers[0].parameterization
    starts = offsets_of(teachers, offsets)
    texts = [one.conditioning for one in teachers if isinstance(one.conditioning, Prompts)]
    conditioning: Conditioning
    seats: Callable[[Conditioning], Sequence[Place]]
    if texts:
        conditioning, seats = _all_prompts(texts), partial(_prompt_places, texts)
    else:
        conditioning, places = _all_classes(teachers, starts)
        seats = partial(_same, places)
    intervals = {one.guidance_interval for one in teachers}
    networks = [one.network for one in teachers if isinstance(one.network, nn.Module)]
    return Teachers(
        nn.ModuleList(networks),
        first.process,
        Parameterization(kind.prediction, sigma_data=kind.sigma_data),
        first.sample_shape,
        conditioning,
        name=listed([one.name for one in teachers]),
        value_range=first.value_range,
        bundle=first.bundle,
        decode=first.decode,
        guidance_interval=intervals.pop() if len(intervals) == 1 else None,
        members=tuple(teachers),
        seats=seats,
    )


def _same(places: Sequence[Place], conditioning: Conditioning) -> Sequence[Place]:
    """Places of classes, of which a conditioning may leave out some."""
    del conditioning
    return places


def listed(names: Sequence[str]) -> str:
    """Names in a sentence: a, b and c."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def check_alike(teachers: Sequence[Denoiser]) -> None:
    """Raise UsageError for teachers that cannot teach one student, with all that differs."""
    first, *others = teachers
    if not others:
        return
    found = []
    for other in others:
        pairs = [(what, *map(value, (first, other))) for what, value in COMPARED.items()]
        pairs += [(CONDITIONS, *_asked(first, other))]
        apart = [f"{what} {mine} and {theirs}" for what, mine, theirs in pairs if mine != theirs]
        found += [f"{first.name} and {other.name}: {', '.join(apart)}"] if apart else []
    if found:
        raise UsageError(
            f"these teachers cannot teach one student: {'; '.join(found)}: give teachers of the "
            "same samples"
        )
    for one in teachers:
        gauge_of(one.process)


def _latents(model: Denoiser) -> str:
    coder = model.bundle.autoencoder
    if coder is None:
        return "pixels" if model.decode is None else "latents with a decoder of their own"
    folder: Path = coder.component.folder
    files = sorted(path for path in folder.glob("*") if path.suffix in WEIGHTS)
    shift, scale = coder.standard()
    name = f"{coder.component.class_name} {files_fingerprint(files)}"
    return f"latents of {name} (shift {_shown(shift)}, scale {_shown(scale)})"


def _shown(numbers: Sequence[float]) -> str:
    return " ".join(f"{number:.6g}" for number in numbers)


def _asked(one: Denoiser, other: Denoiser) -> tuple[str, str]:
    """The kinds of conditions of two teachers; classes and none go together."""
    mine, theirs = one.conditioning, other.conditioning
    if isinstance(mine, Prompts) and isinstance(theirs, Prompts) and _encode_alike(mine, theirs):
        return "prompts", "prompts"
    first, second = map(_kind, (one, other))
    return first, second


def _kind(model: Denoiser) -> str:
    conditioning = model.conditioning
    if isinstance(conditioning, Prompts):
        return f"prompts through text encoders {conditioning.encoders.fingerprint}"
    if isinstance(conditioning, (ClassLabels, Unconditional)):
        return "classes"
    return f"those of {model.name} ({kind_of(conditioning).label})"


def _encode_alike(mine: Prompts, theirs: Prompts) -> bool:
    """Whether the text encoders are the same, by their files or by what they make of a prompt."""
    if mine.encoders.fingerprint == theirs.encoders.fingerprint:
        return True
    probe = {"prompt": torch.tensor([0, 1])}
    one, other = (with_prompts(each, (PROBE,)).embed(probe) for each in (mine, theirs))
    return one.keys() == other.keys() and all(
        one[key].shape == other[key].shape and torch.allclose(one[key], other[key], atol=1e-4)
        for key in one
    )


COMPARED: dict[str, Callable[[Denoiser], Any]] = {
    "samples of shape": lambda model: tuple(model.sample_shape),
    "values in": lambda model: model.value_range,
    "in": _latents,
}


def offsets_of(teachers: Sequence[Denoiser], given: Sequence[int] | None = None) -> list[int]:
    """First class id of each teacher; teachers of prompts begin at 0."""
    if given is not None:
        if any(isinstance(one.conditioning, Prompts) for one in teachers):
            raise UsageError("--label-offset: these teachers have prompts, no classes: remove it")
        return list(given)
    sizes = [classes_of(one) for one in teachers]
    return [sum(sizes[:i]) for i in range(len(sizes))]


def classes_of(teacher: Denoiser) -> int:
    """How many class ids a teacher takes; one without conditions is one class."""
    own = teacher.conditioning
    return own.num_classes if isinstance(own, ClassLabels) else 1


def _all_classes(
    teachers: Sequence[Denoiser], offsets: Sequence[int]
) -> tuple[ClassLabels, list[Place]]:
    """One range of class ids, with one id for "no class" if a teacher has one."""
    total = max(at + classes_of(one) for at, one in zip(offsets, teachers, strict=True))
    kinds = [one.conditioning for one in teachers]
    has_null = any(isinstance(k, ClassLabels) and k.null_class is not None for k in kinds)
    places = [_place(one, at, total, has_null) for one, at in zip(teachers, offsets, strict=True)]
    known = [i for i in range(total) if any(int(place.own[i]) >= 0 for place in places)]
    classes = None if len(known) == total else tuple(known)
    null = total if has_null else None
    return ClassLabels(total, null, classes, _names(teachers, offsets, total)), places


def _place(teacher: Denoiser, offset: int, total: int, has_null: bool) -> Place:
    own = teacher.conditioning
    size = total + has_null
    if not isinstance(own, ClassLabels):
        return Place.of(LABELS, {0: offset}, size, blank=True)
    pairs = {i: offset + i for i in own.drawn}
    if own.null_class is not None:
        pairs[ABSENT if isinstance(own.null_class, str) else own.null_class] = total
    return Place.of(LABELS, pairs, size)


def _names(
    teachers: Sequence[Denoiser], offsets: Sequence[int], total: int
) -> tuple[str, ...] | None:
    """Names of all classes, or None if no teacher has names; those in one place are joined."""
    found: dict[int, list[str]] = {}
    for one, at in zip(teachers, offsets, strict=True):
        own, short = one.conditioning, Path(one.name).name.rpartition(":")[2]
        drawn: tuple[int, ...] = (0,)
        names: tuple[str, ...] | None = (short,)
        if isinstance(own, ClassLabels):
            drawn, names = own.drawn, own.names
        for i in drawn:
            name = names[i] if names else f"{short} {i}"
            if name not in found.setdefault(at + i, []):
                found[at + i].append(name)
    named = any(getattr(one.conditioning, "names", None) for one in teachers)
    blank = any(isinstance(one.conditioning, Unconditional) for one in teachers)
    if not named and not blank:
        return None
    return tuple(" or ".join(found.get(i, [f"class {i}"])) for i in range(total))


def _all_prompts(kinds: Sequence[Prompts]) -> Prompts:
    """The prompts of all, each text once."""
    negatives = {kind.negative for kind in kinds}
    if len(negatives) > 1:
        raise UsageError("teachers of prompts need one negative prompt: give --negative-prompt")
    texts = list(dict.fromkeys(text for kind in kinds for text in kind.texts))
    return with_prompts(kinds[0], texts, kinds[0].negative)


def _prompt_places(kinds: Sequence[Prompts], conditioning: Conditioning) -> list[Place]:
    """Whose prompts a conditioning has. Raises UsageError for one that no teacher has."""
    assert isinstance(conditioning, Prompts)
    numbers = {text: i + 1 for i, text in enumerate(conditioning.texts)}
    strange = numbers.keys() - {text for kind in kinds for text in kind.texts}
    if strange:
        raise UsageError(
            f"the prompt '{min(strange)}' is of none of these teachers, which share out the "
            "prompts of their run: give some of those, or leave --prompts out"
        )
    own = [[(i, text) for i, text in enumerate(kind.texts) if text in numbers] for kind in kinds]
    pairs = [{0: 0} | {i + 1: numbers[text] for i, text in each} for each in own]
    return [Place.of(PROMPT, each, len(numbers) + 1) for each in pairs]
