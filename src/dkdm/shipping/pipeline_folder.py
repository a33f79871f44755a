"""The result: a diffusers pipeline folder, and the lines that load it."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
from torch import nn

from dkdm.core.denoisers.conditioning import ClassLabels, Conditioning
from dkdm.core.denoisers.denoiser import Denoiser
from dkdm.core.denoisers.inputs import to_index
from dkdm.core.denoisers.kinds import Row, kind_of
from dkdm.core.diffusion.process import Process
from dkdm.core.few_steps.grid import GRID
from dkdm.core.few_steps.model import FewStep
from dkdm.core.saving.checkpoint import save_network
from dkdm.core.saving.folders import replace_files, write_sums
from dkdm.models.architectures import component_of, pixels
from dkdm.models.components import Component
from dkdm.models.custom_network import OWN_CLASS, origin_of
from dkdm.models.locate import INDEX
from dkdm.models.pipelines import PIPELINES, Pipeline, encoding_of
from dkdm.models.schedulers import SIGMA_RANGE, beta_fields, clips_as, flow_grid
from dkdm.models.stand_ins import EDM_SCHEDULERS, FIRST_ORDER, ON_BETAS
from dkdm.networks import shipped_source
from dkdm.reading.files import identifier, render
from dkdm.reading.places import copy_folder, link_folder
from dkdm.shipping.call_source import call_source
from dkdm.shipping.custom_network import shipment, shipping_note
from dkdm.shipping.few_steps import few_steps_table

# Components that `pipeline.py` has a parameter for, besides denoiser and scheduler.
COMPONENTS = (
    *("vae", "vqvae", "image_encoder", "feature_extractor", "safety_checker", "movq"),
    *(f"{part}{number}" for part in ("text_encoder", "tokenizer") for number in ("", "_2", "_3")),
)


def write_pipeline(folder: Path, denoiser: Denoiser, former: Path | None = None) -> None:
    """Write network, scheduler, index and the teacher's other components, as diffusers does.

    former: a folder that was written for the same teacher; its components are linked, not copied.
    The folder samples with a pipeline of diffusers if one can feed the network; otherwise it holds
    a short `pipeline.py`, loaded with `trust_remote_code=True` and without dkdm. A network made by
    a user's factory brings its source. If no scheduler of diffusers stands for the process, the
    network is written alone. Each file is there whole or not at all; SHA256SUMS has their hashes.
    """

    def fill(partial: Path) -> None:
        _write_files(partial, denoiser, former, folder)
        write_sums(partial)

    component = component_of(type(denoiser.network).__name__)
    written = replace_files(folder, fill)
    for path in (folder / component).glob("*.py"):
        if path.relative_to(folder) not in written:
            path.unlink()  # of a network that was there before


def _write_files(folder: Path, denoiser: Denoiser, former: Path | None, at: Path) -> None:
    network: Any = denoiser.network
    component = component_of(type(network).__name__)
    save_network(network, folder / component)
    home = _write_source(network, folder / component)
    stock = _stock_pipeline(denoiser) if denoiser.process.scheduler else None
    scheduler = scheduler_config(denoiser)
    if not scheduler:
        return
    if stock is None and scheduler.get("use_dynamic_shifting"):
        scheduler["use_dynamic_shifting"] = False  # one size, and its shift is known
    _write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    components = _named_for(stock, denoiser.bundle.components)
    if stock is None:
        components = {key: part for key, part in components.items() if key in COMPONENTS}
    _write_components(folder, components, former, at)
    index: dict[str, Any] = {
        "_class_name": stock or ["pipeline", "DenoiserPipeline"],
        "_diffusers_version": diffusers.__version__,
        component: home,
        "scheduler": ["diffusers", scheduler["_class_name"]],
        **{name: [part.library, part.class_name] for name, part in components.items()},
    }
    if sides := denoiser.sample_shape[1:]:  # vectors have none
        index["_sample_size"] = "x".join(map(str, sides))
    if stock is None:
        index |= _class_index(denoiser) | _index_for_dkdm(denoiser)
        (folder / "pipeline.py").write_text(_pipeline_source(denoiser, component, components))
    else:
        index = {**denoiser.bundle.entries, **index}
    _write_json(folder / "model_index.json", index)


def _write_components(
    folder: Path, components: Mapping[str, Component], former: Path | None, at: Path
) -> None:
    """at: where they will lie."""
    for name, part in components.items():
        if former is not None and (former / name).is_dir():
            link_folder(former / name, folder / name)
        elif part.folder.resolve() != (at / name).resolve():
            copy_folder(part.folder, folder / name, part.root, part.owns)


def shipping_notes(denoiser: Denoiser, folder: Path) -> list[str]:
    """What a user who loads the folder of a model must know or install."""
    network, clipping = denoiser.network, denoiser.process.clipping
    own = shipping_note(network) if isinstance(network, nn.Module) else None
    notes = [] if own is None else [own]
    if denoiser.decode is not None:
        notes.append(
            "it works on latents of a custom autoencoder, which is not in the folder: its pipeline "
            "returns latents, and `dkdm sample` writes .safetensors"
        )
    if isinstance(denoiser, FewStep):
        beside = denoiser.beside.items()
        found = [(name, what) for name, what in beside if (folder / name / INDEX).is_file()]
        notes += [f"`{name}/` holds {what}" for name, what in found]
    elif clipping.range is not None and not clips_as(scheduler_config(denoiser), denoiser.process):
        low, high = clipping.center - clipping.range, clipping.center + clipping.range
        notes.append(
            f"its chain was clipped to {low:g}..{high:g}, and the folder's scheduler does not: "
            "only DDPM and DDIM of diffusers clip, and only around 0"
        )
    return notes


def _index_for_dkdm(denoiser: Denoiser) -> dict[str, Any]:
    """What dkdm reads back, under names with an underscore, which diffusers skips."""
    own, bundle = own_rows(denoiser), denoiser.bundle
    index: dict[str, Any] = _value_range(denoiser)
    if isinstance(denoiser, FewStep):
        index[GRID] = denoiser.saved()
    if own:
        index["_conditions"] = to_index(own)
    if denoiser.decode is not None:
        index["_latents"] = "true"
    if bundle.pipeline is not None:
        width = _token_width(denoiser.conditioning)
        widths = {} if width is None else {"joint_attention_dim": width}
        index["_came_from"] = {"pipeline": bundle.pipeline, "entries": {**bundle.entries, **widths}}
    return index


def own_rows(denoiser: Denoiser) -> dict[str, Row]:
    """What a network is fed by a custom conditioning; empty for all others."""
    kind = kind_of(denoiser.conditioning)
    return kind.fed() if kind.asks == "cond" else {}


def _value_range(denoiser: Denoiser) -> dict[str, str]:
    """The values of clean samples, for dkdm's eyes, if they are not -1 to 1."""
    if denoiser.bundle.autoencoder is not None or tuple(denoiser.value_range) == (-1.0, 1.0):
        return {}
    return {"_value_range": "{}..{}".format(*denoiser.value_range)}


