"""Pretrained models as a Denoiser: `load_teacher`."""

from __future__ import annotations

from dkdm.denoiser import Denoiser
from dkdm.errors import DkdmError, UsageError
from dkdm.plugins import import_object
from dkdm.teachers.locate import builtin_names, locate
from dkdm.teachers.pipeline_folder import load_pipeline_folder

__all__ = ["builtin_names", "load_teacher"]


def load_teacher(
    spec: str,
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    variant: str | None = None,
    dtype: str = "float32",
) -> Denoiser:
    """Load a pretrained diffusion model.

    spec: `builtin:NAME`, a diffusers pipeline folder, a run's output folder, a hub id, or
    `module:factory` (a function without arguments that returns a Denoiser). subfolder: where the
    pipeline lies inside it. revision, variant: as in diffusers. dtype: of the weights.
    Raises UsageError where nothing is found there or it is not a one-step diffusion model,
    DkdmError where its weights are missing or do not belong to its network.
    """
    if ":" in spec and not spec.startswith("builtin:"):
        return _from_factory(spec)
    folder = locate(spec, revision=revision, variant=variant) / (subfolder or "")
    denoiser = load_pipeline_folder(folder, variant=variant, dtype=dtype)
    denoiser.name = spec
    denoiser.check()
    return denoiser


def _from_factory(spec: str) -> Denoiser:
    factory = import_object(spec)
    try:
        denoiser = factory()
    except Exception as error:
        raise DkdmError(f"teacher factory {spec} raised {type(error).__name__}: {error}") from error
    if not isinstance(denoiser, Denoiser):
        raise UsageError(
            f"teacher factory {spec} returned {type(denoiser).__name__}: expected a dkdm.Denoiser"
        )
    denoiser.name = spec
    denoiser.check()
    return denoiser
