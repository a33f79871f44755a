"""The result: a diffusers pipeline folder with a model card."""

from __future__ import annotations

import dataclasses
import inspect
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from torch import nn

from dkdm.bundle import Component
from dkdm.checkpoint import save_network
from dkdm.conditioning import ClassLabels, Conditioning
from dkdm.config import DistillConfig, RunConfig
from dkdm.denoiser import Denoiser
from dkdm.networks import HOMES
from dkdm.prompts import Prompts
from dkdm.teachers.text import FAMILIES
from dkdm.version import __version__

_TEMPLATES = Environment(  # nosec: writes Python and Markdown, not HTML
    loader=PackageLoader("dkdm"), undefined=StrictUndefined, keep_trailing_newline=True
)


def component_name(network: nn.Module) -> str:
    """The folder a network is saved in, as diffusers names it: unet or transformer."""
    return "transformer" if "Transformer" in type(network).__name__ else "unet"


def write_pipeline(folder: Path, denoiser: Denoiser) -> None:
    """Write network, scheduler, index and all that came with the teacher, as diffusers does.

    The folder samples with a stock pipeline where one can feed the network; else it holds a short
    `pipeline.py`, loaded with `trust_remote_code=True` and without dkdm. A process that no
    scheduler of diffusers stands for is left out, and the network is written alone.
    """
    component = component_name(denoiser.network)  # type: ignore[arg-type]
    save_network(denoiser.network, folder / component)  # type: ignore[arg-type]
    if _library(type(denoiser.network)) in HOMES.values():
        source = inspect.getsourcefile(type(denoiser.network))
        shutil.copy(str(source), folder / component)
    scheduler = scheduler_config(denoiser)
    if not scheduler:
        return
    _write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    components = _named_for(_stock_pipeline(denoiser), denoiser.bundle.components)
    for name, part in components.items():
        if part.folder.resolve() != (folder / name).resolve():
            shutil.copytree(part.folder, folder / name, dirs_exist_ok=True)
    network = type(denoiser.network)
    index: dict[str, Any] = {
        "_class_name": _stock_pipeline(denoiser) or ["pipeline", "DenoiserPipeline"],
        "_diffusers_version": _diffusers_version(),
        component: [_library(network), network.__name__],
        "scheduler": ["diffusers", scheduler["_class_name"]],
        **{name: [part.library, part.class_name] for name, part in components.items()},
    }
    if _stock_pipeline(denoiser) is None:
        index |= _class_index(denoiser)
        (folder / "pipeline.py").write_text(_pipeline_source(denoiser, component, components))
    else:
        index = {**denoiser.bundle.entries, **index}
    _write_json(folder / "model_index.json", index)


def _library(network: type[nn.Module]) -> str:
    """What model_index.json calls the home of a class: diffusers, or the file shipped beside it."""
    own = network.__module__.startswith("dkdm.networks.")
    return network.__module__.rpartition(".")[2] if own else network.__module__.partition(".")[0]


def scheduler_config(denoiser: Denoiser) -> dict[str, Any]:
    """The config of the scheduler that samples this model; empty where diffusers has none."""
    config = dict(denoiser.process.scheduler)
    own = denoiser.parameterization
    if config.get("_class_name") in ("DDPMScheduler", "DDIMScheduler"):
        config["prediction_type"] = own.prediction
    if config.get("_class_name") == "DDPMScheduler":
        config["variance_type"] = own.variance
    if config.get("_class_name", "").startswith("EDM"):
        config["sigma_data"] = own.sigma_data
    return config


STOCK_NETWORKS = {
    "LDMPipeline": "UNet2DModel",
    "DiTPipeline": "DiTTransformer2DModel",
    "DanceDiffusionPipeline": "UNet1DModel",
    "StableDiffusionPipeline": "UNet2DConditionModel",
    "StableDiffusionXLPipeline": "UNet2DConditionModel",
    "PixArtAlphaPipeline": "PixArtTransformer2DModel",
    "PixArtSigmaPipeline": "PixArtTransformer2DModel",
    "StableDiffusion3Pipeline": "SD3Transformer2DModel",
    "FluxPipeline": "FluxTransformer2DModel",
    "SanaPipeline": "SanaTransformer2DModel",
    "Lumina2Pipeline": "Lumina2Transformer2DModel",
    "WanPipeline": "WanTransformer3DModel",
}
_NULL_CLASS_OF_DIT = 1000  # DiTPipeline guides with this one, whatever the network


def _stock_pipeline(denoiser: Denoiser) -> str | None:
    """The diffusers pipeline that can feed this network, if there is one."""
    network, kind = type(denoiser.network).__name__, denoiser.bundle.pipeline
    labelled = isinstance(denoiser.conditioning, ClassLabels) or bool(denoiser.constants)
    if network == "UNet2DModel":
        if labelled:
            return None
        if denoiser.bundle.autoencoder is not None:
            return "LDMPipeline"
        scheduler = denoiser.process.scheduler["_class_name"]
        return {"DDPMScheduler": "DDPMPipeline", "DDIMScheduler": "DDIMPipeline"}.get(scheduler)
    if kind == "DiTPipeline" and denoiser.conditioning != ClassLabels(
        _NULL_CLASS_OF_DIT, _NULL_CLASS_OF_DIT, None, getattr(denoiser.conditioning, "names", None)
    ):
        return None
    return kind if STOCK_NETWORKS.get(str(kind)) == network else None