def _write_source(network: nn.Module, folder: Path) -> list[str]:
    """[library, class] for model_index.json: diffusers, or the file that is written to `folder`."""
    kind, origin = type(network), origin_of(network)
    if origin is not None and origin.factory is not None:
        shipped = shipment(origin)
        (folder / shipped.file).write_text(shipped.text, encoding="utf-8")
        return [shipped.file.removesuffix(".py"), OWN_CLASS]
    if kind.__module__.startswith("dkdm.networks."):
        module = kind.__module__.rpartition(".")[2]
        (folder / f"{module}.py").write_text(shipped_source(kind), encoding="utf-8")
        return [module, kind.__name__]
    return [kind.__module__.partition(".")[0], kind.__name__]


def scheduler_config(denoiser: Denoiser) -> dict[str, Any]:
    """The config of the scheduler that samples this model; empty if diffusers has none."""
    config = dict(denoiser.process.scheduler)
    own, name = denoiser.parameterization, config.get("_class_name", "")
    if name in ON_BETAS and not config.get("use_flow_sigmas"):
        config |= beta_fields(denoiser.process)
        config["prediction_type"] = own.prediction
    if name == "DDPMScheduler":
        config["variance_type"] = own.variance
    if name in EDM_SCHEDULERS:
        config["sigma_data"] = own.sigma_data
        config["prediction_type"] = "v_prediction" if own.prediction == "edm_v" else "epsilon"
    return config


