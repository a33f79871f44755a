"""`--train-batch-size auto`: what it finds, and that nothing of the run depends on the search."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from PIL import Image
from torch import distributed

import dkdm
import small_runs
from dkdm.checks.memory_plan import PlannedRun, plan
from dkdm.config import DistillConfig, TrainConfig, read_config, to_json
from dkdm.core import processes
from dkdm.core.saving.checkpoint import read_tensors
from dkdm.core.saving.progress import read_metrics
from dkdm.core.training.trainer import Trainer
from dkdm.errors import DkdmError, UsageError
from dkdm.evaluation.memory import peak_allocated
from dkdm.runs import batch_size
from dkdm.runs.batch_size import LARGEST, Found, largest, most_of, taken
from dkdm.runs.distill import _begun_with
from dkdm.runs.memory import needs
from dkdm.runs.programs import OBJECTIVES
from dkdm.students import student_of
from factories import denoiser
from ranks import launch
from test_processes import command

QUICK = {"max_train_steps": 2, "evaluation_samples": 0, "check": False}


class Device:
    """Hands out `fixed` bytes and `each` for a sample, but no more than it has."""

    def __init__(self, fixed, each, has):
        self.fixed, self.each, self.has, self.asked = fixed, each, has, []

    def __call__(self, size):
        self.asked.append(size)
        needed = self.fixed + self.each * size
        return needed if needed <= self.has else None


@pytest.mark.parametrize(
    ("fixed", "each", "has", "limit", "most", "size"),
    [
        (100, 1, 10**6, 10**6, 1024, 1024),  # everything fits
        (100, 1, 10**6, 10**6, 24, 24),  # no more entries in the pool
        (100, 1, 10**6, 228, 1024, 128),  # to the byte
        (100, 1, 10**6, 227, 1024, 64),
        (100, 10, 10**6, 150, 1024, 4),  # less than the smaller size that is measured
        (100, 10, 150, 150, 1024, 4),  # which fails
        (100, 10, 10**6, 50, 1024, 1),  # more than may be used, though it was there
        (100, 10, 110, 10**6, 1024, 1),
        (100, 10, 10**6, 10**6, 1, 1),
        (100, 10, 10**6, 10**6, 12, 12),
        (100, 10, 210, 10**6, 12, 8),  # eight fit, the pool's twelve do not
    ],
)
def test_the_largest_that_fits_is_found(fixed, each, has, limit, most, size):
    device = Device(fixed, each, has)
    found = largest(device, limit, most, device)
    assert found == Found(size, fixed + each * size, limit)
    assert max(device.asked) <= most


def test_what_is_confirmed_to_be_too_much_is_halved():
    device, kernels = Device(100, 1, 10**6), {512: None, 256: 400, 128: 300}
    found = largest(device, 700, 1024, kernels.__getitem__)
    assert found == Found(256, 400, 700)
    found = largest(device, 350, 1024, lambda size: {128: 0}.get(size))
    assert found == Found(128, 228, 350)


def test_memory_for_no_sample_is_an_error_with_a_remedy():
    with pytest.raises(DkdmError, match="not suffice for a single sample: give --teacher-dtype"):
        largest(lambda size: None, 1, 1024, lambda size: None)


def weights(folder):
    return read_tensors(folder / "transformer/diffusion_pytorch_model.safetensors")


def small(tmp_path, name, size, **changes):
    """A run of tiny models that are given, as networks that are left as they were."""
    teacher = denoiser()
    student = student_of("dit-tiny", teacher)
    before = copy.deepcopy([teacher.network.state_dict(), student.network.state_dict()])
    own = copy.deepcopy(student)
    options = {"train_batch_size": size, **QUICK, **changes}
    found = small_runs.run(tmp_path / name, teacher, own, **options)
    after = teacher.network.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before[0].items())
    return found


def test_the_run_is_bit_for_bit_that_of_the_number(tmp_path, capsys):
    folder, metrics, _ = small(tmp_path, "auto", "auto")
    said = capsys.readouterr().err
    assert said.count("--train-batch-size auto: 24 samples take ") == 1
    assert "as measured; the pool has no more entries. Give the number to repeat this run" in said
    number = json.loads((folder / "config.json").read_text())["train_batch_size"]
    assert number == 24
    other, expected, _ = small(tmp_path, "number", number)
    for one, two in zip(expected, metrics, strict=True):
        assert {**one, "steps_per_second": 0} == {**two, "steps_per_second": 0}
    found = weights(folder)
    assert all(torch.equal(found[key], value) for key, value in weights(other).items())


def test_a_run_that_goes_on_has_a_number(tmp_path, monkeypatch):
    small(tmp_path, "run", 6)
    monkeypatch.setattr(batch_size, "largest", None)
    on = {"resume_from_checkpoint": "latest", "max_train_steps": 3}
    _, metrics, _ = small(tmp_path, "run", "auto", **on)
    assert metrics[-1]["step"] == 3
    assert read_config(tmp_path / "run/run/config.json").training.train_batch_size == 6


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"few_step_share": 0.5},
        {"student_init": "some/run"},
        {"student_init": "some/run", "few_step_batch_size": 12},
        {"student_init": "some/run", "objective": "consistency", "eta": 0.0},
        {"objective": "dkdm"},
    ],
)
def test_the_number_is_that_of_the_first_part(tmp_path, changes):
    """The last part of a few-step run takes other batches, and its config.json says so."""
    asked = DistillConfig(**{"objective": "few-step", "output_dir": tmp_path, **changes})
    begun = replace(asked, train_batch_size=64)
    program = OBJECTIVES[begun.few_steps.objective]
    for part in [*program.before(begun), program.last(begun)]:
        part.run.output_dir.mkdir(exist_ok=True)
        (part.run.output_dir / "config.json").write_text(to_json(part))
    assert _begun_with(replace(asked, train_batch_size="auto")) == 64


def test_what_a_step_takes_is_measured(tmp_path):
    """Parts by their tensors, what passes as torch's allocator counts it."""
    trainer = small_runs.begun(tmp_path, levels=2)
    found = taken(trainer, None)
    passing = peak_allocated(trainer.step)
    assert found == pytest.approx(sum(needs(trainer, None).values()) + passing, rel=0.02)
    assert passing > 2**19


