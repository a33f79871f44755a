"""Checkpoints of lucidrains/denoising-diffusion-pytorch; numbers are its own code's."""

import pytest
import torch

from dkdm import DkdmError, UsageError, load_teacher
from dkdm.core.denoisers.denoiser import Batch
from dkdm.core.diffusion.steps import reverse_step
from dkdm.models import LoadOptions
from dkdm.networks.lucidrains import LucidrainsUNet
from dkdm.students import student_of
from formula_weights import few, numbers
from original_files.lucidrains import PLAIN, checkpoint
from small_runs import run

QUICK = {"max_train_steps": 2, "evaluation_samples": 0, "gradient_checkpointing": True}
NETWORKS = {
    "plain": PLAIN,
    "full": PLAIN
    | {
        "in_channels": 1,
        "out_channels": 1,
        "first_channels": 12,
        "block_out_channels": (8, 16, 16),
        "full_attention": (False, True, True),
        "heads": (2, 1, 3),
        "head_channels": (4, 8, 4),
    },
    "fourier": PLAIN | {"fourier": True, "time_channels": 6},
    "groups": PLAIN | {"norm_groups": 8},
}
# The original's outputs at t = 3, 50, 99, and what p_sample makes of the same noise.
OUTPUTS = {
    "plain": [0.3431323, 1.2814037, 0.50358, -1.324412, -1.0820283, 0.2491192, 1.2218763],
    "full": [0.2658729, 0.5386701, 0.6528381, 0.2078764, 0.3806421, 0.1310193, 0.3654649],
    "fourier": [0.2869487, 0.9218704, 0.240958, -0.8165988, -0.3632088, 0.4536936, 1.179459],
    "groups": [0.5506167, 1.6060859, 0.8795383, -3.9767892, -0.3810652, -0.7164183, 2.4045819],
}
PREVIOUS = {
    "pred_v": [-1.8184847, 1.0824335, -0.1844296, 1.6948695, 0.9065056, -0.7788859, 0.9233789],
    "pred_noise": [-1.8184847, 1.0824335, -0.1945678, 1.6948695, 0.9065056, -0.7905674, 0.9269857],
    "pred_x0": [-1.3025299, 1.0824335, -0.1446017, 1.6098883, 0.8753691, -0.7711207, 0.8141475],
}
SIZE = LoadOptions(sample_size=(16, 16))
LEVELS = torch.tensor([3, 50, 99])


def saved(tmp_path, state):
    torch.save(state, tmp_path / "model-1.pt")
    return str(tmp_path / "model-1.pt")


def evaluated(teacher):
    x = numbers("x", 3, *teacher.sample_shape)
    return x, teacher.predict(Batch(x, LEVELS, {}, LEVELS))


@pytest.mark.parametrize("kind", NETWORKS)
def test_numbers_of_the_original(tmp_path, kind):
    teacher = load_teacher(saved(tmp_path, checkpoint(**NETWORKS[kind])), options=SIZE)
    assert few(evaluated(teacher)[1].output) == pytest.approx(OUTPUTS[kind], abs=1e-5)
    expected = LucidrainsUNet(sample_size=(16, 16), **NETWORKS[kind]).config
    found = teacher.network.config
    assert all(found[name] == value for name, value in expected.items() if name[0] != "_")


@pytest.mark.parametrize("objective", PREVIOUS)
@pytest.mark.parametrize("said_by", ["file", "flags"])
def test_step_is_the_original_p_sample(tmp_path, objective, said_by):
    state, options = checkpoint(objective), SIZE
    if said_by == "flags":
        del state["loss_weight"]
        options = LoadOptions(sample_size=(16, 16), flags=f"--objective {objective}")
    teacher = load_teacher(saved(tmp_path, state), options=options)
    x, prediction = evaluated(teacher)
    z = numbers("z", *x.shape)
    moved = reverse_step(
        teacher.process, teacher.parameterization, x, prediction, LEVELS, LEVELS - 1, z
    )
    assert few(moved) == pytest.approx(PREVIOUS[objective], abs=1e-5)


