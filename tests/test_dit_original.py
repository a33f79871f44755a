"""Checkpoints of facebookresearch/DiT and willisma/SiT; numbers are their own code's."""

import argparse

import pytest
import torch
from diffusers import AutoencoderKL

import dkdm
from dkdm import DkdmError, UsageError, load_teacher
from dkdm.core.denoisers.denoiser import Batch
from dkdm.core.diffusion.steps import reverse_step
from dkdm.models import LoadOptions
from formula_weights import few, numbers
from original_files.dit import CLASSES, WIDTH, checkpoint, sit_checkpoint
from small_runs import run

X, LABELS = numbers("x", 3, 4, 8, 8), torch.tensor([0, 3, CLASSES])
HEADS = LoadOptions(flags="--num-heads 4")

# The originals' outputs for t = 3, 500, 999 (DiT) and 1, 500, 999 (SiT).
EPSILON = [-0.8990426, -0.0356044, 0.8986396, 2.5586219, 1.1277041, -0.780994, 1.044213]
VARIANCE = [0.5922684, -2.0239716, 1.9345467, -2.0261636, 0.0603927, 1.2377908, 1.0136716]
PREVIOUS = [-2.3106594, 0.110844, 0.3105586, 1.116135, 0.2823885, 1.1280448, 0.9956845]
VELOCITY = [-0.8095708, 0.0851618, 1.8576519, 1.5525069, 0.9530218, -0.0789874, 1.0899978]
EULER = [-2.3143537, 0.1044985, 0.3076672, 1.1305457, 0.3001468, 1.1493907, 0.9754236]


def saved(tmp_path, state):
    torch.save(state, tmp_path / "model.pt")
    return str(tmp_path / "model.pt")


def evaluated(teacher, levels):
    t = torch.tensor(levels)
    return t, teacher.predict(Batch(X, t, {"class_labels": LABELS}, t))


def test_dit_gives_the_numbers_of_the_original(tmp_path):
    teacher = load_teacher(saved(tmp_path, checkpoint()), options=HEADS)
    t, prediction = evaluated(teacher, [3, 500, 999])
    assert few(prediction.output) == pytest.approx(EPSILON, abs=1e-5)
    assert few(prediction.variance_output) == pytest.approx(VARIANCE, abs=1e-5)
    assert teacher.conditioning == dkdm.ClassLabels(CLASSES, null_class=CLASSES)


def test_dit_step_is_the_original_p_sample(tmp_path):
    teacher = load_teacher(saved(tmp_path, checkpoint()), options=HEADS)
    t, prediction = evaluated(teacher, [3, 500, 999])
    z = numbers("z", *X.shape)
    moved = reverse_step(teacher.process, teacher.parameterization, X, prediction, t, t - 1, z)
    assert few(moved) == pytest.approx(PREVIOUS, abs=1e-5)


def test_sit_gives_the_numbers_of_the_original(tmp_path):
    """An Euler step of its ODE, from the time 1 - sigma to that of the next level."""
    teacher = load_teacher(saved(tmp_path, checkpoint()), format="sit", options=HEADS)
    t, prediction = evaluated(teacher, [1, 500, 999])
    assert few(-prediction.output) == pytest.approx(VELOCITY, abs=1e-5)
    z = torch.zeros_like(X)
    moved = reverse_step(teacher.process, teacher.parameterization, X, prediction, t, t - 1, z, 0)
    assert few(moved) == pytest.approx(EULER, abs=1e-5)


def test_untrained_variance_channels_tell_a_sit(tmp_path):
    found = load_teacher(saved(tmp_path, sit_checkpoint()), options=HEADS)
    assert found.parameterization.prediction == "flow_prediction"
    assert found.network_time[-1] == 0
    found = load_teacher(saved(tmp_path, checkpoint()), options=HEADS)
    assert found.parameterization.variance == "learned_range"


def test_without_variance_channels_the_format_must_be_said(tmp_path):
    state = checkpoint()
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        state[name] = state[name][: 2 * 2 * 4].clone()
    path = saved(tmp_path, state)
    with pytest.raises(UsageError, match="--teacher-format"):
        load_teacher(path, options=HEADS)
    assert load_teacher(path, format="dit", options=HEADS).parameterization.variance == (
        "fixed_large"
    )


def test_training_checkpoint_gives_its_averaged_weights(tmp_path):
    """The repositories' train.py saves this; its arguments are an argparse.Namespace."""
    plain = {name: torch.zeros_like(value) for name, value in checkpoint().items()}
    whole = {"model": plain, "ema": checkpoint(), "opt": {}, "args": argparse.Namespace(seed=1)}
    teacher = load_teacher(saved(tmp_path, whole), options=HEADS)
    assert few(evaluated(teacher, [3, 500, 999])[1].output) == pytest.approx(EPSILON, abs=1e-5)


def test_heads_must_be_said_where_the_width_does_not(tmp_path):
    path = saved(tmp_path, checkpoint())
    with pytest.raises(UsageError, match="--num-heads N"):
        load_teacher(path)
    with pytest.raises(UsageError, match="a divisor of the width, 32"):
        load_teacher(path, options=LoadOptions(flags="--num-heads=5"))
    with pytest.raises(UsageError, match="unknown '--depth': this format takes --num-heads, --vae"):
        load_teacher(path, options=LoadOptions(flags="--depth 2"))
    with pytest.raises(UsageError, match="--num-heads needs a value"):
        load_teacher(path, options=LoadOptions(flags="--num-heads"))


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape", "positions", "first"])
def test_other_weights_are_refused(tmp_path, change):
    state = checkpoint()
    if change == "missing":
        del state["blocks.1.mlp.fc1.bias"]
    elif change == "unexpected":
        state["blocks.1.attn.q_norm.weight"] = torch.ones(8)
    elif change == "shape":
        state["blocks.0.mlp.fc1.weight"] = torch.ones(7, WIDTH)
    elif change == "positions":
        state["pos_embed"] = torch.ones(1, 15, WIDTH)
    else:
        del state["x_embedder.proj.weight"]
    with pytest.raises(DkdmError, match=r"model\.pt"):
        load_teacher(saved(tmp_path, state), format="dit", options=HEADS)


def test_autoencoder_beside_the_file(tmp_path):
    path = saved(tmp_path, checkpoint())
    for folder, channels in (("vae", 4), ("other", 3)):
        AutoencoderKL(block_out_channels=(32,), latent_channels=channels).save_pretrained(
            tmp_path / folder
        )
    flags = f"--num-heads 4 --vae {tmp_path}"
    teacher = load_teacher(path, options=LoadOptions(flags=f"{flags}/vae"))
    assert teacher.to_pixels(torch.zeros(1, 4, 8, 8)).shape == (1, 3, 8, 8)
    for folder in ("other", "none"):
        with pytest.raises(UsageError, match="--vae"):
            load_teacher(path, options=LoadOptions(flags=f"{flags}/{folder}"))


@pytest.mark.parametrize("state", [checkpoint, sit_checkpoint])
def test_distilled_from_a_checkpoint_file(tmp_path, state):
    teacher = load_teacher(saved(tmp_path, state()), options=HEADS)
    folder, metrics, _ = run(tmp_path, teacher, max_train_steps=3, evaluation_samples=0)
    assert len(metrics) == 3
    again = load_teacher(str(folder))
    assert again.parameterization == teacher.parameterization
    assert again.conditioning == teacher.conditioning
    assert torch.allclose(again.process.sigma, teacher.process.sigma)
