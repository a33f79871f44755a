"""Feature distillation: hidden features of the student brought near those of the teacher.

Stages are matched by name, as in a network cut from its teacher (BK-SDM, arXiv 2305.15798, Eq. 3),
or by resolution; a learnt 1x1 projection maps the student's channels to the teacher's (FitNets,
arXiv 1412.6550, Eq. 3).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from dkdm.core import processes
from dkdm.core.denoisers.calls import Network
from dkdm.core.denoisers.denoiser import Denoiser
from dkdm.core.objectives.positions import counterparts
from dkdm.errors import UsageError

Maps = dict[str, Tensor]
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Features(nn.Module):
    """Pairs of stages, (teacher's, student's) by module name, with a projection each.

    weight: of their loss. Features are those of the last evaluation of `watched` models.
    """

    def __init__(
        self,
        teacher: Denoiser,
        student: Denoiser,
        pairs: list[tuple[str, str]],
        weight: float = 1.0,
    ) -> None:
        super().__init__()
        self.pairs, self.weight = pairs, weight
        self.sides = teacher.sample_shape[1:]
        self._networks = [_module_of(teacher), _module_of(student)]  # a list: not submodules
        self._seen: list[Maps] = [{}, {}]
        with self.watch(), torch.no_grad():
            teacher.check()
            student.check()
        self.projections = nn.ModuleList(self._projection(*pair) for pair in pairs)
        self._seen = [{}, {}]

    def _projection(self, theirs: str, own: str) -> nn.Module:
        maps = self._seen[0].get(theirs), self._seen[1].get(own)
        for name, found, of in zip((theirs, own), maps, ("teacher", "student"), strict=True):
            if found is None:
                raise UsageError(
                    f"--feature-layers: module {name} of the {of} returns no feature map of the "
                    "samples; name one that returns [B, C, ...] or tokens of the samples"
                )
        wanted, given = (cast(Tensor, found).shape[1] for found in maps)
        if not self.sides:
            return nn.Linear(given, wanted)
        return _CONVOLUTIONS[len(self.sides) - 1](given, wanted, kernel_size=1)

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Keep the features of what is evaluated inside."""
        with ExitStack() as stack:
            for side, network in enumerate(self._networks):
                names = {pair[side] for pair in self.pairs}
                stack.enter_context(kept(network, names, self.sides, self._seen[side]))
            yield

    def watched(self, model: Denoiser) -> Denoiser:
        """The same model, whose evaluations leave their features here."""
        call = model.call
        assert call is not None

        def watching(
            network: Network, x: Tensor, time: Tensor, cond: Mapping[str, Tensor]
        ) -> Tensor:
            with self.watch():
                return call(network, x, time, cond)

        return replace(model, call=watching)

    def forward(self, *_: Any) -> Tensor:
        """`loss`, as a term of an objective."""
        return self.loss()

    def loss(self) -> Tensor:
        """weight times the mean over the pairs of |projected - teacher's|^2 / |teacher's|^2, [B].

        The latter is that of the whole batch, of all processes; together.
        A guided teacher's batch is twice as long: its first half has the conditions.
        """
        apart = []
        for (theirs, own), projection in zip(self.pairs, self.projections, strict=True):
            found = projection(self._seen[1][own].float())
            target = self._seen[0][theirs][: len(found)].float()
            target = resized(target, found.shape[2:])
            power = processes.mean_of_all(target.square()).clamp(min=1e-12)
            apart.append((found - target).square().flatten(1).mean(1) / power)
        self._seen = [{}, {}]
        return self.weight * torch.stack(apart).mean(0)


