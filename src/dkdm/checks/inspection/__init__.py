"""What a model is, and whether it denoises as it is read."""

from dkdm.checks.inspection.check import DenoisingCheck, Spread, check_denoising, quick_check
from dkdm.checks.inspection.denoising import LevelError
from dkdm.checks.inspection.facts import Inspection, inspect_denoiser, print_inspection
from dkdm.checks.inspection.given import read_samples

__all__ = [
    "DenoisingCheck",
    "Inspection",
    "LevelError",
    "Spread",
    "check_denoising",
    "inspect_denoiser",
    "print_inspection",
    "quick_check",
    "read_samples",
]