def _stock_pipeline(denoiser: Denoiser) -> str | None:
    """The diffusers pipeline that feeds this network and decodes its samples, if there is one."""
    if isinstance(denoiser, FewStep):
        return None
    kind, coder = _feeding_pipeline(denoiser), denoiser.bundle.autoencoder
    decodes = kind is None or coder is None or coder.standard(kind) == coder.standard()
    return kind if decodes else None


def _feeding_pipeline(denoiser: Denoiser) -> str | None:
    network, kind = type(denoiser.network).__name__, denoiser.bundle.pipeline
    scheduler = denoiser.process.scheduler["_class_name"]
    if _value_range(denoiser) or denoiser.decode is not None or own_rows(denoiser):
        return None
    if network == "UNet2DModel":
        return _stock_of_unet(denoiser, scheduler)
    known = PIPELINES.get(str(kind))
    if not known or known.network != network or not _stock_process(known, denoiser.process):
        return None
    added = getattr(getattr(denoiser.network, "config", None), "addition_embed_type", None)
    fits = {
        "DiTPipeline": _asks_as_dit(denoiser.conditioning),
        "StableDiffusionXLPipeline": added is not None,
    }
    return kind if fits.get(str(kind), True) else None


def _asks_as_dit(conditioning: Conditioning) -> bool:
    """Whether these are the labels of DiTPipeline, which guides with class 1000 in any case."""
    known = isinstance(conditioning, ClassLabels) and replace(conditioning, names=None)
    return known == ClassLabels(num_classes=1000, null_class=1000)


def _stock_process(pipeline: Pipeline, process: Process) -> bool:
    """Whether a pipeline samples a process: flows from pure noise on, or the others."""
    scheduler = process.scheduler["_class_name"]
    odd = process.scheduler.get("use_flow_sigmas", False)  # pipelines pass sigmas of their own
    if scheduler not in (pipeline.schedulers or (scheduler,)) or odd:
        return False
    is_flow = scheduler.startswith("FlowMatch")
    return is_flow == pipeline.flow and SIGMA_RANGE not in process.scheduler


def _stock_of_unet(denoiser: Denoiser, scheduler: str) -> str | None:
    """The pipeline for an unconditional UNet2DModel; only DDPMScheduler learns a variance."""
    learned = denoiser.parameterization.learns_variance and scheduler != "DDPMScheduler"
    if learned or kind_of(denoiser.conditioning).asks or denoiser.constants:
        return None
    in_pixels = {
        "DDPMScheduler": "DDPMPipeline",
        "DDIMScheduler": "DDIMPipeline",
        FIRST_ORDER: "DDPMPipeline",
    }.get(scheduler)
    if denoiser.bundle.autoencoder is None:
        return in_pixels
    return "LDMPipeline" if in_pixels or scheduler.startswith("EDM") else None


def _named_for(pipeline: str | None, components: Mapping[str, Component]) -> dict[str, Component]:
    coder = {None: "vae", "DiTPipeline": "vae", "LDMPipeline": "vqvae"}.get(pipeline)
    names = {"vae": coder, "vqvae": coder} if coder else {}
    return {identifier(names.get(key, key)): part for key, part in components.items()}


def _pipeline_source(
    denoiser: Denoiser, component: str, components: Mapping[str, Component]
) -> str:
    asks, bundle, coder = kind_of(denoiser.conditioning).asks, denoiser.bundle, None
    if "vae" in components and bundle.autoencoder is not None:
        coder = bundle.autoencoder
    scheduler = denoiser.process.scheduler["_class_name"]
    family = encoding_of(bundle.pipeline) if asks == "prompt" else None
    few = few_steps_table(denoiser) if isinstance(denoiser, FewStep) else None
    return render(
        "dkdm.shipping",
        "pipeline.py.j2",
        denoiser=denoiser,
        component=component,
        labelled=asks == "class_labels" or bool(denoiser.constants),
        components=list(components),
        latent_standard=coder and coder.standard(),
        encoders=[name for name in components if name.startswith(("text_encoder", "tokenizer"))],
        family=family,
        zero_empty=family is not None and bundle.entries.get(family.zero_empty or "", False),
        call_source=call_source(denoiser.call),
        call_name=getattr(denoiser.call, "__name__", ""),
        flow=scheduler.startswith("FlowMatch"),
        flow_grid=flow_grid(denoiser.process.scheduler),
        random_step=scheduler != "IPNDMScheduler",
        drops_variance=denoiser.parameterization.learns_variance and scheduler != "DDPMScheduler",
        value_range=denoiser.value_range if _value_range(denoiser) else None,
        own_rows={key: (row.shape, row.dtype) for key, row in own_rows(denoiser).items()},
        token_width=_token_width(denoiser.conditioning),
        few_steps=few,
        usual_steps=max(few or [25]),
    )


