"""In what a run computes: the teacher under autocast, times and measurements in float32."""

from dataclasses import replace

import pytest
import torch

from dkdm.config import to_json
from dkdm.core.training.precision import allow_tf32
from dkdm.runs.defaults import with_defaults
from factories import denoiser
from small_runs import SMALL, run


def recording():
    """A teacher, and whether autocast was on, the type of the times and of the states, by call."""
    model, seen = denoiser(), []

    def call(network, x, time, cond):
        seen.append((torch.is_autocast_enabled("cpu"), time.dtype, x.dtype))
        return model.call(network, x, time, cond)

    return replace(model, call=call), seen


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"mixed_precision": "bf16"}, {True, False}),  # what is measured is not
        ({"mixed_precision": "bf16", "teacher_dtype": "float32"}, {False}),
        ({}, {False}),
    ],
)
def test_the_teacher_computes_as_the_run_says(tmp_path, changes, expected):
    teacher, seen = recording()
    run(tmp_path, teacher, max_train_steps=2, **changes)
    assert {autocast for autocast, _, _ in seen} == expected
    assert {time for _, time, _ in seen} == {torch.float32}
    assert {x for _, _, x in seen} == {torch.float32}


def test_targets_and_fill_are_autocast_and_samples_are_not(tmp_path):
    teacher, seen = recording()
    run(tmp_path, teacher, mixed_precision="bf16", max_train_steps=2, evaluation_samples=0)
    drawn = [autocast for autocast, _, _ in seen]
    assert drawn.count(True) >= 3 * 2 + 2  # three batches in two fill steps, two training steps


@pytest.mark.parametrize("then", ["float32", None])
def test_a_run_that_goes_on_keeps_its_teacher_in_float32(tmp_path, then):
    begun = replace(SMALL, teacher_dtype=then, mixed_precision="bf16", student_prediction="sample")
    (tmp_path / "config.json").write_text(to_json(begun))
    teacher, found = denoiser(), tmp_path / "checkpoint-4"
    assert with_defaults(SMALL, teacher, found).teacher_choice.dtype == then
    given = replace(SMALL, teacher_dtype="bfloat16")
    assert with_defaults(given, teacher, found).teacher_choice.dtype == "bfloat16"


def test_a_cpu_knows_no_tf32():
    allow_tf32(torch.device("cpu"))
    assert torch.get_float32_matmul_precision() == "highest"
