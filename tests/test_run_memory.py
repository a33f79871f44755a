"""The message of a run whose memory is used up."""

import pytest
import torch

import small_runs
from dkdm.cli import main
from dkdm.core.saving.checkpoint import read_tensors
from dkdm.core.training.trainer import Trainer
from dkdm.errors import DkdmError
from dkdm.runs.memory import OutOfMemory, is_out_of_memory, needs

CPU_ERROR = "[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError(CPU_ERROR), MemoryError()]
)
def test_one_message_says_what_each_part_takes_and_what_helps(tmp_path, monkeypatch, error):
    trainers = []

    def fails(self):
        trainers.append(self)
        raise error

    monkeypatch.setattr(Trainer, "learn", fails)
    with pytest.raises(DkdmError) as caught:
        small_runs.run(tmp_path, optimizer="adamw", evaluation_samples=0)
    said = str(caught.value)
    assert said.startswith("memory is used up at a batch of 8: ")
    assert "half the --train-batch-size" in said and "\n" not in said
    assert "--train-batch-size auto finds the largest" in said
    found = needs(trainers[0], None)
    weights = sum(p.nbytes for p in trainers[0].network.parameters())
    assert weights <= found["average"] <= found["student"] < 1.1 * weights
    assert f"average {found['average'] / 2**20:,.0f} MiB" in said


@pytest.mark.parametrize("place", ["distill.measured", "launch.publish_run"])
def test_before_the_first_step_and_after_the_last_the_message_is_the_same(
    tmp_path, monkeypatch, place
):
    def fails(*given):
        del given
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(f"dkdm.runs.{place}", fails)
    with pytest.raises(OutOfMemory, match="memory is used up at a batch of 8: .*student "):
        small_runs.run(tmp_path, max_train_steps=1)


def test_other_errors_stay_what_they_are(tmp_path, monkeypatch):
    def fails(self):
        del self
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(Trainer, "learn", fails)
    with pytest.raises(RuntimeError, match="shapes differ"):
        small_runs.run(tmp_path, evaluation_samples=0)
    assert not is_out_of_memory(ValueError("out of memory"))


def test_parts_are_what_their_tensors_take(tmp_path, monkeypatch):
    seen = {}
    save = Trainer.save

    def look(self):
        seen.update(needs(self, None))
        save(self)

    monkeypatch.setattr(Trainer, "save", look)
    folder, _, _ = small_runs.run(tmp_path, optimizer="adamw", evaluation_samples=0)
    last = folder / "checkpoint-4"
    for part, files in {
        "average": "*_ema/*",
        "optimizer": "optimizer*",
        "pool": "source/*",
    }.items():
        found = map(read_tensors, last.glob(f"{files}.safetensors"))
        written = sum(value.nbytes for each in found for value in each.values())
        assert seen[part] == written


def test_deterministic_algorithms_are_used_if_asked(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "use_deterministic_algorithms", asked.append)
    small_runs.run(tmp_path / "without", max_train_steps=1, evaluation_samples=0)
    assert asked == []
    small_runs.run(tmp_path / "with", max_train_steps=1, evaluation_samples=0, deterministic=True)
    assert asked == [True]


def test_what_is_advised_works(tmp_path):
    small_runs.run(tmp_path, max_train_steps=1, evaluation_samples=0)
    half = {"train_batch_size": 4, "gradient_accumulation_steps": 2, "accept_changes": True}
    on = {"max_train_steps": 2, "evaluation_samples": 0, "resume_from_checkpoint": "latest"}
    _, metrics, asked = small_runs.run(tmp_path, **half, **on)
    assert [line["step"] for line in metrics] == [1, 2]
    assert asked == metrics[0]["teacher_evaluations"] + 8


@pytest.mark.parametrize(("command", "helps"), [("sample", "fewer --num-samples"), ("report", "")])
def test_memory_used_up_where_no_run_measures_it_is_one_line(command, helps, monkeypatch, capsys):
    def used_up(_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    monkeypatch.setattr("dkdm.cli._dispatch", used_up)
    assert main([command, "builtin:fashion"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("dkdm: memory is used up (") and "Tried to allocate 2.00 GiB" in said
    assert helps in said and said.count("\n") == 1