@contextmanager
def kept(
    network: nn.Module, names: Iterable[str], sides: tuple[int, ...], found: Maps
) -> Iterator[None]:
    """Keep the features of these modules in `found`, in the order in which they are computed."""

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            del module, args
            features = feature_map(output, sides)
            if features is not None:
                found[name] = features

        return hook

    handles = [_submodule(network, name).register_forward_hook(keep(name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def match_features(
    teacher: Denoiser, student: Denoiser, layers: str = "auto", weight: float = 1.0
) -> Features:
    """Pair the stages of two networks.

    layers: "name" pairs stages of the same name and size; "resolution" the last stages of every
    size that both have; "auto" tries the two in this order; or explicit pairs of module names,
    "mid_block=transformer_blocks.2,...". Raises UsageError if no pair is found.
    """
    if "=" in layers:
        halves = [text.partition("=") for text in layers.split(",")]
        pairs = [(theirs.strip(), own.strip()) for theirs, _, own in halves]
        return Features(teacher, student, pairs, weight)
    kinds = {"name": by_name, "resolution": by_resolution}
    if layers != "auto" and layers not in kinds:
        raise UsageError(
            f"--feature-layers '{layers}': give auto, name, resolution, or pairs such as "
            "mid_block=transformer_blocks.2"
        )
    maps = [stage_maps(model) for model in (teacher, student)]
    for kind in kinds if layers == "auto" else (layers,):
        found = kinds[kind](*maps)
        if found:
            return Features(teacher, student, found, weight)
    raise UsageError(
        f"--feature-layers {layers}: no stage of the student fits one of the teacher's. The "
        f"teacher has {_listed(maps[0])}; the student {_listed(maps[1])}; give pairs such as "
        "mid_block=transformer_blocks.2"
    )


def _listed(maps: Maps) -> str:
    found = [f"{name} ({'x'.join(map(str, m.shape[2:]))})" for name, m in maps.items()]
    return ", ".join(found) or "no stages"


def by_name(teacher: Maps, student: Maps) -> list[tuple[str, str]]:
    """Stages of the same size at the same place: those that a student cut from the teacher has."""
    pairs = [(theirs, own) for own, theirs in counterparts(student, teacher).items()]
    return [(a, b) for a, b in pairs if teacher[a].shape[2:] == student[b].shape[2:]]


def by_resolution(teacher: Maps, student: Maps) -> list[tuple[str, str]]:
    """The last stages of every size that both have."""
    last = [{m.shape[2:]: name for name, m in maps.items()} for maps in (teacher, student)]
    return [(name, last[1][size]) for size, name in last[0].items() if size in last[1]]


@torch.no_grad()
def stage_maps(model: Denoiser) -> Maps:
    """The features of every stage of a network, in the order in which they are computed.

    The layers of the list that returns the network's output are not stages.
    """
    network, found = _module_of(model), cast(Maps, {})
    with kept(network, [*stage_names(network), ""], model.sample_shape[1:], found):
        model.check()
    output = found.pop("", None)
    last = {name.split(".")[0] for name, features in found.items() if features is output}
    return {name: found[name] for name in found if name.split(".")[0] not in last}


def stage_names(network: nn.Module) -> list[str]:
    """Blocks that a network lists (`down_blocks.0`, `transformer_blocks.3`) and its middle one.

    The direct children of a network that has no such list.
    """
    names = []
    for name, child in network.named_children():
        if isinstance(child, (nn.ModuleList, nn.Sequential)):
            names += [_last_of(inner, f"{name}.{index}") for index, inner in enumerate(child)]
        elif name.startswith("mid"):
            names.append(name)
    return names or [name for name, _ in network.named_children()]


def _last_of(module: nn.Module, name: str) -> str:
    """A module's name; of a mere list of modules, which is never called, that of its last one."""
    if isinstance(module, nn.ModuleList) and len(module):
        return _last_of(module[-1], f"{name}.{len(module) - 1}")
    return name


def feature_map(output: Any, sides: tuple[int, ...]) -> Tensor | None:
    """The features [B, C, ...] in a module's output; None if there are none.

    They are a map with as many dimensions as the samples, or tokens [B, N, C] of equal patches of
    them. If there are several, the largest one (tokens of a prompt go beside those of its image).
    """
    parts = output if isinstance(output, (tuple, list)) else (getattr(output, "sample", output),)
    maps = [_map_of(part, sides) for part in parts if isinstance(part, Tensor)]
    found = [features for features in maps if features is not None]
    return max(found, key=lambda features: features.shape[2:].numel(), default=None)


def _map_of(part: Tensor, sides: tuple[int, ...]) -> Tensor | None:
    """One tensor as a map; audio's [B, C, L] differs from tokens if L divides its length."""
    is_map = part.ndim == len(sides) + 2
    if is_map and (len(sides) != 1 or sides[0] % part.shape[2] == 0):
        return part
    patch = _patch(part.shape[1], sides) if part.ndim == 3 and sides else None
    if patch is not None:
        return part.transpose(1, 2).unflatten(2, tuple(side // patch for side in sides))
    return part if is_map else None


def _patch(tokens: int, sides: tuple[int, ...]) -> int | None:
    """The side of the patches that cut samples into this number of tokens."""
    for patch in range(1, min(sides) + 1):
        fits = all(side % patch == 0 for side in sides)
        if fits and math.prod(side // patch for side in sides) == tokens:
            return patch
    return None


def resized(features: Tensor, size: torch.Size) -> Tensor:
    """Features [B, C, ...] averaged or spread over another grid."""
    if features.shape[2:] == size:
        return features
    return _POOLS[len(size) - 1](features, tuple(size))


_POOLS: tuple[Callable[..., Tensor], ...] = (
    functional.adaptive_avg_pool1d,
    functional.adaptive_avg_pool2d,
    functional.adaptive_avg_pool3d,
)


def _module_of(model: Denoiser) -> nn.Module:
    if not isinstance(model.network, nn.Module):
        raise UsageError(
            f"--feature-weight: {model.name} is a function and has no modules to match"
        )
    return model.network


def _submodule(network: nn.Module, name: str) -> nn.Module:
    try:
        return network.get_submodule(name)
    except AttributeError as error:
        raise UsageError(
            f"--feature-layers: {type(network).__name__} has no module {name}; its stages are "
            f"{', '.join(stage_names(network))}"
        ) from error
