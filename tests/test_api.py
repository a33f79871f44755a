"""Whole runs from Python: every source, precision and kind of teacher, on tiny models."""

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import diffusers
import pytest
import torch
from PIL import Image
from torch import nn

import dkdm
from dkdm.core.saving import checkpoint
from dkdm.errors import DkdmError, UsageError
from dkdm.evaluation.results import read_evaluation, read_samples
from dkdm.runs.health import examine_run
from dkdm.students import student_of
from factories import denoiser, tiny_unet
from small_runs import SMALL, run

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.parametrize("source", ["dynamic", "shuffled", "iterative"])
def test_sources_differ_in_nothing_but_the_pool(tmp_path, source):
    folder, metrics, evaluations = run(tmp_path, source=source)
    drawn = {"dynamic": 8, "shuffled": 8, "iterative": 0}[source]  # 24 entries of 8 samples
    assert evaluations == drawn * 2 + 4 * 8
    assert [entry["step"] for entry in metrics] == [1, 2, 3, 4]
    assert (folder / "report.html").is_file()


def test_ancestral_fill_costs_about_half_the_levels(tmp_path):
    _, _, evaluations = run(
        tmp_path, fill="ancestral", max_train_steps=1, pool_size=8, evaluation_samples=0
    )
    per_entry = (evaluations - 8) / 8
    assert 15 < per_entry < 35  # T = 50


def test_guidance_baked_into_the_target_costs_double(tmp_path):
    _, _, evaluations = run(tmp_path, guidance_scale="2", evaluation_samples=0)
    assert evaluations == 2 * (8 * 2 + 4 * 8)


def test_unconditional_teacher_to_unconditional_transformer(tmp_path):
    teacher = denoiser(None)
    folder, _, _ = run(tmp_path, teacher)
    again = dkdm.load_teacher(str(folder))
    assert isinstance(again.conditioning, dkdm.Unconditional)


def test_subset_of_classes(tmp_path):
    teacher = denoiser()
    folder, _, _ = run(tmp_path, teacher, classes=(1,))
    assert json.loads((folder / "config.json").read_text())["classes"] == [1]
    assert dkdm.load_teacher(str(folder)).conditioning.classes == (1,)
    assert teacher.conditioning.classes is None


