"""Load the network of a finished run, or of one of its checkpoints."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from dkdm.core.saving.checkpoint import WEIGHTS, checkpoints, load_network_weights
from dkdm.core.saving.folders import MANIFEST
from dkdm.errors import UsageError
from dkdm.models.custom_network import OWN_CLASS, Factory
from dkdm.models.options import LoadOptions
from dkdm.models.pipeline_folder import load_network
from dkdm.models.pipelines import DENOISERS
from dkdm.networks import network_class
from dkdm.reading.arguments import given, refuse
from dkdm.reading.fields import read_json
from dkdm.reading.places import check_folder
from dkdm.reading.plugins import distrust


def load_student(
    folder: str | Path, *, network: nn.Module | None = None, factory: Factory | None = None
) -> nn.Module:
    """Load the network in a folder, in evaluation mode.

    folder: a run, its `checkpoint-N` (the averaged weights, if the run averages), a diffusers
        pipeline, or the network's folder. network: a network that you made and that gets the
        weights; None makes it from its config.json. factory: the code that makes a custom network,
        `module:name` or a callable; None takes the one that config.json names if this machine wrote
        that file, and refuses otherwise: code that a folder names or holds is never run.
    Raises UsageError if no network is there or can be made, DkdmError if the weights do not fit.
    """
    accepted = "give a run, a checkpoint or a folder"
    folder = Path(given("load_student: folder", folder, Path, accepted))
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
            f"{found}: its network, {name}, was given as an object, which only you can make: use "
            "dkdm.load_student(FOLDER, network=...)"
        )
    options = LoadOptions(factory=factory)
    return load_network(found, name, options, Path(folder)).requires_grad_(True)


def denoiser_folder(folder: Path) -> Path:
    """The denoiser's folder in a pipeline or checkpoint (averaged, if the run averages)."""
    averages = (folder / MANIFEST).is_file() and _averages(folder.parent)
    endings = ("_ema", "") if averages else ("",)  # best/ holds the averaged weights alone
    within = [folder / f"{name}{ending}" for ending in endings for name in DENOISERS]
    return next((each for each in within if each.is_dir()), folder)


def _network_folder(folder: Path) -> Path:
    for found in (folder, denoiser_folder(folder)):
        if any(found.glob("diffusion_pytorch_model*.safetensors")):
            return check_folder(found, folder)
    if not folder.is_dir():
        raise UsageError(f"no folder {folder}: give a run, one of its checkpoint-N, or a network's")
    missing = " or ".join(f"{name}/{WEIGHTS}" for name in DENOISERS)
    started = " (the run is not finished: take a checkpoint-N in it)" if checkpoints(folder) else ""
    raise UsageError(f"{folder} has no {missing}{started}")


def _averages(run: Path) -> bool:
    try:
        return bool(read_json(run / "config.json", "a run's config").get("use_ema", True))
    except UsageError:
        return True