def test_a_device_that_is_full_at_some_size_halves_it(tmp_path, monkeypatch):
    learn = Trainer.learn

    def full(self):
        if self.training.batch_size > 10:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return learn(self)

    monkeypatch.setattr(Trainer, "learn", full)
    folder, _, _ = small(tmp_path, "run", "auto")
    assert read_config(folder / "config.json").training.train_batch_size == 8


def test_other_faults_of_a_trial_are_the_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "learn", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        small(tmp_path, "run", "auto")
    assert not (tmp_path / "run/run/config.json").exists()


def test_training_on_images_finds_one_too(tmp_path, monkeypatch):
    (tmp_path / "images").mkdir()
    for number in range(4):
        Image.new("L", (8, 8), 60 * number).save(tmp_path / "images" / f"{number}.png")
    monkeypatch.setattr(batch_size, "LARGEST", 4)
    config = TrainConfig(
        output_dir=tmp_path / "run",
        images=str(tmp_path / "images"),
        sample_shape=(1, 8, 8),
        network="dit-tiny",
        train_batch_size="auto",
        max_train_steps=1,
        evaluation_samples=0,
        validation_steps=0,
    )
    dkdm.train(config)
    assert read_config(tmp_path / "run/config.json").training.train_batch_size == 4
    on = replace(config, resume_from_checkpoint="latest", max_train_steps=2)
    monkeypatch.setattr(batch_size, "largest", None)
    dkdm.train(on)
    assert read_metrics(tmp_path / "run/metrics.jsonl")[-1]["step"] == 2


def test_where_it_cannot_be_found_a_number_is_asked_for(tmp_path):
    with pytest.raises(UsageError, match="--train-batch-size auto: with --fsdp student"):
        small(tmp_path, "run", "auto", fsdp="student")
    with pytest.raises(UsageError, match="--train-batch-size auto: .* give a number"):
        plan(denoiser(), PlannedRun(student="dit-tiny", train_batch_size="auto"))
    assert not (tmp_path / "run/run").exists()


def test_a_pool_bounds_the_batch_of_all_processes():
    assert most_of(DistillConfig(), 2) == LARGEST
    assert most_of(DistillConfig(pool_size=100), 2) == 50
    assert most_of(DistillConfig(pool_size=1), 2) == 1
    assert most_of(TrainConfig(), 1) == LARGEST


def test_a_process_can_leave_the_others_out(monkeypatch):
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    assert processes.world() == 2
    with processes.alone():
        assert processes.world() == 1 and processes.is_main()
    assert processes.world() == 2


UNEQUAL = """
import torch
from dkdm.runs import batch_size
batch_size.memory_of_run = lambda: (torch.device("cpu"), 10**9 if rank == 0 else 1)
"""


@pytest.mark.slow
def test_processes_take_the_smallest_of_what_each_has_room_for(tmp_path):
    arguments = command(tmp_path / "run", "--train-batch-size", "auto")
    ((code, said),) = launch(tmp_path, (2, UNEQUAL, arguments))
    assert code == 0, said
    assert said.count("--train-batch-size auto: 2 samples (1 in each of 2 processes) take") == 1
    assert read_config(tmp_path / "run/config.json").training.train_batch_size == 2
