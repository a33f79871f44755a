"""The result: a diffusers pipeline folder with a model card."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from torch import nn

from dkdm.checkpoint import save_network
from dkdm.conditioning import ClassLabels
from dkdm.config import DistillConfig, RunConfig
from dkdm.denoiser import Denoiser
from dkdm.version import __version__

_TEMPLATES = Environment(  # nosec: writes Python and Markdown, not HTML
    loader=PackageLoader("dkdm"), undefined=StrictUndefined, keep_trailing_newline=True
)


def component_name(network: nn.Module) -> str:
    """The folder a network is saved in, as diffusers names it: unet or transformer."""
    return "transformer" if "Transformer" in type(network).__name__ else "unet"


def write_pipeline(folder: Path, denoiser: Denoiser) -> None:
    """Write network, scheduler and index so that diffusers loads and samples the folder.

    A stock pipeline where one can feed the network; else a short `pipeline.py`, loaded with
    `trust_remote_code=True` and without dkdm.
    """
    network = denoiser.network
    component = component_name(network)  # type: ignore[arg-type]
    save_network(network, folder / component)  # type: ignore[arg-type]
    scheduler = dict(denoiser.process.scheduler)
    _write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    index: dict[str, Any] = {
        "_class_name": _stock_pipeline(denoiser) or ["pipeline", "DenoiserPipeline"],
        "_diffusers_version": _diffusers_version(),
        component: [type(network).__module__.partition(".")[0], type(network).__name__],
        "scheduler": ["diffusers", scheduler["_class_name"]],
    }
    if _stock_pipeline(denoiser) is None:
        index |= _class_index(denoiser)
        labelled = isinstance(denoiser.conditioning, ClassLabels) or bool(denoiser.constants)
        template = _TEMPLATES.get_template("pipeline.py.j2")
        text = template.render(component=component, labelled=labelled)
        (folder / "pipeline.py").write_text(text)
    _write_json(folder / "model_index.json", index)


def _stock_pipeline(denoiser: Denoiser) -> str | None:
    """The diffusers pipeline that can feed this network, if there is one."""
    unconditional = not denoiser.constants and not isinstance(denoiser.conditioning, ClassLabels)
    if type(denoiser.network).__name__ != "UNet2DModel" or not unconditional:
        return None
    scheduler = denoiser.process.scheduler["_class_name"]
    return {"DDPMScheduler": "DDPMPipeline", "DDIMScheduler": "DDIMPipeline"}.get(scheduler)


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
    classes = isinstance(denoiser.conditioning, ClassLabels)
    call = "class_labels=[0, 1, 2, 3], " if classes else "batch_size=4, "
    return (
        "from diffusers import DiffusionPipeline\n\n"
        f'pipeline = DiffusionPipeline.from_pretrained("{folder}"{trust})\n'
        f"images = pipeline({call}num_inference_steps=50).images"
    )


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
