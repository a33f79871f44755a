"""A custom network: what a run records of it, and how it is made again.

Networks of diffusers and of dkdm know how they were made. Of any other, `Origin` is attached to the
network when it comes in, and written as the config.json beside its weights.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from dkdm.core.denoisers.calls import call_of
from dkdm.core.denoisers.conditioning import ClassLabels, Conditioning, Unconditional
from dkdm.core.denoisers.denoiser import Batch, Denoiser
from dkdm.core.denoisers.kinds import kind_of
from dkdm.core.saving.checkpoint import ORIGIN, load_strict
from dkdm.errors import DkdmError, UsageError
from dkdm.models.prompts import BlankEmbeddings, Prompts, TextEncoders
from dkdm.reading.fields import shown
from dkdm.reading.made_here import remember, was_made_here
from dkdm.reading.plugins import import_object, is_spec, is_strange, places_of, split
from dkdm.reading.values import Range, made_of

OWN_CLASS = "OwnNetwork"  # the class of the file that is shipped, and `_class_name` in config.json
WAKING_STD = 0.02
Size = Annotated[int, Range(0)]
Factory = str | Callable[..., Any]


@dataclass(frozen=True)
class Origin:
    """Where a network came from.

    network: its class's name. factory: `module:name`; None if nobody but the user can make it.
    arguments: keywords that the class `factory` is called with; None if it is a factory, called
    with what follows.
    sample_shape: (C, ...). out_channels: C, or 2C with a learned variance. num_classes, null_class:
    of `ClassLabels`, or None. embeddings: shapes of a row of each text embedding.
    """

    network: str
    factory: str | None
    sample_shape: tuple[Size, ...]
    out_channels: Size
    num_classes: Size | None = None
    null_class: Size | None = None
    embeddings: Mapping[str, tuple[Size, ...]] = field(default_factory=dict)
    arguments: Mapping[str, Any] | None = None

    def save_config(self, folder: Path) -> None:
        """Write config.json, and remember that this machine wrote it."""
        name = OWN_CLASS if self.factory else self.network
        text = json.dumps({"_class_name": name, **asdict(self)}, indent=2)
        (folder / "config.json").write_text(text + "\n")
        if self.factory:
            remember(asdict(self), split(self.factory)[0])

    @property
    def conditioning(self) -> Conditioning:
        """What the factory knows about conditions: text without prompts and encoders."""
        if self.embeddings:
            return Prompts(_NO_ENCODERS, ("",), "", BlankEmbeddings(self.embeddings))
        if self.num_classes is None:
            return Unconditional()
        return ClassLabels(self.num_classes, self.null_class)


def origin_of(network: object) -> Origin | None:
    """What was attached to a network; None if nothing was."""
    origin: Origin | None = getattr(network, ORIGIN, None)
    return origin


def is_own(network: nn.Module) -> bool:
    """Whether a network is neither diffusers' nor dkdm's."""
    home = type(network).__module__
    return home.partition(".")[0] != "diffusers" and not home.startswith("dkdm.networks.")


def remember_factory(
    network: nn.Module,
    factory: str,
    sample_shape: tuple[int, ...],
    out_channels: int,
    conditioning: Conditioning,
) -> None:
    """Record on a network that `factory` makes it of these."""
    facts = _facts(sample_shape, out_channels, conditioning)
    setattr(network, ORIGIN, Origin(type(network).__name__, factory, **facts))


def remember_object(denoiser: Denoiser) -> None:
    """Record on a network that came without a factory how its class makes it, if that is found.

    Its `config` is tried first, then no arguments; either must give the same output with the same
    weights. Networks of diffusers and dkdm, and those that came from a factory, stay as they are.
    """
    network = denoiser.network
    if not isinstance(network, nn.Module) or not is_own(network) or origin_of(network):
        return
    facts = _facts(denoiser.sample_shape, denoiser.out_channels, denoiser.conditioning)
    kind = type(network)
    named = _name_of(kind) if denoiser.call is call_of(network) else None
    tried = _candidates(network) if named else []
    arguments = next((a for a in tried if _makes(kind, a, denoiser)), None)
    factory = None if arguments is None else named
    setattr(network, ORIGIN, Origin(kind.__name__, factory, **facts, arguments=arguments))


def _facts(
    sample_shape: tuple[int, ...], out_channels: int, conditioning: Conditioning
) -> dict[str, Any]:
    found: dict[str, Any] = {"sample_shape": tuple(sample_shape), "out_channels": out_channels}
    kind = kind_of(conditioning)
    found |= {k: v for k, v in kind.facts().items() if k in ("num_classes", "null_class")}
    if kind.asks == "prompt":
        found["embeddings"] = {name: row.shape for name, row in kind.fed().items()}
    return found


def _candidates(network: nn.Module) -> list[dict[str, Any]]:
    """Arguments that may make this network again."""
    config = getattr(network, "config", None)
    if not isinstance(config, Mapping):
        return [{}]
    known = {key: value for key, value in config.items() if not str(key).startswith("_")}
    try:
        return [dict(json.loads(json.dumps(known))), {}]
    except (TypeError, ValueError):
        return [{}]


def _makes(kind: type[nn.Module], arguments: dict[str, Any], denoiser: Denoiser) -> bool:
    """Whether the class, called with these, gives the same network."""
    with torch.random.fork_rng():
        try:
            network = awakened(denoiser.network)  # type: ignore[arg-type]
            twin = kind(**arguments).to(denoiser.device)
            load_strict(twin, network.state_dict(), kind.__name__)
            return torch.equal(_answer(denoiser, twin), _answer(denoiser, network))
        except Exception:  # whatever a constructor may raise, it is not this one's way
            return False


def awakened(network: nn.Module) -> nn.Module:
    """A copy with noise on every weight, so that none is zero and hides what lies before it."""
    random = torch.Generator().manual_seed(0)
    copied = copy.deepcopy(network)
    with torch.no_grad():
        for weight in copied.parameters():
            noise = WAKING_STD * torch.randn(weight.shape, generator=random)
            weight.add_(noise.to(weight))
    return copied


@torch.no_grad()
def _answer(denoiser: Denoiser, network: nn.Module) -> Tensor:
    """A network's output for two random states, in evaluation mode."""
    random = torch.Generator().manual_seed(0)
    model = replace(denoiser, network=network.eval(), call=None)
    x = torch.randn(2, *model.sample_shape, generator=random).to(model.device)
    t = torch.tensor([model.process.num_levels // 3, model.process.num_levels - 1])
    cond = model.conditioning.draw(2, random)
    return model.predict(Batch(x, t, cond, t)).output


def read_origin(config: Mapping[str, Any], folder: Path) -> Origin:
    """The origin that a config.json holds. Raises UsageError for values that nothing wrote there.

    Nothing is imported. folder: for the message.
    """
    where = f"{folder / 'config.json'} was not written by dkdm for a custom network"
    origin = made_of(Origin, config, where)
    if not origin.network.isidentifier():
        raise UsageError(f"{where}: network is {shown(origin.network)}: give a class's name")
    if origin.factory is not None and not is_spec(origin.factory):
        raise UsageError(f"{where}: factory is {shown(origin.factory)}: give module:name")
    return origin


_OTHERWISE = "dkdm.load_student(FOLDER, network=...) loads the weights into one that you make"


def make(origin: Origin, folder: Path, factory: Factory | None = None) -> nn.Module:
    """The network of an origin read from `folder`, with fresh weights.

    factory: named by the user, `module:name` (or several, with commas), or a callable; None takes
    the one that the folder names, if this machine wrote that folder. Raises UsageError if there is
    none, if it lies in the folder of a model, or if it makes something else.
    """
    called, name = (factory, _name_of(factory)) if callable(factory) else (None, None)
    if called is None:
        name = _named(origin, folder, factory)
        called = _imported(name, folder)
    known = replace(origin, factory=name)
    try:
        with torch.random.fork_rng():
            network = _call(called, known)
    except Exception as error:
        raise UsageError(
            f"{folder}: {name or called}, which makes its network, raised "
            f"{type(error).__name__}: {error}; {_OTHERWISE}"
        ) from error
    if not isinstance(network, nn.Module):
        raise UsageError(f"{folder}: {name or called} made no nn.Module; {_OTHERWISE}")
    setattr(network, ORIGIN, known)
    return network


def _name_of(factory: Callable[..., Any]) -> str | None:
    """`module:name` of a callable; None if it cannot be imported by that."""
    module, name = (getattr(factory, key, "") for key in ("__module__", "__qualname__"))
    found = getattr(sys.modules.get(module), name, None) is factory and module != "__main__"
    return f"{module}:{name}" if found else None


def _named(origin: Origin, folder: Path, given: Any) -> str:
    """The factory to import: one that the user gave, or that this machine itself wrote down."""
    if given is not None and not isinstance(given, str):
        raise UsageError(f"factory is {given!r}: give module:name or a callable")
    names = [name.strip() for name in given.split(",")] if given else []
    if len(names) == 1 or origin.factory in names:
        return names[0] if len(names) == 1 else str(origin.factory)
    if origin.factory is None:
        raise UsageError(f"{folder}: {origin.network} was given as an object: {_OTHERWISE}")
    if not names and was_made_here(asdict(origin), split(origin.factory)[0]):
        return origin.factory
    _refuse_code_of_models(origin.factory, folder)
    raise UsageError(
        f"{folder}: its network was made by {origin.factory}. If you trust that code, name it: "
        f"--student-factory {origin.factory} (or dkdm.load_student(FOLDER, network=...))"
    )


def _imported(name: str, folder: Path) -> Any:
    _refuse_code_of_models(name, folder)
    try:
        return import_object(name)
    except UsageError as error:
        raise UsageError(
            f"{folder}: its network is made by {name}, which must be importable here ({error}); "
            f"{_OTHERWISE}"
        ) from error


def _refuse_code_of_models(factory: str, folder: Path) -> None:
    places = places_of(split(factory)[0])
    if any(map(is_strange, places)):
        raise UsageError(
            f"{folder}: its network is made by {factory}, which lies in the folder of a model: "
            "code in a model's folder is not run. Put the module elsewhere if you trust it"
        )


def _call(factory: Any, origin: Origin) -> Any:
    if origin.arguments is None:
        return factory(origin.sample_shape, origin.out_channels, origin.conditioning)
    if not (isinstance(factory, type) and issubclass(factory, nn.Module)):
        raise UsageError(f"{origin.factory} is no class of a network")
    return factory(**origin.arguments)


def _no_encoder(*_: Any) -> Any:
    raise DkdmError("this conditioning only describes what a network is fed")


_NO_ENCODERS = TextEncoders(_no_encoder, lambda: None, "")
