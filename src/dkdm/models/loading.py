"""Pretrained models of every kind as a Denoiser."""

from __future__ import annotations

import re
from dataclasses import replace
from glob import glob
from pathlib import Path

from dkdm.config import ModelChoice
from dkdm.core.denoisers.conditioning import with_null_class
from dkdm.core.denoisers.denoiser import Denoiser
from dkdm.core.denoisers.kinds import kind_of
from dkdm.core.denoisers.modes import put_into_evaluation, say_if
from dkdm.errors import DkdmError, UsageError
from dkdm.models.locate import INDEX, locate
from dkdm.models.network_folder import load_lone_network
from dkdm.models.options import LoadOptions
from dkdm.models.pipeline_folder import load_pipeline_folder
from dkdm.models.place import quantize_int8
from dkdm.models.prompts import NO_PROMPTS, Prompts, read_prompts, with_prompts
from dkdm.models.sketch import sketch_teacher
from dkdm.reading.arguments import given
from dkdm.reading.options import as_typed
from dkdm.reading.plugins import import_object
from dkdm.reading.sizes import understood


def load_teacher(
    spec: str | Path,
    *,
    format: str | None = None,
    subfolder: str | None = None,
    revision: str | None = None,
    options: LoadOptions | None = None,
) -> Denoiser:
    """Load a pretrained diffusion model.

    spec: `builtin:NAME`, a diffusers pipeline folder, a run's output folder, a hub id, a checkpoint
    file of an original repository, or `module:factory` (a function without arguments that returns a
    Denoiser). format: of a checkpoint file, one of FORMATS; None tells it from its keys. subfolder:
    where the pipeline lies inside the folder. revision: as in diffusers. options: everything else.
    A text model comes without prompts: give it some with `dkdm.models.prompts.with_prompts`.
    Raises UsageError if nothing is found there or it is not a one-step diffusion model,
    DkdmError if its weights are missing or do not belong to its network.
    """
    accepted = "give a folder, a hub id or module:factory"
    spec = str(given("load_teacher: model", spec, Path, accepted))
    options = options or LoadOptions()
    if ":" in spec and not spec.startswith("builtin:"):
        return _with_null_class(_from_factory(spec), options)
    found = locate(spec, revision=revision, variant=options.variant, subfolder=subfolder)
    path = found / (subfolder or "")
    if options.dtype == "int8":
        denoiser = _from_path(path, format, replace(options, dtype="bfloat16"))
        quantize_int8(denoiser.network)  # type: ignore[arg-type]
    else:
        denoiser = _from_path(path, format, options)
    denoiser.name = spec
    denoiser = _with_null_class(denoiser, options)
    example = kind_of(denoiser.conditioning).example(2)
    if example is not None:  # otherwise it is tried when prompts are given
        denoiser.check(example)
    return denoiser


def _with_null_class(denoiser: Denoiser, options: LoadOptions) -> Denoiser:
    if options.null_class is None:
        return denoiser
    conditioning = with_null_class(denoiser.conditioning, options.null_class)
    return replace(denoiser, conditioning=conditioning)


def chosen_teacher(choice: ModelChoice, sketched: bool = False) -> Denoiser:
    """The model that options choose; sketched: without weights, if `sketch_teacher` can."""
    where = {"subfolder": choice.subfolder, "revision": choice.revision}
    options = LoadOptions(
        variant=choice.variant,
        dtype=choice.dtype or "float32",
        sample_size=choice.size,
        config=choice.config,
        flags=choice.flags,
        scheduler=choice.scheduler,
        lora=choice.lora or (),
        factory=choice.factory,
        null_class=choice.null_class,
    )
    with as_typed(choice):
        sketch = sketch_teacher(choice.model, options, **where) if sketched else None
        if sketch:
            return _with_null_class(sketch, options)
        return load_teacher(choice.model, format=choice.format, options=options, **where)


def with_texts(
    denoiser: Denoiser, spec: str | None, negative: str = "", limit: int = 50_000, seed: int = 0
) -> Denoiser:
    """A text model with the prompts that `spec` names: files, or a prompt itself.

    Other models are returned as they are. Raises UsageError for prompts without a text model, for a
    text model without prompts, and if `spec` names files that cannot be read.
    """
    conditioning = denoiser.conditioning
    if not isinstance(conditioning, Prompts):
        if spec is not None:
            raise UsageError("--prompts was given, but the model is not conditioned on text")
        return denoiser
    if spec is None and conditioning.texts:
        return denoiser
    if spec is None:
        raise UsageError(NO_PROMPTS)
    texts = (spec,) if _is_prompt(spec) else read_prompts(spec, limit, seed)
    given = replace(denoiser, conditioning=with_prompts(conditioning, texts, negative))
    given.check()
    return given


def _is_prompt(spec: str) -> bool:
    """Whether this is a prompt and not the name of a file, or a pattern, that may be missing."""
    return " " in spec and not glob(spec) and not re.search(r"[*?/\\]|\.\w{1,5}$", spec)


def _from_path(path: Path, format: str | None, options: LoadOptions) -> Denoiser:
    if not path.is_dir() or format is not None:
        from dkdm.models.formats.originals import load_original  # the networks of all formats

        return load_original(path, format, options)
    if options.scheduler is not None and (path / INDEX).is_file():
        raise UsageError(f"--teacher-scheduler: {path} has a scheduler: remove this option")
    with understood(str(path)):
        lone = not (path / INDEX).is_file()
        return (load_lone_network if lone else load_pipeline_folder)(path, options)


def _from_factory(spec: str) -> Denoiser:
    found = import_object(spec)
    try:
        denoiser = found if isinstance(found, Denoiser) else found()
    except UsageError as error:
        raise UsageError(f"teacher factory {spec}: {error}") from error
    except Exception as error:
        raise DkdmError(f"teacher factory {spec} raised {type(error).__name__}: {error}") from error
    if not isinstance(denoiser, Denoiser):
        raise UsageError(
            f"teacher factory {spec} returned {type(denoiser).__name__}: return a "
            "dkdm.Denoiser(network, process, parameterization, sample_shape)"
        )
    denoiser.name = spec
    say_if(put_into_evaluation(denoiser.network, denoiser.call, denoiser.decode))
    denoiser.check()
    return denoiser
