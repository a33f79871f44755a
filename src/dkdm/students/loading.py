"""The network of a finished run, or of one of its checkpoints."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from dkdm.core.checkpoint import WEIGHTS, load_network_weights
from dkdm.core.given import path_given
from dkdm.errors import UsageError
from dkdm.models.options import LoadOptions
from dkdm.models.own_network import OWN_CLASS, Factory
from dkdm.models.pipeline_folder import DENOISERS, load_network
from dkdm.networks import network_class
from dkdm.reading.arguments import refuse
from dkdm.reading.fields import read_json
from dkdm.reading.places import check_folder
from dkdm.reading.plugins import distrust


def load_student(
    folder: str | Path, *, network: nn.Module | None = None, factory: Factory | None = None
) -> nn.Module:
    """The network that lies in a folder, in evaluation mode.

    folder: a run, its `checkpoint-N` (the averaged weights, where the run averages), a diffusers
        pipeline, or the network's own folder. network: one that you made, to be given the weights;
        None makes it as its config.json says. factory: that makes a custom network, `module:name`
        or a callable; None takes the one that config.json names if this machine wrote that file,
        and refuses otherwise: code that a folder names or holds is never run.
    Raises UsageError where no network lies there or it cannot be made, DkdmError where the weights
    are not those of the network.
    """
    folder = path_given("load_student: folder", folder, "give a run, a checkpoint or a folder")
    if network is not None and not isinstance(network, nn.Module):
        refuse("load_student: network", network, "give a network that you made")
    distrust(folder)
    found = _network_folder(folder)
    if network is not None:
        load_network_weights(network, found)
        return network.eval()
    config = read_json(found / "config.json", "a network's config (or pass network=...)")
    name = str(config.get("_class_name"))
    if name != OWN_CLASS and network_class(name) is None:
        raise UsageError(
            f"{found}: its network, {name}, was given as an object and is made by nobody but you: "
            "expected dkdm.load_student(FOLDER, network=...)"
        )
    options = LoadOptions(factory=factory)
    return load_network(found, name, options, Path(folder)).requires_grad_(True)


def _network_folder(folder: Path) -> Path:
    """The folder in which weights lie: this one, or that of its denoiser."""
    averaged = "_ema" if (folder / "state.json").is_file() and averages(folder.parent) else ""
    for found in (folder, *(folder / f"{name}{averaged}" for name in DENOISERS)):
        if any(found.glob("diffusion_pytorch_model*.safetensors")):
            return check_folder(found, folder)
    if not folder.is_dir():
        raise UsageError(
            f"no folder {folder}: expected a run, a checkpoint-N of it, or a network's"
        )
    expected = " or ".join(f"{name}/{WEIGHTS}" for name in DENOISERS)
    started = " (the run is not finished: take a checkpoint-N in it)" if _is_run(folder) else ""
    raise UsageError(f"{folder}: expected {expected} in it, found neither{started}")


def _is_run(folder: Path) -> bool:
    return any(folder.glob("checkpoint-*"))


def averages(run: Path) -> bool:
    """Whether a run goes by its averaged weights."""
    try:
        return bool(read_json(run / "config.json", "a run's config").get("use_ema", True))
    except UsageError:
        return True