def _named_for(pipeline: str | None, components: Mapping[str, Component]) -> dict[str, Component]:
    """The components by the names that the pipeline has for them."""
    coder = "vqvae" if pipeline == "LDMPipeline" else "vae"
    names = (
        {"vae": coder, "vqvae": coder} if pipeline in ("LDMPipeline", "DiTPipeline", None) else {}
    )
    return {names.get(name, name): part for name, part in components.items()}


def _pipeline_source(
    denoiser: Denoiser, component: str, components: Mapping[str, Component]
) -> str:
    """The text of `pipeline.py`."""
    text = isinstance(denoiser.conditioning, Prompts)
    family = FAMILIES.get(str(denoiser.bundle.pipeline)) if text else None
    labelled = isinstance(denoiser.conditioning, ClassLabels) or bool(denoiser.constants)
    network = type(denoiser.network).__name__
    return _TEMPLATES.get_template("pipeline.py.j2").render(
        component=component,
        labelled=labelled,
        components=list(components),
        latent="vae" in components,
        text=text,
        text_pipeline=denoiser.bundle.pipeline,
        encoders=[name for name in components if name.startswith(("text_encoder", "tokenizer"))],
        family=family,
        arguments=family.all_arguments(denoiser.bundle) if family else {},
        call=_CALLS_WITH_TEXT.get(network, "network(x, time, **embeds)"),
        flow=denoiser.process.scheduler["_class_name"].startswith("FlowMatch"),
        sample_shape=tuple(denoiser.sample_shape),
        token_width=_token_width(denoiser.conditioning),
        learns_variance=denoiser.parameterization.learns_variance,
    )


def _token_width(conditioning: Conditioning) -> int | None:
    shape = (
        conditioning.shape_of("encoder_hidden_states")
        if isinstance(conditioning, Prompts)
        else None
    )
    return None if shape is None else shape[-1]


_CALLS_WITH_TEXT = {
    "UNet2DConditionModel": 'network(x, time, embeds["encoder_hidden_states"])',
    "SD3Transformer2DModel": "network(hidden_states=x, timestep=time, **embeds)",
    "PixArtTransformer2DModel": (
        'network(x, timestep=time, added_cond_kwargs={"resolution": None, "aspect_ratio": None}, '
        "**embeds)"
    ),
}


def _class_index(denoiser: Denoiser) -> dict[str, Any]:
    classes = denoiser.conditioning
    if not isinstance(classes, ClassLabels):
        return {"num_classes": None, "null_class": None, "class_names": None}
    return {
        "num_classes": classes.num_classes,
        "null_class": classes.null_class,
        "class_names": list(classes.names) if classes.names else None,
    }


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=2, default=str) + "\n")


def _diffusers_version() -> str:
    import diffusers

    return str(diffusers.__version__)


def usage_snippet(folder: str, denoiser: Denoiser) -> str:
    """The Python lines that load and sample the folder with diffusers."""
    stock = _stock_pipeline(denoiser) is not None
    trust = "" if stock else ", trust_remote_code=True"
    call = _usage_call(denoiser, stock)
    return (
        "from diffusers import DiffusionPipeline\n\n"
        f'pipeline = DiffusionPipeline.from_pretrained("{folder}"{trust})\n'
        f"images = pipeline({call}num_inference_steps=50).images"
    )


def _usage_call(denoiser: Denoiser, stock: bool) -> str:
    conditioning = denoiser.conditioning
    if isinstance(conditioning, Prompts):
        return f"{conditioning.text_of(1)!r}, "
    if isinstance(conditioning, ClassLabels):
        return "class_labels=[0, 1, 2, 3], "
    audio = stock and len(denoiser.sample_shape) == 2
    return "" if audio else "batch_size=4, "


def write_card(
    folder: Path,
    denoiser: Denoiser,
    config: RunConfig,
    *,
    lead: str,
    metrics: Sequence[tuple[str, Sequence[str]]] = (),
    measured_how: str = "",
) -> None:
    """Write `README.md`, the model card.

    lead: what the model is, in a sentence or two. metrics: rows of the table of measurements, the
    first one its header. measured_how: how these numbers came about.
    """
    distilled = isinstance(config, DistillConfig)
    values = dataclasses.asdict(config)
    network = denoiser.network
    details = [
        ("network", f"{type(network).__name__}, {denoiser.num_parameters / 1e6:.2f} M parameters"),
        ("sample shape", " x ".join(map(str, denoiser.sample_shape))),
        (
            "process",
            f"{denoiser.process.scheduler['_class_name']}, T = {denoiser.process.num_levels}",
        ),
        ("prediction", denoiser.parameterization.prediction),
        ("made with", f"dkdm {__version__}"),
    ]
    text = _TEMPLATES.get_template("card.md.j2").render(
        title=config.output_dir.name,
        lead=lead,
        base_model=_base_model(config),
        distilled=distilled,
        has_grid=(folder / "samples" / "grid.png").is_file(),
        usage=usage_snippet(config.output_dir.name, denoiser),
        details=details,
        metrics=list(metrics),
        measured_how=measured_how,
        hyperparameters=[item for item in values.items() if item[0] not in _PRIVATE],
    )
    (folder / "README.md").write_text(text)


_PRIVATE = ("output_dir", "resume_from_checkpoint", "teacher", "images")


def _base_model(config: RunConfig) -> str | None:
    """The hub id the student came from; paths of this machine are nobody else's business."""
    teacher = getattr(config, "teacher", "")
    return teacher if teacher.count("/") == 1 and not Path(teacher).exists() else None