@pytest.mark.parametrize(
    "changes",
    [
        {"pool_dtype": "float16", "lr_scheduler": "cosine", "lr_warmup_steps": 2},
        {"mixed_precision": "bf16", "loss_weighting": "min-snr", "gradient_accumulation_steps": 2},
        {"use_ema": False, "gradient_checkpointing": True, "eta": 0.0, "stride": "random:5"},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_options_run(tmp_path, changes):
    _, metrics, _ = run(tmp_path, evaluation_samples=0, **changes)
    assert all(0 < entry["loss"] < 10 for entry in metrics)


def test_learned_range_teacher_teaches_its_variance(tmp_path):
    scheduler = {"variance_type": "learned_range", "prediction_type": "epsilon"}
    teacher = denoiser(3, scheduler, out_channels=2)
    folder, _, _ = run(tmp_path, teacher)
    network = diffusers.DiTTransformer2DModel.from_pretrained(folder, subfolder="transformer")
    assert network.config.out_channels == 2


def test_tensorboard_is_written(tmp_path):
    folder, _, _ = run(tmp_path, report_to="tensorboard", evaluation_samples=0)
    assert list((folder / "logs").rglob("events.out.tfevents*"))


def test_a_dit_keeps_the_class_it_is_fed_while_it_learns_and_is_left_as_it_was(
    tmp_path, monkeypatch
):
    from diffusers.models.embeddings import LabelEmbedding

    seen = []

    def watched(layer, labels, force_drop_ids=None):
        if layer.training:
            seen.append(layer.dropout_prob)
        return embed(layer, labels, force_drop_ids)

    embed = LabelEmbedding.forward
    monkeypatch.setattr(LabelEmbedding, "forward", watched)
    teacher = denoiser()
    network = student_of("dit-xs", teacher).network
    layers = [m for m in network.modules() if isinstance(m, LabelEmbedding)]
    before = [layer.dropout_prob for layer in layers]
    assert all(before), "building a Denoiser changes nothing"
    run(tmp_path, teacher, network, evaluation_samples=0, check=False, max_train_steps=1)
    assert seen
    assert not any(seen)
    assert [layer.dropout_prob for layer in layers] == before


def test_train_on_a_folder_of_images(tmp_path):
    for label in ("a", "b"):
        for i in range(6):
            path = tmp_path / "images" / label / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (20, 20), 20 * i).save(path)
    config = dkdm.TrainConfig(
        output_dir=tmp_path / "run",
        images=str(tmp_path / "images"),
        sample_shape=(1, 8, 8),
        network="dit-tiny",
        max_train_steps=3,
        train_batch_size=4,
        condition_dropout=0.2,
        validation_steps=2,
        validation_sampling_steps=2,
        evaluation_samples=4,
        checkpointing_steps=2,
    )
    dkdm.train(config)
    resumed = replace(config, max_train_steps=5, resume_from_checkpoint="latest")
    folder = dkdm.train(resumed)
    model = dkdm.load_teacher(str(folder))
    assert model.conditioning == dkdm.ClassLabels(2, null_class=2)
    assert (folder / "samples" / "grid.png").is_file()
    assert "trained on" in (folder / "README.md").read_text()
    page = (folder / "report.html").read_text()
    assert "dit-tiny was trained on" in page and "incomplete" not in page
    found = read_evaluation(folder)
    assert found.teacher is None and found.num_samples == 4 and found.student.parameters > 0
    assert read_samples(folder).keys() == {"student", "labels"}
    assert {each.status for each in examine_run(folder)} == {"ok"}
    (model,) = [each for each in examine_run(folder) if each.name == "model"]
    assert model.what.startswith("finished")


def test_readme_python_runs(tmp_path, monkeypatch):
    """The README's five lines, with its numbers made small."""
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    code = next(block for block in blocks if "dkdm.distill" in block)
    teacher, small = denoiser(), dkdm.DistillConfig
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dkdm.runs.teachers.chosen_teacher", lambda _: teacher)
    shrunk = {key: getattr(SMALL, key) for key in ("train_batch_size", "pool_size", "fill_steps")}
    rest = {"evaluation_samples": 8, "validation_sampling_steps": 2, "validation_steps": 0}

    def config(**given):
        return small(**{**shrunk, **rest, **given, "max_train_steps": 2})

    monkeypatch.setattr(dkdm, "DistillConfig", config)
    exec(compile(code, "README.md", "exec"), {})
    assert (tmp_path / "runs" / "mine" / "report.html").is_file()


def test_one_step_of_a_same_architecture_student_starts_at_its_own_loss(tmp_path):
    """A student that is the teacher has nothing to learn."""
    teacher = denoiser()
    twin = denoiser()
    _, metrics, _ = run(tmp_path, teacher, twin, learning_rate=0.0, evaluation_samples=0)
    assert all(entry["loss"] < 1e-10 for entry in metrics)


class Blowing(nn.Module):
    """A finite loss whose gradient is not a number; as a container it is empty, and so false."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def __len__(self):
        return 0

    def forward(self, x, t, class_labels):
        del class_labels
        return x * self.weight.abs().sqrt() * 0 * t[:, None, None, None] + self.weight * 0


def test_a_gradient_that_is_not_a_number_changes_no_weight(tmp_path):
    network = Blowing()
    with pytest.raises(DkdmError, match=r"not finite .* went back 3 times.* last good .*point-0\."):
        run(tmp_path, student=network, max_train_steps=9, max_bad_steps=2)
    assert [path.name for path in checkpoint.checkpoints(tmp_path / "run")] == ["checkpoint-0"]
    assert torch.equal(network.weight, torch.zeros(1))


class Fixed(nn.Module):
    """Holds its table of positions fixed."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.ones(8), requires_grad=False)
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x, t, class_labels):
        del t, class_labels
        return x * (self.table * self.scale)


def test_what_a_network_holds_fixed_is_not_trained(tmp_path):
    network = Fixed()
    run(tmp_path, student=network, evaluation_samples=0)
    assert torch.equal(network.table, torch.ones(8))
    assert not torch.equal(network.scale, torch.ones(8))


class Configured(Fixed):
    """Has a config that is no mapping, as many networks have."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(width=8)


def test_a_networks_config_may_be_anything(tmp_path):
    teacher = denoiser()
    run(tmp_path, teacher, Configured(), evaluation_samples=0)
    like = replace(teacher, network=Configured(), call=None)
    with pytest.raises(UsageError, match="num_layers"):
        student_of("shallow-50", like)


def test_a_student_must_know_the_null_condition_where_it_is_told_nothing(tmp_path):
    teacher = denoiser()
    narrow = replace(teacher, network=tiny_unet(3), call=None)  # a row for each class alone
    run(tmp_path, teacher, narrow, evaluation_samples=0)
    for changes in ({"condition_dropout": 0.5}, {"sampling_guidance_scale": 2.0}):
        config = replace(SMALL, output_dir=tmp_path / "refused", **changes)
        with pytest.raises(UsageError, match=r"conditions class_labels \[3, 3\]: IndexError"):
            dkdm.distill(teacher, narrow, config)
    assert not (tmp_path / "refused").exists()


def test_output_dir_may_be_a_string(tmp_path):
    assert dkdm.DistillConfig(output_dir=str(tmp_path / "x")).output_dir == tmp_path / "x"
