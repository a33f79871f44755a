"""Data-free knowledge distillation for diffusion models, with any architecture."""

from dkdm.api import distill, train
from dkdm.conditioning import ClassLabels, Unconditional
from dkdm.config import DistillConfig, TrainConfig
from dkdm.denoiser import Batch, Denoiser
from dkdm.errors import DkdmError, UsageError
from dkdm.prediction import Parameterization, Prediction
from dkdm.process import Process, from_betas, from_scheduler_config, karras, rectified_flow
from dkdm.teachers import load_teacher
from dkdm.version import __version__

__all__ = [
    "Batch",
    "ClassLabels",
    "Denoiser",
    "DistillConfig",
    "DkdmError",
    "Parameterization",
    "Prediction",
    "Process",
    "TrainConfig",
    "Unconditional",
    "UsageError",
    "__version__",
    "distill",
    "from_betas",
    "from_scheduler_config",
    "karras",
    "load_teacher",
    "rectified_flow",
    "train",
]
