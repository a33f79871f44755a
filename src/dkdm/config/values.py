"""The words, ranges and written forms that options of several groups take."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from dkdm.errors import UsageError
from dkdm.reading.fields import shown
from dkdm.reading.values import Range

PredictionType = Literal["epsilon", "sample", "v_prediction", "flow_prediction", "edm", "edm_v"]
Resize = Literal["bilinear", "tensorflow", "bicubic"]
Sampler = Literal["ddim", "ddpm", "euler", "heun", "dpm"]
SourceKind = Literal["dynamic", "shuffled", "iterative", "synthetic", "images", "mixed"]
FillKind = Literal["few-step", "ancestral", "none"]
LossWeighting = Literal["auto", "uniform", "capped", "snr", "min-snr", "student"]
Precision = Literal["float32", "float16", "bfloat16", "int8"]
ProcessName = str
Acceleration = Literal["off", "networks", "graph", "compile"]
Accelerate = Literal["auto", Acceleration]
ObjectiveKind = Literal["dkdm", "few-step", "consistency"]
MOST_HEADS = 1024  # of a few-step student
EXPORTED = {"onnx": "student.onnx", "torch-export": "student.pt2", "int8": "student-int8"}

Count = Annotated[int, Range(1)]
CountOrNone = Annotated[int, Range(0)]
Seed = Annotated[int, Range(0, 2**32 - 1)]
Share = Annotated[float, Range(0, 1)]
Scale = Annotated[float, Range(-1000, 1000)]
ClassId = Annotated[int, Range(0)]


def parse_stride(text: str) -> tuple[int, int]:
    """Smallest and largest of the strides '20' (always 20) or 'random:20' (1 to 39, mean 20).

    Raises UsageError for anything else.
    """
    read = re.fullmatch("(random:)?([0-9]{1,9})", text)
    if read is None or int(read[2]) < 1:
        raise UsageError(f"--stride {shown(text)}: give a number of levels or random:MEAN")
    mean = int(read[2])
    return (1, 2 * mean - 1) if read[1] else (mean, mean)


def parse_steps(text: str) -> tuple[int, ...]:
    """The numbers of sampling steps of '1:8' (1, 2, 4, 8), '4' or '1,4', rising.

    Raises UsageError for anything else.
    """
    numbers = [int(part) for part in re.split("[:,]", text) if re.fullmatch("[0-9]{1,4}", part)]
    legal = re.fullmatch("[0-9]+(:[0-9]+|(,[0-9]+)*)", text) and numbers and min(numbers) > 0
    if not legal or len(numbers) != len(re.split("[:,]", text)) or numbers[0] > numbers[-1]:
        raise UsageError(
            f"--student-steps {shown(text)}: give LOW:HIGH such as 1:8, which is 1, 2, 4 and 8, or "
            "numbers separated by commas"
        )
    if ":" not in text:
        return tuple(sorted(set(numbers)))
    doubled = (numbers[0] * 2**power for power in range(numbers[1].bit_length()))
    return tuple(sorted({*(steps for steps in doubled if steps < numbers[1]), numbers[1]}))


def parse_scale(text: str) -> tuple[float, float]:
    """Lowest and highest of the guidance scales '4' or '2:8'. Raises UsageError for others."""
    numbers = _numbers(text)
    legal = len(numbers) in (1, 2) and all(-1000 <= number <= 1000 for number in numbers)
    if not legal or numbers[0] > numbers[-1]:
        raise UsageError(
            f"--guidance-scale {shown(text)}: give a number from -1000 to 1000, or LOW:HIGH"
        )
    return numbers[0], numbers[-1]


def parse_interval(text: str | None) -> tuple[float, float] | None:
    """Read 'LOW:HIGH', shares of noise in 0..1; None is everywhere. Raises UsageError."""
    if text is None:
        return None
    numbers = _numbers(text)
    if len(numbers) != 2 or not 0 <= numbers[0] < numbers[1] <= 1:
        raise UsageError(
            f"--guidance-interval {shown(text)}: give LOW:HIGH, shares of noise sigma / (alpha + "
            "sigma) from 0 (clean) to 1 (noise), such as 0.3:0.7"
        )
    return numbers[0], numbers[1]


def parse_utilization(text: str) -> tuple[float, float]:
    """Read a share in 0..1 or 'LOW:HIGH' as (low, high). Raises UsageError."""
    numbers = _numbers(text)
    if len(numbers) not in (1, 2) or not 0 < numbers[0] <= numbers[-1] <= 1:
        raise UsageError(
            f"--utilization {shown(text)}: give a share of the device's peak above 0 and up to 1, "
            "or LOW:HIGH, such as 0.07:0.4"
        )
    return numbers[0], numbers[-1]


def _numbers(text: str) -> list[float]:
    """The numbers between colons; none if one of them is no number."""
    try:
        return [float(part) for part in text.split(":")]
    except ValueError:
        return []