def test_trainer_checkpoint_gives_its_averaged_weights(tmp_path):
    blank = {name: torch.zeros_like(value) for name, value in checkpoint().items()}
    averaged = {f"ema_model.{name}": value for name, value in checkpoint().items()}
    online = {f"online_model.{name}": value for name, value in blank.items()}
    ema = {"initted": torch.tensor(True), "step": torch.tensor(7), **averaged, **online}
    whole = {"step": 7, "model": blank, "opt": {}, "ema": ema, "scaler": None, "version": "2.2.6"}
    path = saved(tmp_path, whole)
    output = few(evaluated(load_teacher(path, options=SIZE))[1].output)
    assert output == pytest.approx(OUTPUTS["plain"], abs=1e-5)
    plain = LoadOptions(sample_size=(16, 16), flags="--objective pred_v", ema=False)
    with pytest.raises(UsageError, match=r"betas\[0\] is 0"):
        load_teacher(path, options=plain)  # its tables are blank, too


def test_half_precision(tmp_path):
    options = LoadOptions(sample_size=(16, 16), dtype="bfloat16")
    assert load_teacher(saved(tmp_path, checkpoint()), options=options).dtype == torch.bfloat16


def test_size_and_objective_must_be_said(tmp_path):
    path = saved(tmp_path, checkpoint())
    for size in (None, (15, 16), (16,)):
        with pytest.raises(UsageError, match="--teacher-size"):
            load_teacher(path, options=LoadOptions(sample_size=size))
    state = checkpoint()
    state["loss_weight"] = torch.full((100,), 0.7)
    with pytest.raises(UsageError, match="--objective pred_v"):
        load_teacher(saved(tmp_path, state), options=SIZE)
    with pytest.raises(UsageError, match="use one of pred_v, pred_noise, pred_x0"):
        load_teacher(path, options=LoadOptions(flags="--objective v"))


def test_groups_must_divide_the_widths(tmp_path):
    path = saved(tmp_path, checkpoint(norm_groups=8))
    options = LoadOptions(sample_size=(16, 16), flags="--resnet-block-groups 3")
    with pytest.raises(UsageError, match="--resnet-block-groups: .*divisible"):
        load_teacher(path, options=options)


@pytest.mark.parametrize("change", [{"in_channels": 6}, {"out_channels": 6}])
def test_self_condition_and_learned_variance_are_refused(tmp_path, change):
    with pytest.raises(UsageError, match="self_condition or learned_variance"):
        load_teacher(saved(tmp_path, checkpoint(**change)), options=SIZE)


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape", "betas", "memory"])
def test_other_weights_are_refused(tmp_path, change):
    state = checkpoint()
    if change == "missing":
        del state["model.mid_attn.norm.g"]
    elif change == "unexpected":
        state["model.downs.0.0.block1.norm.bias"] = torch.ones(8)
    elif change == "shape":
        state["model.time_mlp.3.weight"] = torch.ones(33, 32)
    elif change == "betas":
        del state["betas"]
    else:
        state = {name: value for name, value in state.items() if "mem_kv" not in name}
    with pytest.raises(DkdmError, match=r"model-1\.pt"):
        load_teacher(saved(tmp_path, state), options=SIZE)


def test_distilled_from_a_checkpoint_file(tmp_path):
    teacher = load_teacher(saved(tmp_path, checkpoint()), options=SIZE)
    folder, metrics, _ = run(tmp_path, teacher, max_train_steps=3, evaluation_samples=0)
    assert len(metrics) == 3
    again = load_teacher(str(folder))
    assert again.parameterization == teacher.parameterization
    assert again.process.clipping == teacher.process.clipping
    assert torch.allclose(again.process.sigma, teacher.process.sigma)


def test_student_of_the_same_architecture_is_saved_with_its_code(tmp_path):
    teacher = load_teacher(saved(tmp_path, checkpoint()), options=SIZE)
    teacher.network.save_config(tmp_path / "student")
    student = student_of(str(tmp_path / "student" / "config.json"), teacher)
    folder, _, _ = run(
        tmp_path,
        teacher,
        student,
        max_train_steps=2,
        evaluation_samples=0,
        gradient_checkpointing=True,
    )
    assert (folder / "unet" / "lucidrains.py").is_file()
    assert isinstance(load_teacher(str(folder)).network, LucidrainsUNet)
