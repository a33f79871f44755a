"""What a model is, and whether it denoises as it is read."""

from dkdm.inspection.check import Concern, DenoisingCheck, Spread, check_denoising, quick_check
from dkdm.inspection.denoising import LevelError
from dkdm.inspection.facts import ConditioningFacts, Inspection, ProcessFacts, inspect_denoiser
from dkdm.inspection.given import read_samples
from dkdm.inspection.tables import print_inspection

__all__ = [
    "Concern",
    "ConditioningFacts",
    "DenoisingCheck",
    "Inspection",
    "LevelError",
    "ProcessFacts",
    "Spread",
    "check_denoising",
    "inspect_denoiser",
    "print_inspection",
    "quick_check",
    "read_samples",
]