def _token_width(conditioning: Conditioning) -> int | None:
    kind = kind_of(conditioning)
    row = kind.fed().get("encoder_hidden_states") if kind.asks == "prompt" else None
    return None if row is None else row.shape[-1]


def _class_index(denoiser: Denoiser) -> dict[str, Any]:
    """Classes by id and name: diffusers takes a list of two for a component."""
    facts = kind_of(denoiser.conditioning).facts()
    names, classes = facts.get("class_names"), facts.get("classes")
    return {
        "num_classes": facts.get("num_classes"),
        "null_class": facts.get("null_class"),
        "class_names": names and dict(enumerate(names)),
        "classes": classes and {i: names[i] if names else str(i) for i in classes},
    }


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=2, default=str) + "\n")


def usage_snippet(folder: str, denoiser: Denoiser, guidance_scale: float = 1.0) -> str:
    """The Python lines that load and sample the folder with diffusers, guided by this scale.

    Without a scheduler of diffusers there is no pipeline: they load the network alone.
    """
    if not denoiser.process.scheduler:
        return _network_alone(folder, denoiser)
    stock, kind = _stock_pipeline(denoiser), kind_of(denoiser.conditioning)
    given = [json.dumps(folder, ensure_ascii=False)]
    given += _absent(stock, denoiser) if stock else ["trust_remote_code=True"]
    steps = max(denoiser.intervals.steps) if isinstance(denoiser, FewStep) else 50
    arguments = [kind.usage(), *_usage_size(denoiser, stock), f"num_inference_steps={steps}"]
    if kind.asks and (stock or guidance_scale != 1.0):  # pipelines of diffusers have each a default
        arguments.append(f"guidance_scale={guidance_scale}")
    result = PIPELINES[stock].output if stock in PIPELINES else "images"
    imports = "import torch\n" if own_rows(denoiser) else ""
    return (
        f"{imports}from diffusers import DiffusionPipeline\n\n"
        f"pipeline = DiffusionPipeline.from_pretrained({', '.join(given)})\n"
        f"{result} = pipeline({', '.join(arguments)}).{result}"
    )


def _network_alone(folder: str, denoiser: Denoiser) -> str:
    network: Any = denoiser.network
    kind, component = type(network), component_of(type(network).__name__)
    quoted = json.dumps(folder, ensure_ascii=False)
    if kind.__module__.partition(".")[0] != "diffusers":
        return f"import dkdm\n\nnetwork = dkdm.load_student({quoted})"
    return (
        f"from diffusers import {kind.__name__}\n\n"
        f'network = {kind.__name__}.from_pretrained({quoted}, subfolder="{component}")'
    )


def _absent(stock: str, denoiser: Denoiser) -> list[str]:
    """Arguments for components that diffusers requires and the folder lacks."""
    pipeline = getattr(diffusers, stock)
    wanted = inspect.signature(pipeline.__init__).parameters.keys() - pipeline._optional_components
    entries = denoiser.bundle.entries.items()
    return [f"{k}=None" for k, value in entries if value == [None, None] and k in wanted]


def _usage_size(denoiser: Denoiser, stock: str | None) -> list[str]:
    """The size in pixels, for pipelines that do not find it in the network's config."""
    if stock not in PIPELINES or not PIPELINES[stock].asks_size:
        return []
    height, width = pixels(denoiser.sample_shape, denoiser.bundle)
    size = [f"height={height}", f"width={width}"]
    if len(denoiser.sample_shape) < 4 or denoiser.bundle.autoencoder is None:
        return size
    factor = denoiser.bundle.autoencoder.config.get("scale_factor_temporal", 4)
    return [*size, f"num_frames={(denoiser.sample_shape[1] - 1) * factor + 1}"]
